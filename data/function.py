"""Tasks that a function of the user's own makes: task number i of a split, as a pair (support, query)."""
from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from alpha_maml.data import DATASETS, Context, Description, Settings
from alpha_maml.data.losses.contract import TARGETS, targets
from alpha_maml.data.losses.cross_entropy import cross_entropy
from alpha_maml.data.losses.mean_squared_error import mean_squared_error
from alpha_maml.data.tasks import Loss, TaskBatch, TaskSizes
from alpha_maml.errors import InputError
from alpha_maml.registry import reason

Task = Callable[[str, int], Any]  # (split, number) -> (support, query)
NOWHERE = Context(Path(), 0, torch.float32, torch.device("cpu"), print, 1)  # of a task that is only looked at


class FunctionTasks:
    """Tasks task(split, number) for splits train, val and test and numbers from 0, the same for the same arguments.

    Support and query are pairs (x, y), or dicts, or whatever trees of tensors, arrays and numbers the model and the loss take,
    with an axis of examples in front. Numbers with a point become the run's own type, whole ones int64. Tasks of different
    shapes are grouped by shape. Raises InputError for what is not such a function.

    >>> def lines(split, number):
    ...     x = torch.linspace(0, 1, 6)[:, None]
    ...     return (x[:3], number * x[:3]), (x[3:], number * x[3:])
    >>> FunctionTasks("lines", lines, NOWHERE).batch("train", 1, torch.arange(2)).query_x.shape
    torch.Size([2, 3, 1])
    """

    on_device = False

    def __init__(self, name: str, task: Task, context: Context, ways: int = 1):
        self.name, self.task, self.context = name, task, context
        first, again = self._one("train", 0), self._one("train", 0)
        if tree_flatten(first)[1] != tree_flatten(again)[1] or not all(map(_same, first.tensors(), again.tensors())):
            raise InputError(f"data.name: {name}('train', 0) returns another task each time, so that no run could be resumed "
                             "or sharded; draw from a generator that is seeded by the split and the number")
        self.sizes, self.digest = TaskSizes(ways, 1, 1), hashlib.sha256(first.tensors()[0].cpu().numpy().tobytes()).hexdigest()
        x = first.support if isinstance(first.support, dict) else first.support[0]
        self.input_shape = tuple(tree_leaves(x)[0].shape[1:])
        self.loss, self.outputs = usual_loss(first, ways)

    @classmethod
    def build(cls, settings: Settings, sizes: TaskSizes, context: Context) -> FunctionTasks:
        """Of the function, or of the object with a method `task`, at an import path."""
        found = DATASETS.find(settings.name)
        try:
            task = found(**settings.args).task if isinstance(found, type) else partial(found, **settings.args)
        except Exception as error:  # the user's code
            raise InputError(f"data.args: {settings.name} cannot be built from {settings.args} ({reason(error)}); correct "
                             "data.args") from None
        return cls(settings.name, task, context, sizes.ways)

    @classmethod
    def describe(cls, settings: Settings, ways: int) -> Description:
        """By its first task."""
        return cls.build(settings, TaskSizes(ways, 1, 1), NOWHERE).description()

    def description(self) -> Description:
        return Description(self.input_shape, self.outputs, self.loss, self.loss is mean_squared_error)

    def batch(self, split: str, iteration: int | Tensor, indices: Tensor) -> TaskBatch | list[TaskBatch]:
        """One batch; of tasks of several shapes one for each."""
        numbers = (int(iteration) * self.context.batch + indices.cpu()).tolist()
        return stacked([self._one(split, number) for number in numbers], self.context.device)

    def _one(self, split: str, number: int) -> TaskBatch:
        call = f"data.name: {self.name}({split!r}, {number})"
        try:
            found = self.task(split, number)
        except Exception as error:  # the user's code
            raise InputError(f"{call} fails ({reason(error)}); correct it") from None
        return as_task(found, self.context.dtype, call)

    def identity(self) -> dict[str, str]:
        return {"name": self.name, "digest": self.digest[:36]}


def as_task(found: Any, dtype: torch.dtype, call: str) -> TaskBatch:
    """One task of what a user's code gave, by the name `call`. Raises InputError for what is none."""
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise InputError(f"{call} is {_described(found)}, it must be (support, query), each a pair (x, y) or a dict; "
                         "correct it")
    return TaskBatch(*(tree_map(lambda leaf: _tensor(leaf, dtype, call), part) for part in found))


def stacked(tasks: Sequence[TaskBatch], device: torch.device) -> TaskBatch | list[TaskBatch]:
    """Tasks as one batch; of tasks of several shapes one for each."""
    groups = defaultdict(list)
    for task in tasks:
        groups[(tree_flatten(task)[1], *(tuple(t.shape) for t in task.tensors()))].append(task)
    parts = [tree_map(lambda *leaves: torch.stack(leaves).to(device), *group) for group in groups.values()]
    return parts[0] if len(parts) == 1 else parts


def usual_loss(first: TaskBatch, ways: int) -> tuple[Loss, int]:
    """The loss where none is named, and the outputs of a model that asks: by the type of the first task's targets."""
    if isinstance(first.support, dict) and not any(name in first.support for name in TARGETS):
        return cross_entropy, 1
    y = targets(first.support)
    if y.is_floating_point():
        return mean_squared_error, y.shape[-1] if y.dim() > 1 else 1
    return cross_entropy, max(ways, int(y.max()) + 1)


def _tensor(leaf: Any, dtype: torch.dtype, call: str) -> Tensor:
    try:
        tensor = leaf.detach() if isinstance(leaf, Tensor) else torch.as_tensor(np.asarray(leaf))
    except (TypeError, ValueError):
        raise InputError(f"{call} holds {_described(leaf)} where numbers belong; give tensors, arrays or numbers") from None
    if tensor.is_floating_point():
        return tensor.to(dtype)
    return tensor if tensor.dtype in (torch.bool, torch.uint8) else tensor.long()


def _same(a: Tensor, b: Tensor) -> bool:
    """NaN equals NaN."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _described(value: Any) -> str:
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, tuple | list) else type(value).__name__
