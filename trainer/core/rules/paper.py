"""Algorithm 2 of Behl, Baydin, Torr 2019 to the letter, unclamped."""
from __future__ import annotations

from dataclasses import dataclass

from alpha_maml.trainer.core.rules.rule import Rates, Rule, Signals


@dataclass(frozen=True)
class Paper(Rule):
    """beta_t = beta_{t-1} + beta_hyperlr <S_t, S_{t-1}>,  alpha_{t+1} = alpha_t - alpha_hyperlr sum_b A_b.

    Equations 4, 6 and 7 of the paper print the factor of each product twice; equations 3 and 5 are meant.
    """

    alpha_hyperlr: float = 1e-3
    beta_hyperlr: float = 1e-3

    def update(self, rates: Rates, signals: Signals) -> Rates:
        return rates._replace(beta=rates.beta + self.beta_hyperlr * signals.product,
                              alpha=rates.alpha - self.alpha_hyperlr * signals.alpha_gradient)
