"""Plain MAML: the rates stay."""
from __future__ import annotations

from alpha_maml.trainer.core.rules.rule import Rates, Rule, Signals


class Fixed(Rule):
    """alpha and beta as they start (Finn et al. 2017)."""

    def update(self, rates: Rates, signals: Signals) -> Rates:
        return rates
