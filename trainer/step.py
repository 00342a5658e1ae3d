"""The training step: one iteration of Algorithm 2 (Behl, Baydin, Torr 2019)."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from alpha_maml.data.tasks import Loss, TaskBatch, TaskSource
from alpha_maml.trainer.config import Config
from alpha_maml.trainer.core import names
from alpha_maml.trainer.core.adaptation import Apply
from alpha_maml.trainer.core.decide import Decision, Total, decide, signals
from alpha_maml.trainer.core.inner import InnerLoop
from alpha_maml.trainer.core.meta_gradient import each_task, meta_gradient
from alpha_maml.trainer.core.rules.rule import Rates, Rule, Signals
from alpha_maml.trainer.core.sweep import MetaGradient
from alpha_maml.trainer.engines.collective import World, broadcast
from alpha_maml.trainer.engines.engine import Engine
from alpha_maml.trainer.evaluate import CHUNK
from alpha_maml.trainer.objective import divisor, inner_loop_at

METRICS = ("loss/train", "loss/support", "rates/alpha", "rates/beta", "hypergradients/alpha", "hypergradients/beta",
           "guards/skipped", "guards/nonfinite")  # of every iteration, beside those of the loss


@dataclass(frozen=True)
class Problem:
    """What stays the same over a run."""

    config: Config
    world: World
    source: TaskSource
    loss: Loss
    apply: Apply  # in evaluation mode
    train_apply: Apply  # in training mode, in which a model may draw random numbers
    indices: Tensor  # this rank's shard of the task batch
    dtype: torch.dtype
    loop: InnerLoop  # without annealing
    rule: Rule
    of_loss: tuple[str, ...] = ()  # the names of the loss's own metrics
    radius: float = 0.0  # the relative step from which beta starts; 0 where theta's steps are not relative
    apply_tasks: Apply | None = None  # `apply` of many tasks at once, where the model can
    forward_tasks: Apply | None = None  # the same of `train_apply`
    each_task: Callable[..., MetaGradient] = each_task  # or that function compiled
    chunk: int = 0  # tasks differentiated at once; 0 is automatic
    evaluated: int = CHUNK  # tasks evaluated at once
    model: nn.Module | None = None  # which holds what is frozen
    frozen: str | None = None  # digest of those

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of an iteration's values."""
        return METRICS + tuple(f"{name}/train" for name in self.of_loss)

    def inner(self, iteration: int) -> InnerLoop:
        return inner_loop_at(self.config, self.loop, iteration, self.world.device)


class State(NamedTuple):
    """What an iteration changes. The engine changes in place."""

    engine: Engine
    rates: Rates
    iteration: int


def train_step(problem: Problem, state: State, stop: bool) -> tuple[State, Tensor]:
    """One meta-iteration: the new state, and the values of `problem.metrics` with the count of ranks asked to stop."""
    tasks = problem.source.batch("train", state.iteration, problem.indices)
    stopping = torch.full((), float(stop), device=problem.world.device)
    return step_on(problem, state, tasks, problem.inner(state.iteration), stopping)


def step_on(problem: Problem, state: State, tasks: TaskBatch | list[TaskBatch], loop: InnerLoop,
            stop: Tensor) -> tuple[State, Tensor]:
    """`train_step` on the given tasks. Every gradient is taken at theta_{t-1}, on the same tasks."""
    engine, alpha = state.engine, state.rates.alpha.to(problem.dtype)
    local = meta_gradient(problem.train_apply, problem.loss, engine.theta(), alpha, tasks, loop, problem.chunk,
                          problem.forward_tasks, problem.each_task)  # 1: adapt with alpha_t, sum over this rank's tasks
    total = engine.reduce(local, stop)  # over all ranks
    found = signals(total, divisor(problem.config), problem.radius)
    decision = decided(problem, state.rates, found)  # 2: beta_t; 4: alpha_{t+1}
    moves = decision.usable & problem.rule.moves(state.rates, found)
    engine.apply(total, decision.rates.beta, moves)  # 3: theta_t
    return State(engine, decision.rates, state.iteration + 1), values(problem, state, total, found, decision)


def decided(problem: Problem, rates: Rates, found: Signals) -> Decision:
    """Rank 0's decision, on every rank."""
    mine = Decision(rates, torch.isfinite(found.loss), torch.isfinite(found.loss))  # of the right shapes
    if problem.world.rank == 0:
        mine = decide(problem.rule, rates, found, problem.config.on_nonfinite)
    kept = [mine.rates.memory[name] for name in rates.memory]
    alpha, beta, usable, finite, *memory = broadcast(
        (mine.rates.alpha, mine.rates.beta, mine.usable, mine.finite, *kept), problem.world)
    return Decision(Rates(alpha, beta, dict(zip(rates.memory, memory))), usable > 0, finite > 0)


def values(problem: Problem, state: State, total: Total, found: Signals, decision: Decision) -> Tensor:
    """Those of `problem.metrics`, and how many ranks were asked to stop: float64."""
    batch, sums = problem.config.task.batch, total.sums
    return torch.stack([x.double() for x in (
        sums.loss / batch, sums.support_loss / batch, state.rates.alpha.mean(), decision.rates.beta,
        found.alpha_gradient.sum(), -found.product, ~decision.usable, ~decision.finite,
        *(sums.metrics[name] / batch for name in problem.of_loss), total.stopping)])


def snapshot(state: State) -> dict[str, Tensor]:
    """The whole training state by name, as checkpoints hold it, whatever the engine. Every rank must call."""
    return state.engine.state() | names.of_rates(state.rates)


def restored(engine: Engine, tensors: dict[str, Tensor], iteration: int) -> State:
    """The inverse; `engine` takes the tensors over."""
    engine.load(names.without_rates(tensors))
    return State(engine, names.rates_of(tensors), iteration)
