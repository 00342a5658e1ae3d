#!/usr/bin/env bash
# One node's part of a training on several nodes; the same line on every node (slurm.sbatch runs it through srun):
#     HEAD=node1:29500 NODES=1:2 PROCESSES=4 launch/torchrun.sh train --config F --run_dir D
# NODES is a number, or MIN:MAX: then nodes may leave and come back, and the others go on from the last checkpoint meanwhile.
#   HEAD        host:port of the node where all others ask; start one there
#   PROCESSES   on this node, one for each GPU (default 1)
#   RESTARTS    of crashed processes before giving up (default 3)
#   ADDRESS     under which the others reach this node (default: its host name)
#   IS_HEAD     1 or 0 where the host name alone does not tell whether this node is HEAD
#   PYTHON      (default python)
# Gloo on nodes with several networks: set GLOO_SOCKET_IFNAME (NCCL: NCCL_SOCKET_IFNAME) to the one that connects them.
set -euo pipefail
if [[ ! ${HEAD:-} =~ ^[^:]+:[0-9]+$ || ! ${NODES:-1} =~ ^[0-9]+(:[0-9]+)?$ || $# -eq 0 ]]; then
    echo "torchrun.sh: HEAD '${HEAD:-}' must be host:port, NODES '${NODES:-1}' a number or MIN:MAX, and a verb must follow;" \
         "see the head of this file" >&2
    exit 2
fi

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # restarted gloo processes read stale addresses otherwise
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}  # seconds to finish an iteration and save
export NCCL_DEBUG=${NCCL_DEBUG:-WARN} PYTHONFAULTHANDLER=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

conf=timeout=600
[[ ${NODES:-1} != *:* ]] || conf+=,last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3
[[ -z ${IS_HEAD:-} ]] || conf+=,is_host=$IS_HEAD
exec "${PYTHON:-python}" -m torch.distributed.run --nnodes="${NODES:-1}" --nproc-per-node="${PROCESSES:-1}" \
    --max-restarts="${RESTARTS:-3}" --rdzv-backend=c10d --rdzv-endpoint="$HEAD" --rdzv-id="${RUN_ID:-alpha-maml}" \
    --rdzv-conf="$conf" ${ADDRESS:+--local-addr="$ADDRESS"} -m alpha_maml "$@"
