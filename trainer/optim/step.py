"""theta's step, once for every engine: clipping, the optimiser's direction, a trust region, and an average."""
from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from alpha_maml.trainer.core.algebra import Params
from alpha_maml.trainer.optim.optimizer import Optimizer

NORM_FLOOR = 0.1  # a tensor that starts at zero may still move
TRUST_STEPS = 20  # after which the trust region begins to shrink, as the root of the steps
WARM_STEPS = 20  # in which it opens, as their cube: alpha finds its place before theta moves far
AVERAGED = 4  # the average weighs step t as t^AVERAGED does: about the last fifth of all steps
PULL = 0.5  # how far theta lies from the iterate z towards z's average
TINY = torch.finfo(torch.float64).tiny


class Memory(NamedTuple):
    """What theta's step remembers."""

    # `previous`, the direction applied last (z moved by -beta previous), which is the factor of beta's next hypergradient, as
    # hypergradient descent has it for any optimiser (Baydin et al. 2018); the optimiser's own; `average` of z, where kept.
    parts: dict[str, Params]
    steps: Tensor  # taken so far: float64 scalar


class Layout(Protocol):
    """How an engine's pieces make up theta's N tensors."""

    def norms(self, pieces: Params) -> Tensor:
        """The norm of each of theta's tensors: float64 [N]."""
        ...

    def scaled(self, pieces: Params, factors: Tensor) -> Params:
        """The pieces, each of theta's tensors multiplied by its factor [N]."""
        ...


class Whole:
    """The layout in which the pieces are theta's tensors."""

    def norms(self, pieces: Params) -> Tensor:
        return torch.stack([torch.linalg.vector_norm(p) for p in pieces.values()]).double()

    def scaled(self, pieces: Params, factors: Tensor) -> Params:
        return {name: p * factor.to(p.dtype) for (name, p), factor in zip(pieces.items(), factors.unbind())}


class OuterStep:
    """theta's step: z <- z - beta direction; theta is z, or lies halfway between z and z's average.

    Args:
        optimizer: gives the direction.
        trust: largest relative step of a tensor; 0 is none.
        average: keep an average of z, which evaluation uses (schedule-free).
        weight_decay: adds weight_decay theta to the meta-gradient, or to the direction of an optimiser that decouples it.
        clip: largest norm of the meta-gradient; 0 is none.
    """

    def __init__(self, optimizer: Optimizer, trust: float = 0.0, average: bool = False, weight_decay: float = 0.0,
                 clip: float = 0.0):
        self.optimizer, self.trust, self.average, self.clip = optimizer, trust, average, clip
        self.gradient_decay = 0.0 if optimizer.decoupled else weight_decay
        self.parts = ["previous", *optimizer.memory, *(["average"] if average else [])]

    def init(self, theta: Params) -> Memory:
        """What is remembered before the first step."""
        parts = {"previous": {name: torch.zeros_like(p) for name, p in theta.items()}} | self.optimizer.init(theta)
        if self.average:
            parts["average"] = dict(theta)
        return Memory(parts, torch.zeros((), dtype=torch.float64, device=next(iter(theta.values())).device))

    def move(self, theta: Params, gradients: Params, squared_norm: Tensor, beta: Tensor, usable: Tensor, memory: Memory,
             layout: Layout) -> tuple[Params, Memory]:
        """theta and memory after one step, both unchanged where not `usable` (bool).

        Args:
            theta, gradients: pieces of the same names and shapes.
            squared_norm: |gradient|^2 over all of theta: float64 scalar.
            beta: the step's size: float64 scalar.
        """
        count, old = memory.steps + 1, memory.parts
        average = old.get("average", {})
        z = {name: iterate(p, average.get(name)) for name, p in theta.items()}
        if self.clip:
            factor = (self.clip / squared_norm.sqrt().clamp(min=TINY)).clamp(max=1)
            gradients = {name: g * factor.to(g.dtype) for name, g in gradients.items()}
        directions, state = self.optimizer.update(gradients, {part: old[part] for part in self.optimizer.memory}, z, count)
        if self.trust > 0:
            factors = trusted(layout.norms(z), layout.norms(directions), beta, trust_at(self.trust, count))
            directions = layout.scaled(directions, factors)
        new = {"theta": {}, "previous": directions} | state | ({"average": {}} if self.average else {})
        for name, p in z.items():
            reached = p - beta.to(p.dtype) * directions[name]
            new["theta"][name], averaged = joined(reached, average.get(name), count)
            if averaged is not None:
                new["average"][name] = averaged
        kept = {part: {name: torch.where(usable, t, (theta if part == "theta" else old[part])[name])
                       for name, t in tensors.items()} for part, tensors in new.items()}
        return kept.pop("theta"), Memory(kept, torch.where(usable, count, memory.steps))


def trust_at(trust: float, count: Tensor) -> Tensor:
    """The trust region at the `count`-th step: it opens over WARM_STEPS, as a warm-up does (Goyal et al. 2017), and shrinks as
    the root of the steps, as stochastic approximation wants it (Robbins and Monro 1951): no horizon to anneal towards."""
    return trust * (count / WARM_STEPS).clamp(max=1.0) ** 3 / (1 + count / TRUST_STEPS).sqrt()


def iterate(theta: Tensor, average: Tensor | None) -> Tensor:
    """z, the schedule-free iterate: theta = (z + average) / 2. Without an average, theta itself."""
    return theta if average is None else torch.lerp(average, theta, 1 / (1 - PULL))


def joined(reached: Tensor, average: Tensor | None, count: Tensor) -> tuple[Tensor, Tensor | None]:
    """theta and the average after z's `count`-th step, which has `reached` there.

    The average is of polynomial decay (Shamir and Zhang 2013): what annealing the rate would gain, without a horizon and
    without slowing what is to come. The first step replaces it. Gradients are taken between z and its average
    (schedule-free, Defazio et al. 2024): large steps, and a theta that they do not shake.
    """
    if average is None:
        return reached, None
    average = torch.lerp(average, reached, ((AVERAGED + 1) / (count + AVERAGED)).to(reached.dtype))
    return torch.lerp(reached, average, PULL), average


def trusted(norm: Tensor, length: Tensor, beta: Tensor, trust: Tensor) -> Tensor:
    """The factor in (0, 1] that brings a step of beta * length down to trust * norm of the tensor that it moves.

    As LARS bounds steps (You et al. 2017): early overshoot would inflate the norms of scale-invariant weights, and
    everything after it would be slow. Elementwise over tensors.
    """
    limit = trust * norm.clamp(min=NORM_FLOOR)
    return (limit / (beta.abs() * length).clamp(min=TINY)).clamp(max=1.0)
