"""Adaptation measured on held-out tasks, sharded over ranks, with the same result at any world size."""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from data.tasks import TaskBatch, TaskSource
from trainer.collective import World, sum_in_place
from trainer.inner import InnerLoop, Params
from trainer.maml import Apply, adapt

CHUNK = 8  # tasks adapted at once; fixed, so that no bit of a task's result depends on how many ranks share the work


class Evaluation(NamedTuple):
    """Means over tasks, and half of the 95 % interval of the mean: 1.96 standard deviations over the root of the count.
    Accuracies are nan for regression."""

    loss: float
    loss_ci95: float
    accuracy: float
    accuracy_ci95: float
    tasks: int


def evaluate(apply: Apply, source: TaskSource, theta: Params, alpha: Tensor, split: str, tasks: int,
             loop: InnerLoop, world: World) -> Evaluation:
    """Adapts to `tasks` tasks of `split` (always the same ones) by the inner loop `loop` with rates alpha."""
    def one(*task: Tensor) -> Tensor:
        task = TaskBatch(*task)
        phi = adapt(apply, source.loss, theta, alpha, task.support_x, task.support_y, loop)
        return torch.stack(source.loss(apply(phi, task.query_x), task.query_y)).double()

    results = torch.zeros(tasks, 2, dtype=torch.float64, device=world.device)
    chunks = torch.arange(tasks, device=world.device).split(CHUNK)
    with torch.no_grad():
        for indices in chunks[world.rank :: world.size]:
            results[indices] = vmap(one)(*source.batch(split, 0, indices))
    results = sum_in_place(results, world)
    mean = results.mean(0).tolist()
    spread = (1.96 * results.std(0) / tasks**0.5).tolist() if tasks > 1 else [float("nan")] * 2
    return Evaluation(mean[0], spread[0], mean[1], spread[1], tasks)
