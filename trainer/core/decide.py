"""From an iteration's sums to its decision: the next rates, and whether theta may move. Pure; nothing waits for the host."""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from alpha_maml.trainer.core.algebra import Params
from alpha_maml.trainer.core.rules.rule import Rates, Rule, Signals
from alpha_maml.trainer.core.sweep import MetaGradient

LARGEST = 1e30  # a rate or a step of theta above this is as good as infinite: float32 ends at 3e38


class Total(NamedTuple):
    """What all ranks know of an iteration's meta-gradient S_t, in the convention of task.reduction; float64 scalars."""

    sums: MetaGradient  # of loss, accuracy, hypergradient, ...: sums over the global batch; its `gradient` is left out ({})
    squared_norm: Tensor  # |S_t|^2
    product: Tensor  # <S_t, direction applied last>
    previous_squared: Tensor  # |direction applied last|^2
    stopping: Tensor  # how many ranks were asked to stop
    gradient: Params  # S_t, in the pieces in which the engine holds theta


class Decision(NamedTuple):
    rates: Rates  # beta of this iteration's step, alpha of the next adaptation
    usable: Tensor  # bool: theta may move, as far as the numbers go
    finite: Tensor  # bool: every number of the iteration is finite


def signals(total: Total, count: int, radius: float) -> Signals:
    """The signals of an iteration.

    Args:
        total: the sums over the global batch.
        count: what they are divided by: the number of tasks where task.reduction is mean, else 1.
        radius: the relative step from which beta starts; 0 where theta's steps are not relative.
    """
    loss, support_loss, alpha_gradient, alignment_norm = (x / count for x in (
        total.sums.loss, total.sums.support_loss, total.sums.alpha_gradient, total.sums.alignment_norm))
    norms = (total.squared_norm * total.previous_squared).sqrt()
    return Signals(loss, support_loss, alpha_gradient, alignment_norm, torch.full_like(loss, radius), total.squared_norm,
                   total.product, norms)


def decide(rule: Rule, rates: Rates, signals: Signals, on_nonfinite: str = "skip") -> Decision:
    """Lets the rule move the rates where every number is finite: the loss, the gradient, the new rates, and the step that theta
    would take. An iteration that is not finite never moves theta; `on_nonfinite` says what it does to the rates."""
    usable = torch.isfinite(signals.loss) & torch.isfinite(signals.squared_norm) & rule.accepts(signals)
    undone = rule.undone(rates)
    new = _where(usable, rule.update(rates, signals), undone)
    step = new.beta.abs() * signals.squared_norm.sqrt().clamp(min=1)
    numbers = (signals.loss, new.alpha, new.beta, *new.memory.values())
    finite = torch.isfinite(torch.cat([x.flatten() for x in numbers])).all() & (step < LARGEST)
    if on_nonfinite == "halve":
        undone = rates._replace(alpha=rule.cut(rates.alpha), beta=rule.cut(rates.beta))
    return Decision(_where(finite, new, undone), usable & finite, finite)


def _where(condition: Tensor, a: Rates, b: Rates) -> Rates:
    return Rates(torch.where(condition, a.alpha, b.alpha), torch.where(condition, a.beta, b.beta),
                 {name: torch.where(condition, x, b.memory[name]) for name, x in a.memory.items()})
