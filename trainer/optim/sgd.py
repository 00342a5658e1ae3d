"""The paper's outer optimiser."""
from __future__ import annotations

from torch import Tensor

from alpha_maml.trainer.core.algebra import Params
from alpha_maml.trainer.optim.optimizer import Optimizer, State


class SGD(Optimizer):
    """The direction is the meta-gradient itself."""

    along_gradient = True
    trust = 0.2  # sqrt(10) times Adam's, whose momentum keeps one direction for ten steps

    def update(self, gradients: Params, state: State, params: Params, count: Tensor) -> tuple[Params, State]:
        return gradients, state
