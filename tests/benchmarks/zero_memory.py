"""What a rank holds under each engine: an MLP of 12 million parameters, Adam outside, two ranks.

usage: torchrun --standalone --nproc-per-node 2 tests/benchmarks/zero_memory.py ENGINE
ENGINE is torch, or a ZeRO stage. Prints one row: megabytes on rank 0 of theta as it rests between iterations, of the
optimiser's state (previous direction and Adam's moments, with DeepSpeed's float32 master copy of theta), and the process's
peak.
"""
from __future__ import annotations

import resource
import sys

from alpha_maml.launch import runtime
from alpha_maml.trainer import config
from alpha_maml.trainer.setup import set_up
from alpha_maml.trainer.step import train_step


def main() -> None:
    engine = {"engine.name": "torch"}
    if sys.argv[1] != "torch":
        engine = {"engine.name": "deepspeed", "engine.zero_stage": sys.argv[1]}
    settings = config.build(None, engine | {"model.channels": "3500", "outer.optimizer": "adam", "task.batch": "2"})
    with runtime.world("cpu", 120) as world:
        problem, state = set_up(settings, world)
        for _ in range(3):
            state, _ = train_step(problem, state, False)
        engine = state.engine
        held = [t for part in engine.memory.parts.values() for t in part.values()]
        if sys.argv[1] == "torch":
            theta = engine.theta().values()
        else:
            theta = [p.ds_tensor if engine.stage == 3 else p for _, p in engine._named()]
            held += engine.pieces.values() if engine.stage else []
        if world.rank == 0:
            size = {name: sum(t.numel() * t.element_size() for t in tensors) / 1e6
                    for name, tensors in (("theta", theta), ("state", held))}
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(f"{sys.argv[1]:>6}  theta {size['theta']:7.1f} MB  optimiser's state {size['state']:7.1f} MB  "
                  f"peak {peak:7.0f} MB")


if __name__ == "__main__":
    main()
