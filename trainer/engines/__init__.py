"""Who holds theta, and where ranks meet.

Belongs here: everything that knows a process group. May import: `alpha_maml.errors`, `trainer.core`, `trainer.optim`.
Offers: ENGINES (here, without torch), `engine.Engine`, `collective.World`.

The facts: "float32" holds theta in that type alone; "replicated" on every rank, so that an
iteration can be captured as a CUDA graph and mapped over runs.
"""
from __future__ import annotations

from alpha_maml.registry import Registry

ENGINES = Registry("engine.name")
ENGINES.register("torch", "alpha_maml.trainer.engines.replicated:ReplicatedEngine", "replicated")
ENGINES.register("deepspeed", "alpha_maml.trainer.engines.deepspeed:ZeroEngine", "float32")
