"""theta's step: the outer optimisers, one a file, and the one step that every engine takes.

Belongs here: functions of named tensors. A name stands for one of theta's tensors, or for a piece of several in an engine that
holds theta flat or in shards. May import: `alpha_maml.registry`, `trainer.core`.
Offers: OPTIMIZERS (here, without torch; one line adds an optimiser), `optimizer.Optimizer`, `step.OuterStep`.
"""
from __future__ import annotations

from alpha_maml.registry import Registry

OPTIMIZERS = Registry("outer.optimizer")
OPTIMIZERS.register("sgd", "alpha_maml.trainer.optim.sgd:SGD")
OPTIMIZERS.register("adam", "alpha_maml.trainer.optim.adam:Adam")
OPTIMIZERS.register("adamw", "alpha_maml.trainer.optim.adamw:AdamW")
OPTIMIZERS.register("muon", "alpha_maml.trainer.optim.muon:Muon")
