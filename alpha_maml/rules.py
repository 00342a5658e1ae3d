"""The rules for alpha and beta in a loop of one's own.

    >>> import torch
    >>> from alpha_maml import rules
    >>> theta = {"weight": torch.zeros(3)}
    >>> state = rules.adaptive(kappa=0.2).init(theta, alpha=0.01, beta=0.1)
    >>> float(state.alpha), float(state.beta)
    (0.01, 0.1)
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from alpha_maml.errors import InputError
from alpha_maml.trainer.core.rules.adaptive import Adaptive
from alpha_maml.trainer.core.rules.fixed import Fixed
from alpha_maml.trainer.core.rules.paper import Paper
from alpha_maml.trainer.core.rules.rule import Rates, Rule, Signals

__all__ = ["Rates", "Signals", "adaptive", "fixed", "paper"]


class LoopRule:
    """A rule with its settings; called with others, the same rule with those."""

    def __init__(self, rule: Any):
        self.rule: Rule = rule

    def __call__(self, **settings: float) -> LoopRule:
        try:
            return LoopRule(replace(self.rule, **settings) if settings else self.rule)  # pyright: ignore[reportArgumentType]
        except TypeError as error:
            raise InputError(f"rules: {error}; the settings are those of {type(self.rule).__name__}") from None

    def init(self, theta: Mapping[str, Tensor], alpha: float | Tensor = 0.01, beta: float = 0.001) -> Rates:
        """The state before the first iteration.

        Args:
            theta: parameters by name, for their device.
            alpha: inner rate: a number, or a tensor of what the inner loop multiplies gradients by.
            beta: meta rate.
        """
        device = next(iter(theta.values())).device
        start = torch.as_tensor(alpha, dtype=torch.float64, device=device)
        return self.rule.init(start.clone(), torch.tensor(beta, dtype=torch.float64, device=device))

    def update(self, state: Rates, signals: Signals) -> tuple[Rates, Rates]:
        """(the new state, the rates to use): beta for this iteration's step of theta, alpha for the next adaptation."""
        accepted = bool(self.rule.accepts(signals))
        new = self.rule.update(state, signals) if accepted else self.rule.undone(state)
        return new, new


adaptive, paper, fixed = LoopRule(Adaptive()), LoopRule(Paper()), LoopRule(Fixed())
