"""What every rule for the rates is: its input, its output, and what it may leave as it is."""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CUT = 2.0  # divides a rate that made an iteration useless


class Rates(NamedTuple):
    """The rates and what the rule remembers: float64."""

    alpha: Tensor  # of the next adaptation; its shape is inner.alpha_sizes
    beta: Tensor  # scalar, as last applied
    memory: dict[str, Tensor]


class Signals(NamedTuple):
    """What an iteration says about the rates, float64. Sums or means over tasks, as task.reduction says. Those of alpha have
    its shape, the others are scalars."""

    loss: Tensor  # of the queries
    support_loss: Tensor  # before adaptation
    alpha_gradient: Tensor  # sum of A_b
    alignment_norm: Tensor  # sum of |grad L_te| |sum_k g_k|
    radius: Tensor  # the relative step from which beta starts; 0 where theta's steps are not relative
    squared_norm: Tensor  # |S_t|^2
    product: Tensor  # <S_t, direction applied last>
    norms: Tensor  # |S_t| |direction applied last|


class Rule:
    """A rule for alpha and beta; a subclass needs `update` alone. Its arguments are the keys of the section `rates` that have
    their names."""

    def init(self, alpha: Tensor, beta: Tensor) -> Rates:
        """The state before the first iteration, from the starting rates."""
        return Rates(alpha, beta, {})

    def update(self, rates: Rates, signals: Signals) -> Rates:
        """beta for this iteration's step of theta, and alpha for the next iteration's adaptation."""
        raise NotImplementedError

    def accepts(self, signals: Signals) -> Tensor:
        """Whether theta may move on this iteration (bool), beyond that its numbers are finite."""
        return torch.ones_like(signals.loss, dtype=torch.bool)

    def moves(self, rates: Rates, signals: Signals) -> Tensor:
        """Whether theta moves on an iteration that began at these rates (bool); the rates move all the same."""
        return torch.ones_like(rates.beta, dtype=torch.bool)

    def undone(self, rates: Rates) -> Rates:
        """The rates after an iteration that moved nothing."""
        return rates

    def cut(self, rate: Tensor) -> Tensor:
        """A rate that was too large."""
        return rate / CUT
