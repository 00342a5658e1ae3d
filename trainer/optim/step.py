"""theta's step, once for every engine: clipping, the optimiser's direction, its length relative to the tensors, an average."""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from alpha_maml.trainer.core.algebra import Params
from alpha_maml.trainer.optim.optimizer import Optimizer, State

FLOOR = 0.3  # of the length that torch's layers draw for a tensor of its shape: one that starts at zero may still move
SHRINK_STEPS = 20  # after which relative steps begin to shrink, as the root of the steps
AVERAGED = 4  # the average weighs step t as t^AVERAGED does: about the last fifth of all steps
PULL = 0.5  # how far theta lies from the iterate z towards z's average
TINY = torch.finfo(torch.float64).tiny
NOTHING = 1e-30  # a direction of this length says nothing


class Memory(NamedTuple):
    """What theta's step remembers."""

    # `previous`, the direction applied last (z moved by -beta previous), which is the factor of beta's next hypergradient, as
    # hypergradient descent has it for any optimiser (Baydin et al. 2018); the optimiser's own; `average` of z, where kept.
    parts: dict[str, Params]
    steps: Tensor  # taken so far: float64 scalar


class Layout:
    """How an engine's pieces make up theta's N tensors. `typical`: the `typical_length` of each, float64 [N]."""

    typical: Tensor

    def norms(self, pieces: Params) -> Tensor:
        """The norm of each of theta's tensors: float64 [N]."""
        raise NotImplementedError

    def scaled(self, pieces: Params, factors: Tensor) -> Params:
        """The pieces, each of theta's tensors multiplied by its factor [N]."""
        raise NotImplementedError

    def directions(self, optimizer: Optimizer, gradients: Params, state: State, z: Params,
                   count: Tensor) -> tuple[Params, State]:
        """The optimiser's, in pieces."""
        return optimizer.update(gradients, state, z, count)


class Whole(Layout):
    """The layout in which the pieces are theta's tensors; they are `like` these."""

    def __init__(self, like: Params):
        lengths = [typical_length(p.shape) for p in like.values()]
        self.typical = torch.tensor(lengths, dtype=torch.float64, device=next(iter(like.values())).device)

    def norms(self, pieces: Params) -> Tensor:
        return torch.stack([torch.linalg.vector_norm(p) for p in pieces.values()]).double()

    def scaled(self, pieces: Params, factors: Tensor) -> Params:
        return {name: p * factor.to(p.dtype) for (name, p), factor in zip(pieces.items(), factors.unbind())}


class OuterStep:
    """theta's step: z <- z - beta direction; theta is z, or lies halfway between z and z's average.

    Args:
        optimizer: gives the direction.
        relative: beta is the length of every tensor's step, in units of the tensor's own, times `shrunk`.
        trust: largest relative step of a tensor, times `shrunk`; 0 is none.
        average: keep an average of z, which evaluation uses (schedule-free).
        weight_decay: adds weight_decay theta to the meta-gradient, or to the direction of an optimiser that decouples it.
        clip: largest norm of the meta-gradient; 0 is none.
    """

    def __init__(self, optimizer: Optimizer, relative: bool = False, trust: float = 0.0, average: bool = False,
                 weight_decay: float = 0.0, clip: float = 0.0):
        self.optimizer, self.relative, self.trust, self.average, self.clip = optimizer, relative, trust, average, clip
        self.gradient_decay = 0.0 if optimizer.decoupled else weight_decay
        self.parts = ["previous", *optimizer.memory, *(["average"] if average else [])]
        self.in_pieces = [part for part in self.parts if not (optimizer.whole and part in optimizer.memory)]
        self.radius = min(optimizer.radius, trust or optimizer.radius) if relative else 0.0  # where beta starts

    def init(self, theta: Params, tensors: Params | None = None) -> Memory:
        """What is remembered before the first step. `tensors` are theta's, where `theta` is pieces of them."""
        own = self.optimizer.init(tensors if tensors is not None and self.optimizer.whole else theta)
        parts = {"previous": {name: torch.zeros_like(p) for name, p in theta.items()}} | own
        if self.average:
            parts["average"] = dict(theta)
        return Memory(parts, torch.zeros((), dtype=torch.float64, device=next(iter(theta.values())).device))

    def move(self, theta: Params, gradients: Params, squared_norm: Tensor, beta: Tensor, usable: Tensor, memory: Memory,
             layout: Layout) -> tuple[Params, Memory]:
        """theta and memory after one step, both unchanged where not `usable` (bool).

        Args:
            theta, gradients: pieces of the same names and shapes. In memory the optimiser's own parts are named tensors where
                it needs them whole, all else is in pieces.
            squared_norm: |gradient|^2 over all of theta: float64 scalar.
            beta: the step's size: float64 scalar.
        """
        count, old = memory.steps + 1, memory.parts
        average = old.get("average", {})
        z = {name: iterate(p, average.get(name)) for name, p in theta.items()}
        if self.clip:
            factor = (self.clip / squared_norm.sqrt().clamp(min=TINY)).clamp(max=1)
            gradients = {name: g * factor.to(g.dtype) for name, g in gradients.items()}
        state = {part: old[part] for part in self.optimizer.memory}
        directions, state = layout.directions(self.optimizer, gradients, state, z, count)
        if self.relative or self.trust > 0:
            factors = self._factors(layout.norms(z), layout.norms(directions), layout.typical, beta, shrunk(count))
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

    def _factors(self, norms: Tensor, lengths: Tensor, typical: Tensor, beta: Tensor, left: Tensor) -> Tensor:
        """What each tensor's direction is multiplied by. As LARS (You et al. 2017), steps are measured by the tensor that they
        move: early overshoot would inflate the norms of scale-invariant weights, and everything after it would be slow."""
        unit = left * torch.maximum(norms, FLOOR * typical)  # the step of a tensor at beta = 1
        if self.relative:
            within = (self.trust / beta.abs().clamp(min=TINY)).clamp(max=1) if self.trust > 0 else 1.0
            return torch.where(lengths > NOTHING, within * unit / lengths.clamp(min=NOTHING), 0.0)
        return (self.trust * unit / (beta.abs() * lengths).clamp(min=TINY)).clamp(max=1.0)


def typical_length(shape: torch.Size) -> float:
    """The length that torch's layers draw for a tensor: entries uniform within 1 / sqrt(fan in) for a weight [out, ...]; a
    vector's fan in is unknown, and its own size taken for it."""
    rows = shape[0] if len(shape) > 1 else 1
    return (rows / 3) ** 0.5


def shrunk(count: Tensor) -> Tensor:
    """What is left of a relative step at the `count`-th step: it shrinks as the root of the steps, as stochastic approximation
    wants it (Robbins and Monro 1951): no horizon to anneal towards."""
    return 1 / (1 + count / SHRINK_STEPS).sqrt()


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
