"""What every engine does, and the sums that an iteration needs beside the gradient."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from alpha_maml.trainer.core.algebra import Params
from alpha_maml.trainer.core.decide import Total
from alpha_maml.trainer.core.sweep import MetaGradient
from alpha_maml.trainer.engines.collective import World
from alpha_maml.trainer.optim.step import OuterStep


class Engine(Protocol):
    """Holds theta and what its step remembers. An iteration calls `theta`, `reduce` and `apply`, in this order."""

    @classmethod
    def build(cls, theta: Mapping[str, Tensor], outer: OuterStep, count: int, world: World, zero_stage: int) -> Engine:
        """The engine of a run; its arguments are those of ReplicatedEngine, and engine.zero_stage."""
        ...

    def theta(self) -> Params:
        """theta in full, for this iteration's adaptation: detached, valid until the next `apply`."""
        ...

    def learned(self) -> Params:
        """What has been learned, for evaluation: theta's average, or theta where none is kept. Every rank must call."""
        ...

    def reduce(self, local: MetaGradient, stop: Tensor) -> Total:
        """Sums the shards' meta-gradients over all ranks. `stop`: 1 where this rank was asked to stop, else 0."""
        ...

    def apply(self, total: Total, beta: Tensor, usable: Tensor) -> None:
        """Moves theta by one step of size beta (float64 scalar), or leaves everything as it is where not `usable` (bool)."""
        ...

    def state(self) -> dict[str, Tensor]:
        """theta and what its step remembers under the names of core.names: in full, on rank 0 at least. Every rank must call.
        The tensors are never written to again."""
        ...

    def load(self, state: dict[str, Tensor]) -> None:
        """The inverse; `state` is the same on every rank."""
        ...


def packed(local: MetaGradient, stop: Tensor, dtype: torch.dtype) -> Tensor:
    """What an iteration sums beside the gradient, as one vector."""
    return torch.cat([x.to(dtype).flatten() for x in (*tree_leaves(local[1:]), stop)])


def unpacked(vector: Tensor, like: MetaGradient) -> tuple[MetaGradient, Tensor]:
    """The sums, in the shapes of `like`, and how many ranks were asked to stop."""
    leaves, spec = tree_flatten(like._replace(gradient={}))
    *values, stopping = vector.double().split([*(x.numel() for x in leaves), 1])
    return tree_unflatten([value.view(x.shape) for value, x in zip(values, leaves)], spec), stopping[0]
