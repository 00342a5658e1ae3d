"""The default rule: the paper's two hypergradients as cosines, moving the logarithms of the rates (docs/rates-study.md)."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alpha_maml.trainer.core.rules.rule import CUT, Rates, Rule, Signals

MEAN_DECAY, SQUARE_DECAY = 0.9, 0.99
FLOOR = 0.03  # added to a signal's root mean square: pure noise of that size moves a rate slowly
SLOWER = 0.1  # the step of log beta beside that of log alpha: beta's effect shows over many iterations
HORIZON = 20  # iterations after which log beta moves by the logarithm of their number: in all decades of a run alike
FIRST_CUT = 10.0  # divides an alpha that made the first iterations useless
WORSE = 10.0  # an adaptation that multiplies the loss by this much exploded, and is undone
START, REACH = 0.01, 0.1  # shares of the loss that adaptation can change, to first order: at first, and where lifting ends
TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Adaptive(Rule):
    """Both hypergradients as cosines, so that neither the loss's scale nor sum or mean matters, moving log alpha and log beta,
    so that the rates stay positive and cross decades.

    Args:
        kappa: largest step of log alpha per iteration; of log beta a tenth, which falls as 1 / (1 + t / HORIZON).
        tolerance: opposition of successive meta-gradients, as a cosine, that beta endures.
        minimum, maximum: bounds of both rates.

    >>> rule, one = Adaptive(kappa=0.5), torch.ones((), dtype=torch.float64)
    >>> rates = rule.init(alpha=0.01 * one, beta=0.001 * one)
    >>> signals = Signals(loss=2 * one, support_loss=3 * one, alpha_gradient=-0.5 * one, alignment_norm=one, radius=0 * one,
    ...                   squared_norm=one, product=0.5 * one, norms=one)
    >>> rates = rule.update(rule.update(rates, signals), signals)  # the first only places alpha
    >>> round(float(rates.alpha), 3), round(float(rates.beta), 5)
    (0.03, 0.00105)
    """

    kappa: float = 0.5
    tolerance: float = 0.0
    minimum: float = 1e-6
    maximum: float = 1e3

    def init(self, alpha: Tensor, beta: Tensor) -> Rates:
        like = {"alpha_norm": alpha, "alpha_mean": alpha, "alpha_square": alpha, "beta_mean": beta, "beta_square": beta,
                "count": beta}
        return Rates(alpha, beta, {name: torch.zeros_like(t) for name, t in like.items()})

    def accepts(self, signals: Signals) -> Tensor:
        """Whether adapting did not make the loss WORSE than not adapting."""
        return signals.loss <= WORSE * signals.support_loss

    def undone(self, rates: Rates) -> Rates:
        # Before the first iteration that counts, which says where alpha begins, it is only to come down from where it was.
        factor = torch.where(rates.memory["count"] == 0, FIRST_CUT, CUT)
        return rates._replace(alpha=(rates.alpha / factor).clamp(min=self.minimum))

    def cut(self, rate: Tensor) -> Tensor:
        return (rate / CUT).clamp(min=self.minimum)

    def moves(self, rates: Rates, signals: Signals) -> Tensor:
        """Not on the first iteration, whose gradient was taken at an alpha that nobody chose well."""
        return (rates.memory["count"] > 0) | (signals.radius == 0)

    def update(self, rates: Rates, signals: Signals) -> Rates:
        memory, count = rates.memory, rates.memory["count"] + 1
        first, looks = count == 1, (count - 1).clamp(min=1)
        # In units of what is usual, not of this iteration: one in which adaptation went wrong weighs more than the others.
        alpha_norm = _mean(memory["alpha_norm"], signals.alignment_norm, first)
        usual = alpha_norm / (1 - MEAN_DECAY**looks)
        alpha_mean, alpha_square, centre, size = _moments(
            memory["alpha_mean"], memory["alpha_square"], -signals.alpha_gradient / usual.clamp(min=TINY), first, looks)
        # Nearly all of a step while the signal's sign is steady, next to nothing while it is noise.
        log_alpha = self.kappa * (centre / (size + FLOOR)) ** 3
        alpha = rates.alpha * torch.exp(log_alpha) * self._placed(rates, signals, count, centre)

        beta_signal = signals.product / signals.norms.clamp(min=TINY) + self.tolerance
        beta_mean, beta_square, centre, size = _moments(memory["beta_mean"], memory["beta_square"], beta_signal, first, looks)
        # beta's effect lasts, so what a signal is worth falls with the iterations: log beta moves by the log of their number.
        log_beta = self.kappa * SLOWER / (1 + count / HORIZON) * centre / size.clamp(min=TINY)
        beta = torch.where(first & (signals.radius > 0), signals.radius, rates.beta * torch.exp(log_beta))
        bounds = (self.minimum, self.maximum)
        return Rates(alpha.clamp(*bounds), beta.clamp(*bounds), {
            "alpha_norm": alpha_norm, "alpha_mean": alpha_mean, "alpha_square": alpha_square, "beta_mean": beta_mean,
            "beta_square": beta_square, "count": count})

    def _placed(self, rates: Rates, signals: Signals, count: Tensor, centre: Tensor) -> Tensor:
        """What alpha is multiplied by so that adaptation can change the loss.

        Below some rate adaptation changes nothing that could tell a good alpha from a better one, and theta would learn to do
        without it. |alpha sum_b A_b| <= alpha alignment_norm says where that is, in units of the loss, free of noise. The first
        iteration puts alpha where that share is START, and the second does so anew from there; later it is lifted towards
        REACH, as long as the hypergradient does not say that a larger alpha would harm.
        """
        share = (rates.alpha * signals.alignment_norm).sum() / signals.loss.abs().clamp(min=TINY)
        to_start = torch.where(share > 0, START / share, 1.0)
        lift = torch.where(share > 0, REACH / share, 1.0).clamp(min=1.0)
        lift = torch.minimum(lift, torch.exp(self.kappa * torch.ones_like(lift)))
        harms = (rates.alpha * centre).sum() < 0
        return torch.where(count <= 2, to_start, torch.where(harms, 1.0, lift))


def _mean(mean: Tensor, value: Tensor, first: Tensor) -> Tensor:
    """The running mean; the first iteration, at an alpha that nobody chose well, stays out."""
    return torch.where(first, 0.0, MEAN_DECAY * mean + (1 - MEAN_DECAY) * value)


def _moments(mean: Tensor, square: Tensor, signal: Tensor, first: Tensor,
             looks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The running mean and square (Adam's, Kingma and Ba 2015), and both without their bias towards zero, the latter's root."""
    mean = _mean(mean, signal, first)
    square = torch.where(first, 0.0, SQUARE_DECAY * square + (1 - SQUARE_DECAY) * signal**2)
    return mean, square, mean / (1 - MEAN_DECAY**looks), (square / (1 - SQUARE_DECAY**looks)).sqrt()
