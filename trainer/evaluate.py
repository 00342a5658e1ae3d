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
from torch.utils._pytree import tree_leaves

from alpha_maml.data.losses.contract import answers, each_of_tasks, targets
from alpha_maml.data.tasks import Loss, TaskSource, Tree, first_batch
from alpha_maml.trainer.core.adaptation import Apply, adaptation
from alpha_maml.trainer.core.algebra import Params
from alpha_maml.trainer.core.inner import InnerLoop
from alpha_maml.trainer.core.meta_gradient import inputs_of_task
from alpha_maml.trainer.engines.collective import World, sum_in_place

CHUNK = 8  # tasks adapted at once; fixed, so that no bit of a task's result depends on how many ranks share the work
CHUNK_INPUTS = 2**21  # numbers that the inputs of a chunk of tasks hold on a GPU, which 8 small ones would not fill
BINS = 15  # of confidence, of equal width, as Guo et al. 2017 take them


class Evaluation(NamedTuple):
    """What E evaluated tasks gave, after each of P counts of inner steps, the last of which is what an evaluation is quoted
    for. Intervals are half of the 95 % interval of the mean over tasks: 1.96 standard deviations over the root of E (nan where
    E is 1)."""

    after: Sequence[int]  # [P] inner steps, rising
    values: dict[str, Tensor]  # [E, P] float64, of each task's queries: the loss, and the loss's own metrics
    reliability: Tensor  # [BINS, 3] float64: queries of all tasks, their confidences' sum, those answered right; at the last P;
    # zeros where there is no accuracy

    @property
    def loss(self) -> float:
        return float(self.values["loss"][:, -1].mean())

    @property
    def ece(self) -> float:
        """Expected calibration error (Guo et al. 2017, equation 3), over the pooled queries of all tasks."""
        count, confidence, right = self.reliability.unbind(1)
        return float((right - confidence).abs().sum() / count.sum())

    def figures(self) -> dict[str, float]:
        """Means after the last step, and their intervals as NAME_ci95."""
        return {name: values[-1] for name, values in self.curve().items()}

    def curve(self) -> dict[str, list[float]]:
        """Means and intervals after each count of inner steps."""
        found = {}
        for name, values in self.values.items():
            found |= {name: values.mean(0).tolist(), f"{name}_ci95": _interval(values).tolist()}
        return found

    def summary(self) -> dict[str, Any]:
        """For JSON: what does not apply is null."""
        curve = {name: [_or_null(value) for value in values] for name, values in self.curve().items()}
        quoted = dict.fromkeys(("loss", "loss_ci95", "accuracy", "accuracy_ci95")) | {name: v[-1] for name, v in curve.items()}
        return quoted | {"ece": _or_null(self.ece), "tasks": len(self.values["loss"]),
                         "curve": {"steps": list(self.after)} | curve}


def _interval(values: Tensor) -> Tensor:
    return 1.96 * values.std(0) / len(values) ** 0.5 if len(values) > 1 else torch.full_like(values[0], float("nan"))


def _or_null(value: float) -> float | None:
    return value if math.isfinite(value) else None


def evaluate(apply: Apply, source: TaskSource, loss: Loss, theta: Params, alpha: Tensor, split: str, tasks: int,
             loop: InnerLoop, world: World, curve: bool = False,
             progress: Callable[[Sequence[Tensor]], Iterable[Tensor]] = iter, forward_tasks: Apply | None = None,
             at_once: int = CHUNK) -> Evaluation:
    """Adapts to `tasks` tasks of `split` (always the same ones) by the inner loop `loop` with rates alpha, and answers their
    queries after the last step, or for a `curve` after each. `progress` wraps this rank's chunks of tasks while they are worked
    on. `forward_tasks` is `apply` of many tasks at once, where the model can, `at_once` how many."""
    after, together = range(loop.steps + 1) if curve else (loop.steps,), forward_tasks is not None
    model, measured = forward_tasks or apply, each_of_tasks(loss) if together else loss
    names: list[str] = []

    def measure(support: Tree, query: Tree) -> tuple[Tensor, Tensor]:
        """[..., P, 1 + metrics], and the reliability."""
        points, outputs = [], None
        tasks = len(tree_leaves(support)[0]) if together else 0
        for step, phi in enumerate(adaptation(model, loss, theta, alpha, support, loop, tasks)):
            if step in after:
                outputs = model(phi, query)
                value, metrics = measured(outputs, query)
                names[:] = ["loss", *metrics]
                points.append(torch.stack([x.double() for x in (value, *metrics.values())], -1))
        calibration = vmap(_reliability) if together else _reliability
        bins = points[-1].new_zeros(*points[-1].shape[:-1], BINS, 3)
        if "accuracy" in names:
            logits, labels = answers(outputs), targets(query)
            if labels.dim() == 1 + together and logits.shape[:-1] == labels.shape:
                bins = calibration(logits, labels)
        return torch.stack(points, -2), bins

    found = None
    chunks = torch.arange(tasks, device=world.device).split(at_once)
    if together and at_once > 1 and world.device.type == "cuda":
        at_once = max(CHUNK, CHUNK_INPUTS // inputs_of_task(first_batch(source, split, 0, chunks[0][:1])))
        chunks = torch.arange(tasks, device=world.device).split(at_once)
    with torch.no_grad():
        for indices in progress(chunks[world.rank :: world.size] or chunks[:1]):
            batch = source.batch(split, 0, indices)
            alone = indices.split(1) if isinstance(batch, list) else [indices]  # of several shapes: one by one
            for places in alone:
                part = first_batch(source, split, 0, places) if isinstance(batch, list) else batch
                points, bins = (measure if together else vmap(measure))(*part)
                if found is None:
                    found = points.new_zeros(tasks, points[0].numel() + 3 * BINS)
                if chunks[world.rank :: world.size]:  # else a rank of no task of its own: it learned the sizes
                    found[places] = torch.cat([points.flatten(1), bins.flatten(1)], -1)
    assert found is not None, "there is at least one task"
    found = sum_in_place(found, world).cpu()  # each task is one rank's: not even the order of a sum differs
    values = found[:, : -3 * BINS].view(tasks, len(after), -1)
    return Evaluation(after, dict(zip(names, values.unbind(-1))), found[:, -3 * BINS :].sum(0).view(BINS, 3))


def _reliability(outputs: Tensor, labels: Tensor) -> Tensor:
    """One task's part of `Evaluation.reliability`, from logits [n, N] and labels [n]."""
    confidence, answer = outputs.double().softmax(-1).max(-1)
    values = torch.stack([torch.ones_like(confidence), confidence, (answer == labels).double()], -1)  # [n, 3]
    bins = (confidence * BINS).ceil().clamp(1, BINS) - 1  # bin m holds ]m / BINS, (m + 1) / BINS]
    return (bins[:, None] == torch.arange(BINS, device=bins.device)).double().mT @ values


def write(result: Evaluation, summary: dict[str, Any], folder: Path) -> list[Path]:
    """The files of an evaluation in `folder`: its summary, tasks.csv with a line a task, and the figure."""
    from alpha_maml.trainer.runs.figures import draw_evaluation

    names, classification = list(result.values), bool(result.reliability.sum() > 0)
    columns = torch.stack(list(result.values.values()), -1).flatten(1)  # a task's points in turn
    (folder / "evaluation.json").write_text(json.dumps(summary, indent=1) + "\n")
    with (folder / "tasks.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["task", *(f"{name}_{steps}" for steps in result.after for name in names)])
        table.writerows([task, *row] for task, row in enumerate(columns.tolist()))
    figure = draw_evaluation(result.after, result.curve(), result.reliability.tolist() if classification else None, result.ece,
                             folder / "evaluation")
    return [folder / "evaluation.json", folder / "tasks.csv", *figure]
