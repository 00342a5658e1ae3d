"""What every loss is, and what losses read from outputs and batches."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

Loss = Callable[[Any, Any], tuple[Tensor, dict[str, Tensor]]]
TARGETS = ("labels", "y", "targets", "target", "label")  # under which a batch that is a dict may hold them
IGNORED = -100  # the label of what takes no part: torch's


def over_tasks(loss: Loss, tasks: Loss | None = None) -> Loss:
    """Marks a loss that, of outputs and targets with an axis of tasks in front, gives each task's; `tasks` does where given."""
    setattr(loss, "over_tasks", tasks or loss)  # noqa: B010  a function's attribute is unknown to type checkers
    return loss


def each_of_tasks(loss: Loss) -> Loss:
    """The loss of many tasks at once, each field with the axis of tasks in front."""
    return getattr(loss, "over_tasks", None) or vmap(loss)


def as_loss(function: Callable[[Any, Any], Any]) -> Loss:
    """A user's function, which may return a scalar alone, as a loss."""
    if hasattr(function, "over_tasks"):
        return function

    def loss(outputs: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        found = function(outputs, batch)
        value, metrics = found if isinstance(found, tuple) else (found, {})
        return value, {name: torch.as_tensor(metric, device=value.device).detach() for name, metric in metrics.items()}

    return loss


def agree(outputs: torch.Size, wanted: torch.Size) -> None:
    """Raises ValueError where the outputs answer for targets of another shape: broadcast, they would train to nonsense."""
    if outputs != wanted:
        raise ValueError(f"the outputs are for targets of shape {list(outputs)}, the targets have {list(wanted)}")


def tried(loss: Loss, trial: Callable[[Any, Any], None]) -> None:
    """Names what raises ValueError where real outputs and a real batch do not fit by their values, which no loss under vmap can
    look at."""
    setattr(loss, "trial", trial)  # noqa: B010


def answers(outputs: Any) -> Tensor:
    """The tensor among a model's outputs: itself, or `logits`, or the first of a tuple."""
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, dict):
        return outputs["logits"] if "logits" in outputs else next(iter(outputs.values()))
    return outputs.logits if hasattr(outputs, "logits") else outputs[0]


def targets(batch: Any) -> Tensor:
    """The tensor that answers are held against: itself, the second of a pair, or what a dict calls one of TARGETS."""
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, dict):
        return next(batch[name] for name in TARGETS if name in batch)
    return batch[1]
