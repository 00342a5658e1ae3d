"""From the keys of a configuration to the terms of the mathematics: the inner loop, the rule for the rates, theta's step."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from alpha_maml.trainer.config import Config, optimizer_of
from alpha_maml.trainer.core.inner import Annealing, InnerLoop, adapted_names, annealed, per_step_names
from alpha_maml.trainer.core.rules import RULES
from alpha_maml.trainer.core.rules.rule import Rates, Rule
from alpha_maml.trainer.optim import OPTIMIZERS
from alpha_maml.trainer.optim.optimizer import Optimizer
from alpha_maml.trainer.optim.step import OuterStep


def inner_loop(config: Config, theta: Iterable[str], seed: int = 0) -> InnerLoop:
    """The inner loop on a model whose tensors have the names `theta`, without annealing; `seed` is of what the model draws in
    iteration 0. Raises InputError where a pattern of names matches nothing."""
    theta, inner = list(theta), config.inner
    per_step = per_step_names(theta, inner.per_step)
    recompute = inner.recompute if config.model.randomness == "error" else False  # computing anew would draw anew
    shape = config.rates.alpha_shape or ("layer_step" if RULES.has(config.rates.rule, "layer_step") else "scalar")
    return InnerLoop(inner.steps, inner.order, adapted_names(theta, inner.adapts, per_step), shape, inner.clip,
                     inner.weight_decay, None, recompute, config.model.randomness, seed, per_step)


def inner_loop_at(config: Config, loop: InnerLoop, iteration: int, device: torch.device) -> InnerLoop:
    """The inner loop of the iteration, counted from 0."""
    annealing = Annealing(config.inner.multi_step_iterations, config.inner.first_order_iterations)
    return annealed(loop, annealing, iteration, device)._replace(seed=loop.seed + config.task.batch * iteration)


def rule(config: Config) -> Rule:
    """The rule for the rates, whose arguments are the keys of the section `rates` that have their names."""
    kind: Any = RULES.find(config.rates.rule)
    arguments = [field.name for field in fields(kind)] if is_dataclass(kind) else []
    given: dict[str, Any] = {name: getattr(config.rates, name) for name in arguments if hasattr(config.rates, name)}
    return RULES.find(config.rates.rule)(**given)


def first_rates(config: Config, alpha_sizes: tuple[int, ...], device: torch.device) -> Rates:
    """The state before the first iteration: all of alpha, of this shape, starts at rates.alpha."""

    def filled(value: float, sizes: tuple[int, ...] = ()) -> Tensor:
        return torch.full(sizes, value, dtype=torch.float64, device=device)

    return rule(config).init(filled(config.rates.alpha, alpha_sizes), filled(config.rates.beta))


def outer_step(config: Config) -> OuterStep:
    """theta's step. What the keys of `outer` leave open the rule says: plain MAML and the paper take the meta-gradient as it
    is, and know theta alone."""
    outer, named = config.outer, config.rates.rule
    optimizer: Optimizer = OPTIMIZERS.find(optimizer_of(config))(outer.weight_decay)
    relative = RULES.has(named, "relative") and outer.trust != 0
    average = RULES.has(named, "average") if outer.average is None else outer.average
    return OuterStep(optimizer, relative, outer.trust or 0.0, average, outer.weight_decay, outer.clip)


def divisor(config: Config) -> int:
    """What sums over the task batch are divided by."""
    return config.task.batch if config.task.reduction == "mean" else 1
