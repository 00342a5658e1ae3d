"""AdamW (Loshchilov and Hutter 2019)."""
from __future__ import annotations

import torch
from torch import Tensor

from alpha_maml.trainer.core.algebra import Params
from alpha_maml.trainer.optim.adam import Adam
from alpha_maml.trainer.optim.optimizer import State


class AdamW(Adam):
    """Adam, with the weight decay beside its direction instead of in the gradient."""

    decoupled = True

    def update(self, gradients: Params, state: State, params: Params, count: Tensor) -> tuple[Params, State]:
        directions, state = super().update(gradients, state, params, count)
        return {name: torch.add(d, params[name], alpha=self.weight_decay) for name, d in directions.items()}, state
