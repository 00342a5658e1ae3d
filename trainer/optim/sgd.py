"""The paper's outer optimiser."""
from __future__ import annotations

from torch import Tensor

from alpha_maml.trainer.core.algebra import Params
from alpha_maml.trainer.optim.optimizer import Optimizer, State


class SGD(Optimizer):
    """The direction is the meta-gradient itself."""

    radius = 0.03  # about sqrt(10) times the others', whose momentum keeps one direction for ten steps

    def update(self, gradients: Params, state: State, params: Params, count: Tensor) -> tuple[Params, State]:
        return gradients, state
