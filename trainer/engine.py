"""What holds theta and takes its step. Here: plain tensors, replicated on every rank. zero.py shards them."""
from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from trainer import outer
from trainer.collective import World, sum_in_place
from trainer.inner import Params
from trainer.keys import Config
from trainer.maml import MetaGradient
from trainer.rates import Total

# From an iteration's total to (beta of this step, whether theta may move): decided once, between reduction and step.
Decide = Callable[[Total], tuple[Tensor, Tensor]]


class Engine(Protocol):
    def theta(self) -> Params:
        """theta in full, for this iteration's adaptation: detached, valid until the next step."""

    def learned(self) -> Params:
        """What has been learned, for evaluation: theta's average, or theta where none is kept. Every rank must call."""

    def step(self, local: MetaGradient, stop: Tensor, decide: Decide) -> None:
        """Sums the shards' meta-gradients over all ranks, asks `decide`, and moves theta. `stop`: 1 where this rank was asked
        to stop, else 0."""

    def state(self) -> dict[str, Tensor]:
        """theta.NAME, outer.count, and outer.PART.NAME for each of outer.parts: in full, on rank 0 at least. Every rank must
        call. The tensors are never written to again."""

    def load(self, state: dict[str, Tensor]) -> None:
        """The inverse; `state` is the same on every rank."""


def pack_rest(local: MetaGradient, stop: Tensor, dtype: torch.dtype) -> Tensor:
    """What an iteration sums beside the gradient, as one vector."""
    return torch.cat([x.to(dtype).flatten() for x in (*local[1:], stop)])


def unpack_rest(packed: Tensor, local: MetaGradient) -> tuple[MetaGradient, Tensor]:
    """The sums, in the shapes of `local`, and how many ranks were asked to stop."""
    *values, stopping = packed.double().split([*(x.numel() for x in local[1:]), 1])
    return MetaGradient({}, *(value.view(x.shape) for value, x in zip(values, local[1:]))), stopping[0]


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product, accumulated in float64: in float32 these products are ill-conditioned."""
    return torch.sum(a * b, dtype=torch.float64)


class TorchEngine:
    """Every rank holds theta and takes the same step. One flat buffer carries the whole iteration, theta's gradient and
    every sum beside it: small messages cost latency, so there is one."""

    def __init__(self, theta: Params, config: Config, world: World):
        self.params, self.config, self.world = theta, config, world
        self.outer = outer.initial(theta, config)

    def theta(self) -> Params:
        return self.params

    def learned(self) -> Params:
        return self.outer.average or self.params

    def step(self, local: MetaGradient, stop: Tensor, decide: Decide) -> None:
        gradient = outer.flat({name: local.gradient[name] for name in self.params})
        size = len(gradient)
        total = sum_in_place(torch.cat([gradient, pack_rest(local, stop, gradient.dtype)]), self.world)
        scale = 1 / self.config.task.batch if self.config.task.reduction == "mean" else 1
        decay = self.config.outer.weight_decay
        gradient = torch.add(scale * total[:size], outer.flat(self.params), alpha=decay)  # S_t
        previous = outer.flat(self.outer.previous)
        sums, stopping = unpack_rest(total[size:], local)
        beta, usable = decide(
            Total(sums, dot(gradient, gradient), dot(gradient, previous), dot(previous, previous), stopping))
        gradient = outer.named(gradient, self.params)
        self.params, self.outer = outer.step(self.params, gradient, beta, self.outer, self.config, usable)

    def state(self) -> dict[str, Tensor]:
        state = {f"theta.{name}": p for name, p in self.params.items()}
        for part in outer.parts(self.config):
            state |= {f"outer.{part}.{name}": t for name, t in getattr(self.outer, part).items()}
        return state | {"outer.count": self.outer.count}

    def load(self, state: dict[str, Tensor]) -> None:
        def under(prefix: str) -> Params:
            return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}

        self.params = under("theta.")
        self.outer = outer.Outer(*(under(f"outer.{part}.") for part in outer.Outer._fields[:-1]), state["outer.count"])
