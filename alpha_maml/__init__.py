"""Alpha MAML: meta-learning whose two learning rates adapt online, on any number of GPUs.

The public door:
    train           learn an initialisation, from a module or a name and tasks; returns the run
    load            a trained run as a learner with fit and predict
    meta_gradient   the exact meta-gradient of a batch of tasks
    wrap            a module whose .grad becomes that meta-gradient, for a loop of one's own
    ClassTasks      N-way tasks from a torch Dataset with labels, a DataLoader, or a Hugging Face dataset
    rules           the rules for alpha and beta as init and update
    InputError      what a wrong argument raises

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
    from alpha_maml import rules
    from alpha_maml.data.adapters import ClassTasks
    from alpha_maml.errors import InputError
    from alpha_maml.launch.api import train
    from alpha_maml.launch.wrap import meta_gradient, wrap
    from alpha_maml.trainer.learner import load

__all__ = ["ClassTasks", "InputError", "load", "meta_gradient", "rules", "train", "wrap"]
PLACES = {  # imported when asked for
    "ClassTasks": "alpha_maml.data.adapters", "InputError": "alpha_maml.errors", "load": "alpha_maml.trainer.learner",
    "meta_gradient": "alpha_maml.launch.wrap", "train": "alpha_maml.launch.api", "wrap": "alpha_maml.launch.wrap"}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "rules":
        return import_module("alpha_maml.rules")
    if name in PLACES:
        return getattr(import_module(PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
