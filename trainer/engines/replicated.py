"""The engine in which every rank holds theta and takes the same step."""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from alpha_maml.trainer.core import names
from alpha_maml.trainer.core.algebra import Params, flat, named
from alpha_maml.trainer.core.decide import Total
from alpha_maml.trainer.core.sweep import MetaGradient
from alpha_maml.trainer.engines.collective import World, sum_in_place
from alpha_maml.trainer.engines.engine import packed, unpacked
from alpha_maml.trainer.optim.optimizer import Optimizer, State
from alpha_maml.trainer.optim.step import Layout, OuterStep, Whole

ALL = "all"  # the name of the one piece that all tensors make up


class ReplicatedEngine:
    """One flat buffer carries the whole iteration, theta's gradient and every sum beside it: small messages cost latency, so
    there is one.

    Args:
        theta: the parameters by name.
        outer: theta's step. It takes one flat vector: one operation instead of one for each tensor.
        count: what sums over tasks are divided by: the number of tasks where task.reduction is mean, else 1.
    """

    def __init__(self, theta: Params, outer: OuterStep, count: int, world: World):
        self.params, self.outer, self.count, self.world = theta, outer, count, world
        self.memory, self.layout = outer.init(theta), Flat(theta)

    @classmethod
    def build(cls, theta: Mapping[str, Tensor], outer: OuterStep, count: int, world: World,
              zero_stage: int) -> ReplicatedEngine:
        return cls({name: p.detach().clone() for name, p in theta.items()}, outer, count, world)

    def theta(self) -> Params:
        return self.params

    def learned(self) -> Params:
        return self.memory.parts.get("average", self.params)

    def reduce(self, local: MetaGradient, stop: Tensor) -> Total:
        gradient = flat({name: local.gradient[name] for name in self.params})
        size = len(gradient)
        total = sum_in_place(torch.cat([gradient, packed(local, stop, gradient.dtype)]), self.world)
        gradient = torch.add(1 / self.count * total[:size], flat(self.params), alpha=self.outer.gradient_decay)  # S_t
        previous = flat(self.memory.parts["previous"])
        sums, stopping = unpacked(total[size:], local)
        return Total(sums, dot(gradient, gradient), dot(gradient, previous), dot(previous, previous), stopping, {ALL: gradient})

    def apply(self, total: Total, beta: Tensor, usable: Tensor) -> None:
        parts = self.memory.parts
        memory = self.memory._replace(parts=parts | {part: {ALL: flat(parts[part])} for part in self.outer.in_pieces})
        theta, memory = self.outer.move({ALL: flat(self.params)}, total.gradient, total.squared_norm, beta, usable, memory,
                                        self.layout)
        parts = memory.parts
        self.memory = memory._replace(
            parts=parts | {part: named(parts[part][ALL], self.params) for part in self.outer.in_pieces})
        self.params = named(theta[ALL], self.params)

    def state(self) -> dict[str, Tensor]:
        return names.of_theta(self.params, *self.memory)

    def load(self, state: dict[str, Tensor]) -> None:
        self.params, parts, count = names.theta_of(state, self.outer.parts)
        self.memory = self.memory._replace(parts=parts, steps=count)


class Flat(Layout):
    """The layout of one vector of all tensors, which are `like` these."""

    def __init__(self, like: Params):
        self.like, self.whole = {name: p.to("meta") for name, p in like.items()}, Whole(like)
        self.typical = self.whole.typical

    def norms(self, pieces: Params) -> Tensor:
        return self.whole.norms(named(pieces[ALL], self.like))

    def scaled(self, pieces: Params, factors: Tensor) -> Params:
        return {ALL: flat(self.whole.scaled(named(pieces[ALL], self.like), factors))}

    def directions(self, optimizer: Optimizer, gradients: Params, state: State, z: Params,
                   count: Tensor) -> tuple[Params, State]:
        if not optimizer.whole:
            return optimizer.update(gradients, state, z, count)
        found, state = optimizer.update(named(gradients[ALL], self.like), state, named(z[ALL], self.like), count)
        return {ALL: flat(found)}, state


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product, accumulated in float64: in float32 these products are ill-conditioned."""
    return torch.sum(a * b, dtype=torch.float64)
