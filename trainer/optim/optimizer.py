"""What every outer optimiser is."""
from __future__ import annotations

import torch
from torch import Tensor

from alpha_maml.trainer.core.algebra import Params

State = dict[str, Params]  # by what is remembered, then by tensor


class Optimizer:
    """From the meta-gradient to the direction of theta's step, theta <- theta - beta direction; a subclass needs `update`.

    Args:
        weight_decay: outer.weight_decay. Where `decoupled`, `update` adds it to the direction; elsewhere it is part of the
            gradients already.
    """

    radius = 0.01  # the relative step of a tensor from which beta starts, under a rule that makes steps relative
    decoupled = False  # of weight decay
    whole = False  # needs theta's tensors, where pieces of them will not do
    memory: tuple[str, ...] = ()  # what is remembered of each tensor, zeros at first

    def __init__(self, weight_decay: float = 0.0):
        self.weight_decay = weight_decay

    def init(self, params: Params) -> State:
        """The state before the first step."""
        return {part: {name: torch.zeros_like(p) for name, p in params.items()} for part in self.memory}

    def update(self, gradients: Params, state: State, params: Params, count: Tensor) -> tuple[Params, State]:
        """The direction and the new state; nothing is written in place.

        Args:
            gradients, params: the same names and shapes.
            count: which step this is, from 1: float64 scalar.
        """
        raise NotImplementedError
