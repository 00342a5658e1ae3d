"""Alpha MAML: meta-learning whose two learning rates adapt online, on any number of GPUs.

This is the public door: `load` makes a trained run a learner with fit and predict.

The rooms behind it, each of which may import those above it in this list:
    errors, registry    what a user is told; parts by name
    models              networks, and `models.ops`, the one door to fast operations
    data                task distributions, losses, and what a user brings to a trained run
    trainer             the algorithm, its engines, a run's folder, tracking, studies
    launch              the command line, ranks, SLURM
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alpha_maml.trainer.learner import load

__all__ = ["load"]
PLACES = {"load": "alpha_maml.trainer.learner"}  # imported when they are asked for: `--help` need not wait for torch


def __getattr__(name: str) -> Any:
    if name in PLACES:
        from importlib import import_module

        return getattr(import_module(PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
