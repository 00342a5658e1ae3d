"""The engine in which every rank holds theta and takes the same step."""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from alpha_maml.trainer.core import names
from alpha_maml.trainer.core.algebra import Params
from alpha_maml.trainer.core.decide import Total
from alpha_maml.trainer.core.sweep import MetaGradient
from alpha_maml.trainer.engines.collective import World, sum_in_place
from alpha_maml.trainer.engines.engine import packed, unpacked
from alpha_maml.trainer.optim.step import OuterStep, Whole

ALL = "all"  # the name of the one piece that all tensors make up


class ReplicatedEngine:
    """One flat buffer carries the whole iteration, theta's gradient and every sum beside it: small messages cost latency, so
    there is one.

    Args:
        theta: the parameters by name.
        outer: theta's step. It takes one flat vector, one operation instead of one for each tensor, unless its optimiser needs
            tensors.
        count: what sums over tasks are divided by: the number of tasks where task.reduction is mean, else 1.
    """

    def __init__(self, theta: Params, outer: OuterStep, count: int, world: World):
        self.params, self.outer, self.count, self.world, self.whole = theta, outer, count, world, outer.optimizer.whole
        self.memory = outer.init(theta)

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
        gradients = named(total.gradient[ALL], self.params) if self.whole else total.gradient
        memory = self.memory._replace(parts={part: self._pieces(tensors) for part, tensors in self.memory.parts.items()})
        theta, memory = self.outer.move(self._pieces(self.params), gradients, total.squared_norm, beta, usable, memory,
                                        Whole() if self.whole else Flat(self.params))
        if not self.whole:
            memory = memory._replace(parts={part: named(t[ALL], self.params) for part, t in memory.parts.items()})
            theta = named(theta[ALL], self.params)
        self.params, self.memory = theta, memory

    def _pieces(self, params: Params) -> Params:
        return params if self.whole else {ALL: flat(params)}

    def state(self) -> dict[str, Tensor]:
        return names.of_theta(self.params, *self.memory)

    def load(self, state: dict[str, Tensor]) -> None:
        self.params, parts, count = names.theta_of(state, self.outer.parts)
        self.memory = self.memory._replace(parts=parts, steps=count)


class Flat:
    """The layout of one vector of all tensors."""

    def __init__(self, like: Params):
        self.like = like

    def norms(self, pieces: Params) -> Tensor:
        return Whole().norms(named(pieces[ALL], self.like))

    def scaled(self, pieces: Params, factors: Tensor) -> Params:
        return {ALL: flat(Whole().scaled(named(pieces[ALL], self.like), factors))}


def flat(params: Params) -> Tensor:
    """All tensors as one vector: what is done to every element alike is one operation then, and not one for each tensor."""
    return torch.cat([p.flatten() for p in params.values()])


def named(vector: Tensor, like: Params) -> Params:
    """The inverse: views of `vector` under the names and in the shapes of `like`."""
    parts = vector.split([p.numel() for p in like.values()])
    return {name: part.view_as(p) for (name, p), part in zip(like.items(), parts)}


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product, accumulated in float64: in float32 these products are ill-conditioned."""
    return torch.sum(a * b, dtype=torch.float64)
