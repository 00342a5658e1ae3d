"""`alpha_maml.train`: a training from Python, in a script, a notebook, and under torchrun alike."""
from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alpha_maml.data import DATASETS
from alpha_maml.errors import InputError
from alpha_maml.launch import runtime
from alpha_maml.launch.progress import Progress
from alpha_maml.trainer import config as configuration
from alpha_maml.trainer import loop
from alpha_maml.trainer.config import Config
from alpha_maml.trainer.engines.collective import sum_in_place
from alpha_maml.trainer.evaluate import Evaluation, evaluate
from alpha_maml.trainer.learner import Learner, load
from alpha_maml.trainer.runs.figures import draw_curves
from alpha_maml.trainer.runs.metrics import read_metrics
from alpha_maml.trainer.setup import Parts, set_up

Callback = Callable[[int, dict[str, float]], Any]  # (iteration, metrics); True ends the training


class Run:
    """A training that has ended.

    Attributes:
        folder: what it left: config.yaml, metrics.jsonl, summary.json, checkpoints/.
        status: FINISHED, or KILLED where a callback or a signal ended it.
    """

    def __init__(self, config: Config, parts: Parts, status: str):
        self.config, self.parts, self.status, self.folder = config, parts, status, configuration.run_dir(config)

    @property
    def history(self) -> list[dict[str, float]]:
        """A row an iteration: step, timestamp, and metrics by name."""
        return read_metrics(self.folder)

    @cached_property
    def learner(self) -> Learner:
        """What was learned, as fit and predict."""
        return load(self.folder, parts=self.parts)

    def evaluate(self, tasks: int = 600, split: str = "test", steps: int | None = None) -> dict[str, Any]:
        """Means over held-out tasks with 95 % intervals, after `steps` inner steps (the run's K), and the curve over steps."""
        with runtime.world(self.config.device, self.config.engine.timeout, keep=True) as world:
            problem, state = set_up(self.config, world, parts=self.parts)
            state = loop.resume(state, self.folder, world)
            inner = problem.inner(state.iteration)
            result: Evaluation = evaluate(
                problem.apply, problem.source, problem.loss, state.engine.learned(), state.rates.alpha.to(problem.dtype), split,
                tasks, inner._replace(steps=inner.steps if steps is None else steps), world, curve=True,
                forward_tasks=problem.apply_tasks, at_once=problem.evaluated)
        return result.summary()

    def plot(self, target: str | Path | None = None) -> list[Path]:
        """Losses and rates over iterations, as `target`.png and .svg (curves in the run's folder)."""
        return draw_curves([(self.config.rates.rule, self.history)], Path(target or self.folder / "curves"))


def train(model: nn.Module | str, tasks: Any, *, loss: Callable[[Any, Any], Any] | str | None = None,
          config: str | Path | dict[str, Any] | None = None, run_dir: str | Path | None = None,
          callbacks: Sequence[Callback] = ()) -> Run:
    """Learns an initialisation of the model from which a few gradient steps solve a task; adapts both learning rates online.

    Args:
        model: a module, or a name as in `model.name`. A module is left as it is; what requires no gradient is frozen.
        tasks: a function (split, number) -> (support, query), an object with such a method `task`, or a name as in `data.name`.
        loss: a function (outputs, batch) -> scalar, or (scalar, {metric: scalar}), of one task's support or query; or a name.
        config: a YAML file, or a dict of dotted keys such as {"iterations": 500}. Without it nothing is sent to MLflow.
        run_dir: the run's folder; the same call with the same model goes on with, or returns, the run that it holds.
        callbacks: called as (iteration, metrics) as iterations end; one that returns True ends the training.

    Returns:
        The run: its `folder`, `history`, `learner`, `evaluate()` and `plot()`.

    Raises:
        InputError: an argument is wrong; the message names it, its value, the rule, and what to do.

    >>> import torch
    >>> def sines(split, number):
    ...     generator = torch.Generator().manual_seed(number + {"train": 0, "val": 10**6, "test": 2 * 10**6}[split])
    ...     x = 10 * torch.rand(20, 1, generator=generator) - 5
    ...     y = torch.sin(x + 3 * torch.rand(1, generator=generator))
    ...     return (x[:10], y[:10]), (x[10:], y[10:])
    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    >>> run = train(net, sines, config={"iterations": 3, "task.batch": 4, "evaluation.tasks": 4}, run_dir=tmp / "run")
    run: ...
    >>> len(run.history), run.learner.fit([[0.0], [1.0]], [[0.0], [0.8]]).predict([[0.5]]).shape
    (3, (1, 1))
    """
    for callback in callbacks:
        if not callable(callback):
            raise InputError(f"callbacks: {callback!r} cannot be called; pass functions (iteration, metrics)")
    parts = Parts(_module(model), _task(tasks), loss if callable(loss) else None)
    built = _config(model, tasks, loss, config, run_dir, parts)
    asked: list[bool] = []
    with runtime.world(built.device, built.engine.timeout, keep=True) as world:
        progress = Progress(built)

        def watch(iteration: int, metrics: dict[str, float]) -> None:
            progress.watch(iteration, metrics)
            asked.extend(True for callback in callbacks if callback(iteration, dict(metrics)) is True)

        try:
            status = loop.train(built, world, lambda: bool(asked), progress.started, watch, parts)
            sum_in_place(torch.zeros(1, device=world.device), world)  # every rank finds the folder as rank 0 leaves it
        finally:
            progress.finish()
    return Run(built, parts, status)


def _module(model: Any) -> nn.Module | None:
    if isinstance(model, str | nn.Module):
        return None if isinstance(model, str) else model
    raise InputError(f"model: {type(model).__name__} is neither a torch.nn.Module nor a name; pass one of the two")


def _task(tasks: Any) -> Any:
    if isinstance(tasks, str):
        return None
    task = getattr(tasks, "task", tasks)
    if not callable(task):
        raise InputError(f"tasks: {type(tasks).__name__} is neither a function (split, number) -> (support, query), nor has a "
                         "method `task`, nor is a name; pass one of these")
    return task


def _config(model: Any, tasks: Any, loss: Any, config: Any, run_dir: Any, parts: Parts) -> Config:
    """The whole configuration; the objects stand in it under names of their own, the module with a digest of its values."""
    content: dict[str, Any] = {"tracking.uri": "disabled"}
    if isinstance(config, dict):
        content |= config
    elif isinstance(config, str | Path):
        content = configuration.read_yaml(Path(config))
    elif config is not None:
        raise InputError(f"config: {type(config).__name__} is neither a YAML file nor a dict of dotted keys; pass one")
    named = getattr(tasks, "__qualname__", type(tasks).__qualname__).rpartition("<locals>.")[2].replace("<lambda>", "tasks")
    content["model.name"] = model if parts.model is None else f"python:{type(model).__qualname__}-{_digest(parts.model)}"
    content["data.name"] = tasks if parts.task is None else f"python:{named}"
    if isinstance(loss, str):
        content["task.loss"] = loss
    if run_dir is not None:
        content["run_dir"] = str(run_dir)
    built = configuration.from_keys(content, "in config" if isinstance(config, dict | None) else f"in {config}", {})
    if parts.task is None and DATASETS.has(built.data.name, "classification") and built.task.ways < 2:
        raise InputError(f"config: task.ways is {built.task.ways}, and {built.data.name} is classification; set it, 5 is usual")
    return built


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, t in model.state_dict().items():
        digest.update(name.encode() + t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
