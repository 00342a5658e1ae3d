"""The rules for alpha and beta. Pure: small tensors in, small tensors out, nothing waits for the host.

    fixed     plain MAML: the rates stay.
    paper     Algorithm 2 of Behl, Baydin, Torr 2019 to the letter, unclamped:
              beta_t = beta_{t-1} + beta_hyperlr <S_t, S_{t-1}>, alpha_{t+1} = alpha_t - alpha_hyperlr sum_b A_b.
    adaptive  the same two hypergradients as cosines, so that neither the loss's scale nor sum or mean matters, moving the
              logarithms of the rates, so that they stay positive and cross decades.

Equations 4, 6 and 7 of the paper print the factor of each product twice; equations 3 and 5 are meant.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trainer import keys
from trainer.maml import MetaGradient
from trainer.outer import trust_of

MEAN_DECAY, SQUARE_DECAY = 0.9, 0.99
FLOOR = 0.03  # added to a signal's root mean square: pure noise of that size moves a rate slowly
WORSE = 2.0  # an adaptation that multiplies the loss by this much is undone
CUT = 2.0  # and alpha divided by this
REACH = 0.1  # the share of the loss that adaptation must be able to change, to first order, and that it starts with
TINY = torch.finfo(torch.float64).tiny
LARGEST = 1e30  # a rate or a step of theta above this is as good as infinite: float32 ends at 3e38


class Rates(NamedTuple):
    """alpha for the next adaptation, beta as last applied, and the adaptive rule's moments: float64, alpha and its moments of
    the shape that trainer.inner says, all else scalars."""

    alpha: Tensor
    beta: Tensor
    alpha_mean: Tensor
    alpha_square: Tensor
    beta_mean: Tensor
    beta_square: Tensor
    count: Tensor  # signals averaged so far


class Total(NamedTuple):
    """What all ranks know of an iteration's meta-gradient S_t, in the convention of task.reduction; float64 scalars."""

    sums: MetaGradient  # of loss, accuracy, hypergradient, ...: sums over the global batch; `gradient` is left out ({})
    squared_norm: Tensor  # |S_t|^2
    product: Tensor  # <S_t, direction applied last>
    previous_squared: Tensor  # |direction applied last|^2
    stopping: Tensor  # how many ranks were asked to stop


class Signals(NamedTuple):
    """What an iteration says about the rates; sums or means over tasks, as task.reduction says. Those of alpha have its
    shape, the others are scalars."""

    loss: Tensor  # sum of the query losses
    alpha_gradient: Tensor  # sum of A_b
    alignment_norm: Tensor  # sum of |grad L_te| |sum_k g_k|
    polyak: Tensor  # loss / |S_t|^2, the beta that would take the loss to zero to first order (Polyak 1969); 0 where no trust
    # region bounds it, and where the direction is Adam's
    product: Tensor  # <S_t, direction applied last>
    norms: Tensor  # |S_t| |direction applied last|


def initial(settings: keys.Rates, device: torch.device, sizes: tuple[int, ...] = ()) -> Rates:
    """All of alpha, of shape `sizes`, starts at rates.alpha."""
    def filled(value: float, sizes: tuple[int, ...] = ()) -> Tensor:
        return torch.full(sizes, value, dtype=torch.float64, device=device)

    moments = filled(0.0, sizes), filled(0.0, sizes), filled(0.0), filled(0.0)
    return Rates(filled(settings.alpha, sizes), filled(settings.beta), *moments, filled(0.0))


def signals(config: keys.Config, total: Total) -> tuple[Signals, Tensor]:
    """An iteration's signals, in the convention of task.reduction, and whether it is usable (bool): its numbers are finite and,
    under rule adaptive, adapting did not make the loss WORSE than not adapting."""
    usable = torch.isfinite(total.sums.loss) & torch.isfinite(total.squared_norm)
    if config.rates.rule == "adaptive":
        usable &= total.sums.loss <= WORSE * total.sums.support_loss
    count = config.task.batch if config.task.reduction == "mean" else 1
    loss, alpha_gradient, alignment_norm = (
        x / count for x in (total.sums.loss, total.sums.alpha_gradient, total.sums.alignment_norm))
    bounded = config.outer.optimizer == "sgd" and trust_of(config) > 0
    polyak = loss.abs() / total.squared_norm.clamp(min=TINY) if bounded else torch.zeros_like(loss)
    norms = (total.squared_norm * total.previous_squared).sqrt()
    return Signals(loss, alpha_gradient, alignment_norm, polyak, total.product, norms), usable


def update(settings: keys.Rates, rates: Rates, signals: Signals, usable: Tensor) -> Rates:
    """beta for this iteration's step of theta and alpha for the next iteration's adaptation.

    An iteration that is not usable moves no rate; under rule adaptive it divides alpha by CUT.
    """
    if settings.rule == "fixed":
        return rates
    if settings.rule == "paper":
        moved = rates._replace(
            beta=rates.beta + settings.beta_hyperlr * signals.product,
            alpha=rates.alpha - settings.alpha_hyperlr * signals.alpha_gradient,
        )
    else:
        moved = _adaptive(settings, rates, signals)
    return Rates(*(torch.where(usable, a, b) for a, b in zip(moved, _undone(settings, rates))))


def _undone(settings: keys.Rates, rates: Rates) -> Rates:
    """The rates after an iteration that is not usable."""
    return rates._replace(alpha=_cut(settings, rates.alpha)) if settings.rule == "adaptive" else rates


def _cut(settings: keys.Rates, rate: Tensor) -> Tensor:
    return (rate / CUT).clamp(min=settings.minimum) if settings.rule == "adaptive" else rate / CUT


def guarded(config: keys.Config, rates: Rates, total: Total, signals: Signals,
            usable: Tensor) -> tuple[Rates, Tensor, Tensor]:
    """`update` where every number is finite: the loss, the gradient, the new rates, and the step that theta would take. The
    rates to go on with, whether theta may move, and whether all is finite (bools).

    An iteration that is not finite never moves theta; config.on_nonfinite says what it does to the rates.
    """
    new = update(config.rates, rates, signals, usable)
    step = new.beta.abs() * total.squared_norm.sqrt().clamp(min=1)
    finite = torch.isfinite(torch.cat([total.sums.loss.view(1), *(x.flatten() for x in new)])).all() & (step < LARGEST)
    settings, otherwise = config.rates, _undone(config.rates, rates)
    if config.on_nonfinite == "halve":
        otherwise = rates._replace(alpha=_cut(settings, rates.alpha), beta=_cut(settings, rates.beta))
    return Rates(*(torch.where(finite, a, b) for a, b in zip(new, otherwise))), usable & finite, finite


def _adaptive(settings: keys.Rates, rates: Rates, signals: Signals) -> Rates:
    count = rates.count + 1
    alpha_signal = -signals.alpha_gradient / signals.alignment_norm.clamp(min=TINY)
    # Successive meta-gradients oppose each other slightly at every useful beta, because each sees the last one's noise
    # (short-horizon bias); only opposition beyond `tolerance` says that theta overshoots.
    beta_signal = signals.product / signals.norms.clamp(min=TINY) + settings.tolerance

    alpha_mean, alpha_square, alpha_step = _moments(rates.alpha_mean, rates.alpha_square, alpha_signal, count)
    beta_mean, beta_square, beta_step = _moments(rates.beta_mean, rates.beta_square, beta_signal, count)
    # Below some rate adaptation changes nothing that could tell a good alpha from a better one, and theta would learn to do
    # without it. |alpha sum_b A_b| <= alpha alignment_norm says where that is, in units of the loss, free of noise. An
    # alpha too large at the start would bend theta's first steps, the longest, for good.
    reach = (rates.alpha * signals.alignment_norm).sum() / signals.loss.abs().clamp(min=TINY)
    scale = torch.where(reach > 0, REACH / reach, 1.0)
    scale = torch.where(count == 1, scale, scale.clamp(min=1.0))
    alpha = rates.alpha * torch.exp(settings.kappa * alpha_step) * scale
    beta = rates.beta * torch.exp(settings.kappa * beta_step)
    # beta starts where the trust region takes over, wherever it was: a climb would use up the steps in which it is open.
    beta = torch.where((count == 1) & (signals.polyak > 0), signals.polyak, beta)
    bounds = (settings.minimum, settings.maximum)
    return Rates(alpha.clamp(*bounds), beta.clamp(*bounds), alpha_mean, alpha_square, beta_mean, beta_square, count)


def _moments(mean: Tensor, square: Tensor, signal: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The running mean and square (Adam's, Kingma and Ba 2015), and the cube of their bias-corrected ratio, in about [-1, 1]:
    nearly all of a step while the signal's sign is steady, next to nothing while it is noise."""
    mean = MEAN_DECAY * mean + (1 - MEAN_DECAY) * signal
    square = SQUARE_DECAY * square + (1 - SQUARE_DECAY) * signal**2
    centre, power = mean / (1 - MEAN_DECAY**count), square / (1 - SQUARE_DECAY**count)
    return mean, square, (centre / (power.sqrt() + FLOOR)) ** 3
