"""Adam (Kingma and Ba 2015)."""
from __future__ import annotations

import torch
from torch import Tensor

from alpha_maml.trainer.core.algebra import Params
from alpha_maml.trainer.optim.optimizer import Optimizer, State

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8


class Adam(Optimizer):
    """Moments with bias correction, in torch.optim's constants."""

    memory = ("mean", "square")

    def update(self, gradients: Params, state: State, params: Params, count: Tensor) -> tuple[Params, State]:
        new: State = {"mean": {}, "square": {}}
        directions = {}
        for name, gradient in gradients.items():
            mean = torch.lerp(state["mean"][name], gradient, 1 - BETA_1)
            square = torch.lerp(state["square"][name], gradient * gradient, 1 - BETA_2)
            scaled = (mean / (1 - BETA_1**count)) / ((square / (1 - BETA_2**count)).sqrt() + EPSILON)
            directions[name], new["mean"][name], new["square"][name] = scaled.to(gradient.dtype), mean, square
        return directions, new
