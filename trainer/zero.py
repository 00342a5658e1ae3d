"""The engine whose theta, previous direction and moments DeepSpeed shards (the only import of deepspeed).

    stage 0  everything replicated            stage 1  previous direction, moments and theta's master copy sharded
    stage 2  the reduced gradient too         stage 3  theta itself too: gathered for an iteration's adaptation

DeepSpeed reduces and shards; the direction, the trust region and the rates are ours, in `_Shard.step`, on this rank's
flat partition. What its defaults would do silently, clip at 1.0, average over ranks, is undone here. Partitions are float32.
"""
from __future__ import annotations

import copy
import os
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer import outer
from trainer.collective import World, sum_in_place
from trainer.engine import Decide, pack_rest, unpack_rest
from trainer.inner import Params
from trainer.keys import Config
from trainer.maml import MetaGradient
from trainer.rates import Total


def _import_deepspeed(device: torch.device):
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("DS_BUILD_OPS", "0")
    import deepspeed
    import deepspeed.ops

    # On CPU, init_distributed would compile an operator of its own: over a minute, or a failure without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("WARNING")
    return deepspeed


class _Shard(torch.optim.Optimizer):
    """theta's step on whatever flat pieces DeepSpeed hands over. `tensor_of` maps each piece's elements to theta's tensors
    (int64, 0 for padding), because the trust region bounds tensors and a partition cuts through them."""

    def __init__(self, params, config: Config, world: World, tensors: int, sharded: bool):
        super().__init__(params, {"lr": 0.0})  # DeepSpeed wants a rate; ours comes from `decide`
        self.config, self.world, self.tensors, self.sharded = config, world, tensors, sharded
        self.names = outer.parts(config)
        self.pieces: list[Tensor] = []
        self.tensor_of: list[Tensor] = []
        self.count = torch.zeros((), dtype=torch.float64, device=world.device)
        self.iteration: tuple[MetaGradient, Tensor, Decide] | None = None

    def hold(self, pieces: list[Tensor], tensor_of: list[Tensor]) -> None:
        self.pieces, self.tensor_of = pieces, tensor_of
        for p in pieces:
            self.state[p] = {name: torch.zeros_like(p) for name in self.names}

    def _sum(self, values: Tensor) -> Tensor:
        return sum_in_place(values, self.world) if self.sharded else values

    def _norms(self, values: list[Tensor]) -> Tensor:
        """The norm of each of theta's tensors over all shards, float64 [1 + tensors]; the padding's comes first."""
        sums = torch.zeros(self.tensors + 1, dtype=torch.float64, device=self.world.device)
        for tensor_of, x in zip(self.tensor_of, values):
            sums.index_add_(0, tensor_of, x.flatten().double() ** 2)
        return self._sum(sums).sqrt()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        (sums, stopping, decide), self.iteration = self.iteration, None
        states = [self.state[p] for p in self.pieces]
        decay = self.config.outer.weight_decay
        gradients = [torch.add(torch.zeros_like(p) if p.grad is None else p.grad, p, alpha=decay) for p in self.pieces]
        products = torch.zeros(3, dtype=torch.float64, device=self.world.device)
        for g, state in zip(gradients, states):
            g, previous = g.double(), state["previous"].double()
            products += torch.stack([(g * g).sum(), (g * previous).sum(), (previous * previous).sum()])
        beta, usable = decide(Total(sums, *self._sum(products).unbind(), stopping))

        count, trust = self.count + 1, outer.trust_of(self.config)
        moved = [outer.direction(g, s.get("mean"), s.get("square"), count) for g, s in zip(gradients, states)]
        walkers = [outer.walker(p, s.get("average")) for p, s in zip(self.pieces, states)]
        if trust > 0:
            lengths = self._norms(walkers), self._norms([d for d, *_ in moved])
            factors = outer.trusted(*lengths, beta, outer.trust_at(trust, count))
        for p, w, state, tensor_of, (d, *moments) in zip(self.pieces, walkers, states, self.tensor_of, moved):
            if trust > 0:
                d = d * factors[tensor_of].view_as(d).to(d.dtype)
            theta, average = outer.joined(w - beta.to(p.dtype) * d, state.get("average"), count)
            new = {"previous": d, "mean": moments[0], "square": moments[1], "theta": theta, "average": average}
            for name, old in ({"theta": p} | state).items():
                old.copy_(torch.where(usable, new[name], old))
        self.count = torch.where(usable, count, self.count)


class ZeroEngine:
    """`model` under DeepSpeed at engine.zero_stage; float32 only."""

    def __init__(self, model: nn.Module, config: Config, world: World):
        deepspeed = _import_deepspeed(world.device)
        if not dist.is_initialized():  # the plain command: one rank
            dist.init_process_group("nccl" if world.device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0,
                                    world_size=1)
            os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}  # DeepSpeed looks there too
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
        self.config, self.world, self.stage, self.zero = config, world, config.engine.zero_stage, deepspeed.zero
        values = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.sizes = [p.numel() for p in values.values()]
        # DeepSpeed lays theta out as it likes. Parameters whose bits are their elements' numbers show where each one went,
        # and spare us its private maps. 0 is left to padding.
        model, start = copy.deepcopy(model), 1
        for p in model.parameters():
            numbers = torch.arange(start, start + p.numel(), dtype=torch.int32, device=p.device)
            p.data.view(torch.int32).copy_(numbers.view_as(p))
            start += p.numel()
        self.optimizer = _Shard(model.parameters(), config, world, len(values), self.stage > 0 and world.size > 1)
        deterministic = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)  # memory it does not write, its padding, is filled with nan
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, dist_init_required=False, config={
            "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
            # One sub-group: the optimiser steps once an iteration. No bucket larger than theta: stage 3 allocates it.
            "zero_optimization": {"stage": self.stage, "stage3_param_persistence_threshold": 0, "sub_group_size": 10**12,
                                  "reduce_bucket_size": min(sum(self.sizes), 5 * 10**8)}})
        torch.use_deterministic_algorithms(deterministic)
        pieces = {0: lambda: [p for _, p in self._named()], 3: lambda: self.engine.optimizer.fp32_partitioned_groups_flat}.get(
            self.stage, lambda: self.engine.optimizer.single_partition_of_fp32_groups)()
        numbers = [p.detach().clone().view(torch.int32).long().flatten() for p in pieces]
        self.number_of = [torch.where((n > 0) & (n < start), n, 0) for n in numbers]
        ends = torch.tensor([0, *self.sizes], device=world.device).cumsum(0)
        self.optimizer.hold(list(pieces), [torch.searchsorted(ends, numbers) for numbers in self.number_of])
        self._write(None, values)
        if "average" in self.optimizer.names:
            self._write("average", values)

    def _named(self) -> list[tuple[str, Tensor]]:
        return list(self.engine.module.named_parameters())

    def _gathered(self, write: bool = False):
        if self.stage < 3:
            return nullcontext()
        return self.zero.GatheredParameters([p for _, p in self._named()], modifier_rank=0 if write else None)

    def theta(self) -> Params:
        with self._gathered():
            return {name: p.detach().clone() if self.stage == 3 else p.detach() for name, p in self._named()}

    def learned(self) -> Params:
        return self._read("average") if "average" in self.optimizer.names else self.theta()

    def step(self, local: MetaGradient, stop: Tensor, decide: Decide) -> None:
        sums, stopping = unpack_rest(sum_in_place(pack_rest(local, stop, torch.float64), self.world), local)
        self.optimizer.iteration = sums, stopping, decide
        # DeepSpeed reduces in its own backward hooks only. This surrogate's gradient is the meta-gradient; the factor
        # undoes its average over ranks and takes the mean over tasks.
        count = self.config.task.batch if self.config.task.reduction == "mean" else 1
        with self._gathered():
            surrogate = sum((p * local.gradient[name]).sum() for name, p in self._named())
            self.engine.backward(surrogate * (self.world.size / count))
        self.engine.step()
        if self.optimizer.iteration is not None:  # DeepSpeed drops a gradient that is not finite by itself, on all ranks
            decide(Total(sums, *torch.full((3,), torch.nan, dtype=torch.float64, device=self.world.device), stopping))

    def _read(self, name: str | None) -> Params:
        """theta (None) or one of the optimiser's states in full on every rank: copies."""
        flat = torch.zeros(1 + sum(self.sizes), device=self.world.device)
        for p, numbers in zip(self.optimizer.pieces, self.number_of):
            flat[numbers] = (self.optimizer.state[p][name] if name else p.detach()).flatten()
        flat[0] = 0
        if self.optimizer.sharded:
            sum_in_place(flat, self.world)
        parts = flat[1:].split(self.sizes)
        return {key: part.view(p.ds_shape if self.stage == 3 else p.shape) for (key, p), part in zip(self._named(), parts)}

    def _write(self, name: str | None, values: Params) -> None:
        flat = torch.cat([torch.zeros(1, device=self.world.device), *(values[key].flatten() for key, _ in self._named())])
        for p, numbers in zip(self.optimizer.pieces, self.number_of):
            target = self.optimizer.state[p][name] if name else p.detach()
            target.copy_((flat[numbers] * (numbers > 0)).view_as(target))
        if name is None:  # the copy that DeepSpeed computes with
            with self._gathered(write=True):
                for key, p in self._named():
                    p.data.copy_(values[key])

    def state(self) -> dict[str, Tensor]:
        found = {f"theta.{key}": t for key, t in self._read(None).items()}
        for name in self.optimizer.names:
            found |= {f"outer.{name}.{key}": t for key, t in self._read(name).items()}
        return found | {"outer.count": self.optimizer.count.clone()}

    def load(self, state: dict[str, Tensor]) -> None:
        for name in (None, *self.optimizer.names):
            prefix = f"outer.{name}." if name else "theta."
            self._write(name, {key: state[prefix + key] for key, _ in self._named()})
        self.optimizer.count = state["outer.count"].clone()
