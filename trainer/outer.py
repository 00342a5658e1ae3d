"""theta's step: the paper's SGD, or Adam (Kingma and Ba 2015), under an optional trust region."""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trainer.config import Config
from trainer.maml import Params

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8
NORM_FLOOR = 0.1  # a tensor that starts at zero may still move


class Outer(NamedTuple):
    """What theta's step remembers. `previous` is the direction applied last (theta_t = theta_{t-1} - beta previous): the
    factor of beta's next hypergradient, as hypergradient descent has it for any optimiser (Baydin et al. 2018)."""

    previous: Params
    mean: Params  # Adam's moments; empty under SGD
    square: Params
    count: Tensor  # float64 scalar


def initial(theta: Params, optimizer: str) -> Outer:
    def zeros() -> Params:
        return {name: torch.zeros_like(p) for name, p in theta.items()}

    moments = (zeros(), zeros()) if optimizer == "adam" else ({}, {})
    return Outer(zeros(), *moments, torch.zeros((), dtype=torch.float64, device=next(iter(theta.values())).device))


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
    return 0.02 if config.rates.rule == "adaptive" else 0.0


def trusted(norm: Tensor, length: Tensor, beta: Tensor, trust: float) -> Tensor:
    """The factor in (0, 1] that brings a step of beta * length down to trust * norm of the tensor that it moves.

    As LARS bounds steps (You et al. 2017): early overshoot would inflate the norms of scale-invariant weights, and
    everything after it would be slow. Elementwise over tensors.
    """
    limit = trust * norm.clamp(min=NORM_FLOOR)
    return (limit / (beta.abs() * length).clamp(min=torch.finfo(torch.float64).tiny)).clamp(max=1.0)


def step(theta: Params, gradient: Params, beta: Tensor, outer: Outer, config: Config, usable: Tensor) -> tuple[Params, Outer]:
    """theta and memory after one step of size beta along the optimiser's direction; both unchanged where not `usable`."""
    count, trust, rate = outer.count + 1, trust_of(config), beta.to(next(iter(theta.values())).dtype)
    moved, memory = {}, Outer({}, {}, {}, torch.where(usable, count, outer.count))
    for name, p in theta.items():
        d, mean, square = direction(gradient[name], outer.mean.get(name), outer.square.get(name), count)
        if trust > 0:
            norms = torch.linalg.vector_norm(p).double(), torch.linalg.vector_norm(d).double()
            d = d * trusted(*norms, beta, trust).to(d.dtype)
        moved[name] = torch.where(usable, p - rate * d, p)
        memory.previous[name] = torch.where(usable, d, outer.previous[name])
        if mean is not None:
            memory.mean[name] = torch.where(usable, mean, outer.mean[name])
            memory.square[name] = torch.where(usable, square, outer.square[name])
    return moved, memory
