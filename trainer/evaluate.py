"""Adaptation measured on held-out tasks, sharded over ranks, with the same result at any world size."""
from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from alpha_maml.data.tasks import Loss, TaskBatch, TaskSource
from alpha_maml.trainer.core.adaptation import Apply, adaptation
from alpha_maml.trainer.core.algebra import Params
from alpha_maml.trainer.core.inner import InnerLoop
from alpha_maml.trainer.engines.collective import World, sum_in_place

CHUNK = 8  # tasks adapted at once; fixed, so that no bit of a task's result depends on how many ranks share the work
CHUNK_INPUTS = 2**21  # numbers that the inputs of a chunk of tasks hold on a GPU, which 8 small ones would not fill
BINS = 15  # of confidence, of equal width, as Guo et al. 2017 take them


class Evaluation(NamedTuple):
    """What E evaluated tasks gave, after each of P counts of inner steps, the last of which is what an evaluation is quoted
    for. Intervals are half of the 95 % interval of the mean over tasks: 1.96 standard deviations over the root of E (nan where
    E is 1). Accuracies are nan for regression, calibration too."""

    after: Sequence[int]  # [P] inner steps, rising
    losses: Tensor  # [E, P] float64, of each task's queries
    accuracies: Tensor  # [E, P] float64
    reliability: Tensor  # [BINS, 3] float64: queries of all tasks, their confidences' sum, those answered right; at the last P

    @property
    def loss(self) -> float:
        return float(self.losses[:, -1].mean())

    @property
    def loss_ci95(self) -> float:
        return float(_interval(self.losses)[-1])

    @property
    def accuracy(self) -> float:
        return float(self.accuracies[:, -1].mean())

    @property
    def accuracy_ci95(self) -> float:
        return float(_interval(self.accuracies)[-1])

    @property
    def ece(self) -> float:
        """Expected calibration error (Guo et al. 2017, equation 3), over the pooled queries of all tasks."""
        count, confidence, right = self.reliability.unbind(1)
        return float((right - confidence).abs().sum() / count.sum())

    def curve(self) -> dict[str, list[float]]:
        """Means and intervals after each count of inner steps."""
        return {"loss": self.losses.mean(0).tolist(), "loss_ci95": _interval(self.losses).tolist(),
                "accuracy": self.accuracies.mean(0).tolist(), "accuracy_ci95": _interval(self.accuracies).tolist()}

    def summary(self) -> dict[str, Any]:
        """For JSON: what does not apply is null."""
        names = ("loss", "loss_ci95", "accuracy", "accuracy_ci95", "ece")
        curve = {name: [_or_null(value) for value in values] for name, values in self.curve().items()}
        return {name: _or_null(getattr(self, name)) for name in names} | {
            "tasks": len(self.losses), "curve": {"steps": list(self.after)} | curve}


def _interval(values: Tensor) -> Tensor:
    return 1.96 * values.std(0) / len(values) ** 0.5 if len(values) > 1 else torch.full_like(values[0], float("nan"))


def _or_null(value: float) -> float | None:
    return value if math.isfinite(value) else None


def evaluate(apply: Apply, source: TaskSource, loss: Loss, theta: Params, alpha: Tensor, split: str, tasks: int,
             loop: InnerLoop, world: World, curve: bool = False,
             progress: Callable[[Sequence[Tensor]], Iterable[Tensor]] = iter, forward_tasks: Apply | None = None) -> Evaluation:
    """Adapts to `tasks` tasks of `split` (always the same ones) by the inner loop `loop` with rates alpha, and answers their
    queries after the last step, or for a `curve` after each. `progress` wraps this rank's chunks of tasks while they are worked
    on. `forward_tasks` is `apply` of many tasks at once, where the model can."""
    after, together = range(loop.steps + 1) if curve else (loop.steps,), forward_tasks is not None
    model = forward_tasks or apply

    def answers(*task: Tensor) -> tuple[Tensor, Tensor]:
        batch, points, outputs = TaskBatch(*task), [], None
        phis = adaptation(model, loss, theta, alpha, batch.support_x, batch.support_y, loop, together)
        for step, phi in enumerate(phis):
            if step in after:
                outputs = model(phi, batch.query_x)
                points.extend(loss(outputs, batch.query_y))
        assert outputs is not None, "the last step is always among those asked for"
        return torch.stack(points, -1).double(), outputs

    results = torch.zeros(tasks, 2 * len(after) + 3 * BINS, dtype=torch.float64, device=world.device)
    at_once = CHUNK
    if together and world.device.type == "cuda":
        sizes, example = source.sizes, math.prod(source.input_shape)
        at_once = max(CHUNK, CHUNK_INPUTS // (sizes.ways * (sizes.shots + sizes.queries) * example))
    chunks = torch.arange(tasks, device=world.device).split(at_once)
    with torch.no_grad():
        for indices in progress(chunks[world.rank :: world.size]):
            batch = source.batch(split, 0, indices)
            points, outputs = (answers if together else vmap(answers))(*batch)
            results[indices] = torch.cat([points, vmap(_reliability)(outputs, batch.query_y).flatten(1)], -1)
    results = sum_in_place(results, world).cpu()  # each task is one rank's: not even the order of a sum differs
    losses, accuracies = results[:, : 2 * len(after)].view(tasks, -1, 2).unbind(-1)
    return Evaluation(after, losses, accuracies, results[:, 2 * len(after) :].sum(0).view(BINS, 3))


def _reliability(outputs: Tensor, labels: Tensor) -> Tensor:
    """One task's part of `Evaluation.reliability`, from logits [n, N] and labels [n]."""
    if labels.is_floating_point():
        return outputs.new_zeros(BINS, 3, dtype=torch.float64)
    confidence, answer = outputs.double().softmax(-1).max(-1)
    values = torch.stack([torch.ones_like(confidence), confidence, (answer == labels).double()], -1)  # [n, 3]
    bins = (confidence * BINS).ceil().clamp(1, BINS) - 1  # bin m holds ]m / BINS, (m + 1) / BINS]
    return (bins[:, None] == torch.arange(BINS, device=bins.device)).double().mT @ values


def write(result: Evaluation, summary: dict[str, Any], folder: Path) -> list[Path]:
    """The files of an evaluation in `folder`: its summary, tasks.csv with a line a task, and the figure."""
    from alpha_maml.trainer.runs.figures import draw_evaluation

    classification = not result.accuracies.isnan().all()
    names = ("loss", "accuracy") if classification else ("loss",)
    columns = torch.stack([result.losses, result.accuracies], -1)[..., : len(names)].flatten(1)  # a task's points in turn
    (folder / "evaluation.json").write_text(json.dumps(summary, indent=1) + "\n")
    with (folder / "tasks.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["task", *(f"{name}_{steps}" for steps in result.after for name in names)])
        table.writerows([task, *row] for task, row in enumerate(columns.tolist()))
    figure = draw_evaluation(result.after, result.curve(), result.reliability.tolist() if classification else None, result.ece,
                             folder / "evaluation")
    return [folder / "evaluation.json", folder / "tasks.csv", *figure]
