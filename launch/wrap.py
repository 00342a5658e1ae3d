"""Meta-gradients for a training loop of one's own: any torch.optim optimiser takes the step, and alpha and beta adapt."""
from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from alpha_maml.data.function import as_task, stacked, usual_loss
from alpha_maml.data.losses.contract import as_loss
from alpha_maml.data.tasks import TaskBatch
from alpha_maml.errors import InputError, say
from alpha_maml.models import checks
from alpha_maml.models.build import usable
from alpha_maml.models.functional import function, learned
from alpha_maml.models.prepare import prepare
from alpha_maml.trainer import config as configuration
from alpha_maml.trainer import objective
from alpha_maml.trainer.core.adaptation import adapt
from alpha_maml.trainer.core.algebra import Params
from alpha_maml.trainer.core.decide import Total, decide, signals
from alpha_maml.trainer.core.inner import InnerLoop, alpha_sizes
from alpha_maml.trainer.core.meta_gradient import meta_gradient as core_meta_gradient
from alpha_maml.trainer.core.meta_gradient import one_task
from alpha_maml.trainer.core.sweep import MetaGradient

Tasks = Iterable[tuple[Any, Any]]  # (support, query) of each


def meta_gradient(model: nn.Module, tasks: Tasks, alpha: float | Tensor = 0.01, *,
                  loss: Callable[[Any, Any], Any] | None = None, steps: int = 1, order: str = "second") -> MetaGradient:
    """The exact meta-gradient of a batch of tasks: sums over the tasks.

    Args:
        model: whose parameters that require a gradient are theta.
        tasks: a pair (support, query) for each task.
        alpha: the inner rate.
        loss: as for `alpha_maml.train`; None: by the type of the targets.
        steps: inner steps K. order: second, first or reptile.

    Returns:
        `gradient` by parameter name, `alpha_gradient` (the derivative by alpha), `loss`, `support_loss`, and `metrics`.

    >>> net = torch.nn.Linear(1, 1)
    >>> x = torch.randn(4, 1)
    >>> found = meta_gradient(net, [((x, 2 * x), (x, 2 * x))], alpha=0.1)
    >>> sorted(found.gradient), found.alpha_gradient.shape
    (['bias', 'weight'], torch.Size([]))
    """
    wrapped = wrap(model, loss=loss, config={"inner.steps": steps, "inner.order": order, "rates.rule": "fixed"})
    batch = wrapped.read(tasks)
    theta = {name: p.detach() for name, p in learned(wrapped.model).items()}
    try:
        rates = torch.as_tensor(alpha, dtype=next(iter(theta.values())).dtype)
    except (TypeError, ValueError):
        raise InputError(f"alpha: {alpha!r} is not a number or a tensor; pass the inner rate") from None
    return wrapped.measure(theta, rates, batch)


class Way(NamedTuple):
    """How this model's tasks are differentiated; known from the first tasks on."""

    loss: Callable
    alone: bool


class wrap:  # noqa: N801  a verb where it is called
    """A module whose `.grad` becomes the exact meta-gradient of a batch of tasks.

    Args:
        module: it is trained in place.
        loss: as for `alpha_maml.train`.
        optimizer: whose groups get beta as their learning rate; without it read `.beta`.
        config: dotted keys of the sections inner, rates and task, such as {"inner.steps": 5, "rates.rule": "paper"}.

    >>> net = torch.nn.Linear(1, 1)
    >>> optimizer = torch.optim.AdamW(net.parameters())
    >>> wrapped = wrap(net, optimizer=optimizer, config={"rates.alpha": 0.1, "rates.beta": 1e-3})
    >>> x = torch.randn(4, 1)
    >>> for _ in range(3):
    ...     optimizer.zero_grad()
    ...     metrics = wrapped.backward([((x, 2 * x), (x, 2 * x))])
    ...     optimizer.step()
    >>> sorted(metrics)
    ['alpha', 'beta', 'loss', 'support_loss']
    """

    def __init__(self, module: nn.Module, *, loss: Callable[[Any, Any], Any] | None = None,
                 optimizer: torch.optim.Optimizer | None = None, config: dict[str, Any] | None = None):
        self.config = configuration.from_keys(config or {}, "in config", {})
        self.model, self.optimizer, self.given = usable(type(module).__name__, module), optimizer, loss
        for line in prepare(type(module).__name__, module):
            say(line)
        self.theta = learned(module)
        self.loop: InnerLoop = objective.inner_loop(self.config, self.theta)
        self.rule, self.apply = objective.rule(self.config), function(module, training=True)
        self.device = next(iter(self.theta.values())).device
        self.rates = objective.first_rates(self.config, alpha_sizes(self.loop, self.theta), self.device)
        self.way: Way | None = None
        self.before: Params | None = None  # theta of the last backward

    @property
    def alpha(self) -> Tensor:
        """The inner rates of the next adaptation."""
        return self.rates.alpha

    @property
    def beta(self) -> float:
        """The meta rate of this iteration's step."""
        return float(self.rates.beta)

    def read(self, tasks: Tasks) -> list[TaskBatch]:
        """The tasks; empty batches and what is no task raise InputError."""
        dtype = next(iter(self.theta.values())).dtype
        found = [as_task(task, dtype, f"tasks: number {number}") for number, task in enumerate(tasks)]
        if not found:
            raise InputError("tasks: the batch is empty; pass a pair (support, query) for each task")
        return found

    def begin(self, first: TaskBatch) -> Way:
        """Tries the model and the loss on the first task."""
        if self.way is None:
            loss = as_loss(self.given) if self.given else usual_loss(first, 1)[0]
            first = first.map(lambda t: t.to(self.device))
            trial = checks.check(type(self.model).__name__, self.model, first.support, loss, None,
                                 self.config.model.randomness, self.config.inner.order == "second", first.query)
            for line in trial.notes + ([trial.alone] if trial.alone else []):
                say(line)
            self.way = Way(loss, trial.alone is not None)
        return self.way

    def measure(self, theta: Params, alpha: Tensor, tasks: list[TaskBatch]) -> MetaGradient:
        """The sums over the tasks at theta."""
        way, batch = self.begin(tasks[0]), stacked(tasks, self.device)
        chunk, forward_tasks = (1, one_task(self.apply)) if way.alone else (self.config.task.chunk, None)
        return core_meta_gradient(self.apply, way.loss, theta, alpha, batch, self.loop, chunk, forward_tasks)

    def backward(self, tasks: Tasks) -> dict[str, float]:
        """Adds the meta-gradient, the mean over the tasks, to `.grad`, and decides alpha and beta.

        Args:
            tasks: a pair (support, query) for each task.

        Returns:
            The means of the losses and of the loss's own metrics; alpha (the mean) and beta.
        """
        theta = {name: p.detach() for name, p in self.theta.items()}
        like, batch = next(iter(theta.values())), self.read(tasks)
        local, count = self.measure(theta, self.rates.alpha.to(like.dtype), batch), len(batch)
        gradient = {name: g / count for name, g in local.gradient.items()}
        # What theta has moved by since the last time is beta times the direction that the optimiser took.
        previous = {name: (self.before[name] - p) / self.rates.beta.to(p.dtype) if self.before else torch.zeros_like(p)
                    for name, p in theta.items()}
        squared, product, previous_squared = (
            torch.stack([(a[name] * b[name]).sum(dtype=torch.float64) for name in theta]).sum()
            for a, b in ((gradient, gradient), (gradient, previous), (previous, previous)))
        total = Total(local._replace(gradient={}), squared, product, previous_squared, torch.zeros(()), {})
        decision = decide(self.rule, self.rates, signals(total, count, 0.0), self.config.on_nonfinite)
        self.before, used = {name: p.clone() for name, p in theta.items()}, self.rates.alpha.mean()
        self.rates = decision.rates
        for name, p in self.theta.items():
            g = torch.where(decision.usable, gradient[name], 0)
            p.grad = g if p.grad is None else p.grad + g
        for group in self.optimizer.param_groups if self.optimizer else ():
            group["lr"] = self.beta
        return {"loss": float(local.loss / count), "support_loss": float(local.support_loss / count), "alpha": float(used),
                "beta": self.beta} | {name: float(value / count) for name, value in local.metrics.items()}

    def adapt(self, support: Any, steps: int | None = None) -> Callable[[Any], Any]:
        """The model adapted to a support set: a function of a batch (x, y) or a dict, in evaluation mode."""
        (task,) = self.read([(support, support)])
        task = task.map(lambda t: t.to(self.device))
        way, theta = self.begin(task), {name: p.detach() for name, p in self.theta.items()}
        loop = self.loop._replace(steps=self.loop.steps if steps is None else steps)
        apply = function(self.model, training=False)
        alpha = self.rates.alpha.to(next(iter(theta.values())).dtype)
        phi = adapt(apply, way.loss, theta, alpha, task.support, loop)
        return lambda batch: apply(phi, batch)
