"""theta's step: the paper's SGD, or Adam (Kingma and Ba 2015), under an optional trust region."""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trainer.inner import Params
from trainer.keys import Config

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8
NORM_FLOOR = 0.1  # a tensor that starts at zero may still move
TRUST = {"sgd": 0.2, "adam": 0.06}  # Adam's momentum keeps one direction for ten steps: sqrt(10) times as far as noise goes
TRUST_STEPS = 20  # after which the trust region begins to shrink, as the root of the steps
WARM_STEPS = 20  # in which it opens, as their cube: alpha finds its place before theta moves far
AVERAGED = 4  # the average weighs step t as t^AVERAGED does: about the last fifth of all steps
PULL = 0.5  # how far theta lies from the point that walks towards that point's average


class Outer(NamedTuple):
    """What theta's step remembers. `previous` is the direction applied last (the walker moved by -beta previous): the factor
    of beta's next hypergradient, as hypergradient descent has it for any optimiser (Baydin et al. 2018)."""

    previous: Params
    mean: Params  # Adam's moments; empty under SGD
    square: Params
    average: Params  # of the point that walks, which evaluation uses; empty where it is not wanted
    count: Tensor  # steps taken, float64 scalar


def initial(theta: Params, config: Config) -> Outer:
    memory = {name: {n: torch.zeros_like(p) for n, p in theta.items()} for name in parts(config)}
    if "average" in memory:
        memory["average"] = dict(theta)
    count = torch.zeros((), dtype=torch.float64, device=next(iter(theta.values())).device)
    return Outer(*(memory.get(name, {}) for name in Outer._fields[:-1]), count)


def parts(config: Config) -> list[str]:
    """The fields of Outer that this configuration fills."""
    adam = config.outer.optimizer == "adam"
    return ["previous", *(["mean", "square"] if adam else []), *(["average"] if averages(config) else [])]


def averages(config: Config) -> bool:
    """outer.average, or what the rule for the rates takes: plain MAML and the paper know theta alone."""
    return config.rates.rule == "adaptive" if config.outer.average is None else config.outer.average


def direction(gradient: Tensor, mean: Tensor | None, square: Tensor | None, count: Tensor) -> tuple[Tensor, ...]:
    """The optimiser's direction for one tensor and its new moments: the gradient itself under SGD (no moments), else
    Adam's at its `count`-th step."""
    if mean is None or square is None:
        return gradient, mean, square
    mean = torch.lerp(mean, gradient, 1 - BETA_1)
    square = torch.lerp(square, gradient * gradient, 1 - BETA_2)
    scaled = (mean / (1 - BETA_1**count)) / ((square / (1 - BETA_2**count)).sqrt() + EPSILON)
    return scaled.to(gradient.dtype), mean, square


def trust_of(config: Config) -> float:
    """outer.trust, or what the rule for the rates takes: plain MAML and the paper have no trust region."""
    if config.outer.trust is not None:
        return config.outer.trust
    return TRUST[config.outer.optimizer] if config.rates.rule == "adaptive" else 0.0


def trust_at(trust: float, count: Tensor) -> Tensor:
    """The trust region at the `count`-th step: it opens over WARM_STEPS, as a warm-up does (Goyal et al. 2017), and shrinks as
    the root of the steps, as stochastic approximation wants it (Robbins and Monro 1951): no horizon to anneal towards."""
    return trust * (count / WARM_STEPS).clamp(max=1.0) ** 3 / (1 + count / TRUST_STEPS).sqrt()


def walker(theta: Tensor, average: Tensor | None) -> Tensor:
    """The point that takes the steps: theta itself, or, where an average is kept, the point at whose side theta lies."""
    return theta if average is None else torch.lerp(average, theta, 1 / (1 - PULL))


def joined(moved: Tensor, average: Tensor | None, count: Tensor) -> tuple[Tensor, Tensor | None]:
    """theta and the average after the walker's `count`-th step, to `moved`.

    The average is of polynomial decay (Shamir and Zhang 2013): what annealing the rate would gain, without a horizon and
    without slowing what is to come. The first step replaces it. Gradients are taken between the walker and its average
    (schedule-free, Defazio et al. 2024): large steps, and a theta that they do not shake.
    """
    if average is None:
        return moved, None
    average = torch.lerp(average, moved, ((AVERAGED + 1) / (count + AVERAGED)).to(moved.dtype))
    return torch.lerp(moved, average, PULL), average


def trusted(norm: Tensor, length: Tensor, beta: Tensor, trust: Tensor) -> Tensor:
    """The factor in (0, 1] that brings a step of beta * length down to trust * norm of the tensor that it moves.

    As LARS bounds steps (You et al. 2017): early overshoot would inflate the norms of scale-invariant weights, and
    everything after it would be slow. Elementwise over tensors.
    """
    limit = trust * norm.clamp(min=NORM_FLOOR)
    return (limit / (beta.abs() * length).clamp(min=torch.finfo(torch.float64).tiny)).clamp(max=1.0)


def flat(params: Params) -> Tensor:
    """All tensors as one vector: what is done to every element alike is one operation then, and not one for each tensor."""
    return torch.cat([p.flatten() for p in params.values()])


def named(vector: Tensor, like: Params) -> Params:
    """The inverse: views of `vector` under the names and in the shapes of `like`."""
    parts = vector.split([p.numel() for p in like.values()])
    return {name: part.view_as(p) for (name, p), part in zip(like.items(), parts)}


def _norms(vector: Tensor, like: Params) -> Tensor:
    """The norm of each tensor, float64."""
    return torch.stack([torch.linalg.vector_norm(part) for part in named(vector, like).values()]).double()


def step(theta: Params, gradient: Params, beta: Tensor, outer: Outer, config: Config, usable: Tensor) -> tuple[Params, Outer]:
    """theta and memory after one step of size beta along the optimiser's direction; both unchanged where not `usable`."""
    count, trust, old = outer.count + 1, trust_of(config), {"theta": flat(theta)}
    old |= {name: flat(getattr(outer, name)) for name in parts(config)}
    p = walker(old["theta"], old.get("average"))
    d, mean, square = direction(flat(gradient), old.get("mean"), old.get("square"), count)
    if trust > 0:
        factors = trusted(_norms(p, theta), _norms(d, theta), beta, trust_at(trust, count)).to(d.dtype)
        d = torch.cat([part.flatten() * factor for part, factor in zip(named(d, theta).values(), factors.unbind())])
    moved, average = joined(p - beta.to(p.dtype) * d, old.get("average"), count)
    new = {"theta": moved, "previous": d, "mean": mean, "square": square, "average": average}
    kept = {name: named(torch.where(usable, new[name], value), theta) for name, value in old.items()}
    memory = Outer(*(kept.get(name, {}) for name in Outer._fields[:-1]), torch.where(usable, count, outer.count))
    return kept["theta"], memory
