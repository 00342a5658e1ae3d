"""The default rule: the paper's two hypergradients as cosines, moving the logarithms of the rates (docs/rates-study.md)."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alpha_maml.trainer.core.rules.rule import CUT, Rates, Rule, Signals

MEAN_DECAY, SQUARE_DECAY = 0.9, 0.99
FLOOR = 0.03  # added to a signal's root mean square: pure noise of that size moves a rate slowly
WORSE = 2.0  # an adaptation that multiplies the loss by this much is undone
REACH = 0.1  # the share of the loss that adaptation must be able to change, to first order, and that it starts with
TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Adaptive(Rule):
    """Both hypergradients as cosines, so that neither the loss's scale nor sum or mean matters, moving log alpha and log beta,
    so that the rates stay positive and cross decades.

    Args:
        kappa: largest step of log alpha and log beta per iteration.
        tolerance: opposition of successive meta-gradients, as a cosine, that beta endures.
        minimum, maximum: bounds of both rates.

    >>> rule, one = Adaptive(kappa=0.5), torch.ones((), dtype=torch.float64)
    >>> rates = rule.init(alpha=0.01 * one, beta=0.001 * one)
    >>> signals = Signals(loss=2 * one, support_loss=3 * one, alpha_gradient=-0.5 * one, alignment_norm=one, polyak=0 * one,
    ...                   squared_norm=one, product=0.5 * one, norms=one)
    >>> rates = rule.update(rates, signals)
    >>> round(float(rates.alpha), 3), round(float(rates.beta), 5)
    (0.304, 0.00159)
    """

    kappa: float = 0.5
    tolerance: float = 0.6
    minimum: float = 1e-6
    maximum: float = 1e3

    def init(self, alpha: Tensor, beta: Tensor) -> Rates:
        moments = {"alpha_mean": alpha, "alpha_square": alpha, "beta_mean": beta, "beta_square": beta, "count": beta}
        return Rates(alpha, beta, {name: torch.zeros_like(like) for name, like in moments.items()})

    def accepts(self, signals: Signals) -> Tensor:
        """Whether adapting did not make the loss WORSE than not adapting."""
        return signals.loss <= WORSE * signals.support_loss

    def undone(self, rates: Rates) -> Rates:
        return rates._replace(alpha=self.cut(rates.alpha))

    def cut(self, rate: Tensor) -> Tensor:
        return (rate / CUT).clamp(min=self.minimum)

    def update(self, rates: Rates, signals: Signals) -> Rates:
        memory, count = rates.memory, rates.memory["count"] + 1
        alpha_signal = -signals.alpha_gradient / signals.alignment_norm.clamp(min=TINY)
        # Successive meta-gradients oppose each other slightly at every useful beta, because each sees the last one's noise
        # (short-horizon bias); only opposition beyond `tolerance` says that theta overshoots.
        beta_signal = signals.product / signals.norms.clamp(min=TINY) + self.tolerance

        alpha_mean, alpha_square, alpha_step = _moments(memory["alpha_mean"], memory["alpha_square"], alpha_signal, count)
        beta_mean, beta_square, beta_step = _moments(memory["beta_mean"], memory["beta_square"], beta_signal, count)
        # Below some rate adaptation changes nothing that could tell a good alpha from a better one, and theta would learn to do
        # without it. |alpha sum_b A_b| <= alpha alignment_norm says where that is, in units of the loss, free of noise. An
        # alpha too large at the start would bend theta's first steps, the longest, for good.
        reach = (rates.alpha * signals.alignment_norm).sum() / signals.loss.abs().clamp(min=TINY)
        scale = torch.where(reach > 0, REACH / reach, 1.0)
        scale = torch.where(count == 1, scale, scale.clamp(min=1.0))
        alpha = rates.alpha * torch.exp(self.kappa * alpha_step) * scale
        beta = rates.beta * torch.exp(self.kappa * beta_step)
        # beta starts where the trust region takes over, wherever it was: a climb would use up the steps in which it is open.
        beta = torch.where((count == 1) & (signals.polyak > 0), signals.polyak, beta)
        bounds = (self.minimum, self.maximum)
        return Rates(alpha.clamp(*bounds), beta.clamp(*bounds), {
            "alpha_mean": alpha_mean, "alpha_square": alpha_square, "beta_mean": beta_mean, "beta_square": beta_square,
            "count": count})


def _moments(mean: Tensor, square: Tensor, signal: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The running mean and square (Adam's, Kingma and Ba 2015), and the cube of their bias-corrected ratio, in about [-1, 1]:
    nearly all of a step while the signal's sign is steady, next to nothing while it is noise."""
    mean = MEAN_DECAY * mean + (1 - MEAN_DECAY) * signal
    square = SQUARE_DECAY * square + (1 - SQUARE_DECAY) * signal**2
    centre, power = mean / (1 - MEAN_DECAY**count), square / (1 - SQUARE_DECAY**count)
    return mean, square, (centre / (power.sqrt() + FLOOR)) ** 3
