"""A data set of the user's own, by import path: any class with these three methods and `input_shape`.

    class Own:
        input_shape = (3, 84, 84)                        # of one example
        def classes(self, split): ...                    # how many classes the split has: "train", "val" or "test"
        def examples(self, split, c): ...                # how many examples class c of the split has
        def read(self, split, c, places): ...            # those at `places` [n], an array [n, *input_shape] of numbers

One that also has `outputs`, the numbers that an example asks for, is a regression: a class of it is a task of its own, and
`read` returns x [n, *input_shape] and y [n, outputs]. `read` of a classification may return labels of its own beside x, whole
numbers [n] under task.ways; without them a task's classes are numbered. Which classes and examples make up a task is drawn
here, so that sharding and resuming are right whatever the class does; `read` must return the same for the same arguments.
"""
from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alpha_maml.data import DATASETS, Context, Description, Settings
from alpha_maml.data.losses.cross_entropy import cross_entropy
from alpha_maml.data.losses.mean_squared_error import mean_squared_error
from alpha_maml.data.tasks import (
    SPLITS,
    TaskBatch,
    TaskSizes,
    classification_batch,
    draw_examples,
    labelled,
    support_and_query,
    usable_classes,
)
from alpha_maml.errors import InputError
from alpha_maml.registry import reason


def built(name: str, args: dict[str, Any]) -> Any:
    """The user's object; raises InputError where it cannot be had or lacks a part."""
    factory = DATASETS.find(name)
    try:
        own = factory(**args)
    except Exception as error:
        raise InputError(f"data.args: {name} cannot be built from {args} ({reason(error)}); correct data.args") from None
    for part in ("input_shape", "classes", "examples", "read"):
        if not hasattr(own, part):
            raise InputError(f"data.name: {name} has no {part}; give it one, see docs/data.md")
    return own


def shapes(name: str, args: dict[str, Any]) -> tuple[tuple[int, ...], int | None]:
    """input_shape and, for a regression, outputs; from the class where it says them, so that its data need not be there."""
    factory = DATASETS.find(name)
    own = factory if isinstance(getattr(factory, "input_shape", None), tuple) else built(name, args)
    return tuple(own.input_shape), getattr(own, "outputs", None)


class Own:
    """Tasks of the user's data set `name`(**args). support_x [T, N*S, *input_shape] and support_y [T, N*S] int64, or
    [T, S, outputs] for a regression, whose tasks have one way; queries likewise. Raises InputError."""

    on_device = False

    def __init__(self, name: str, args: dict[str, Any], sizes: TaskSizes, seed: int, dtype: torch.dtype, device: torch.device,
                 warn: Callable[[str], None]):
        self.name, self.own, self.sizes = name, built(name, args), sizes
        self.seed, self.dtype, self.device = seed, dtype, device
        self.input_shape, outputs = tuple(self.own.input_shape), getattr(self.own, "outputs", None)
        self.regression = outputs is not None
        if self.regression and sizes.ways != 1:
            raise InputError(f"task.ways: {sizes.ways} must be 1 for regression (data.name {name} has outputs); remove it")
        if not self.regression and (sizes.min_ways or sizes.ways) < 2:
            raise InputError(f"task.ways: {sizes.ways} must be 2 or more for classification (data.name {name} has no outputs), "
                             "and so must task.min_ways; set it, 5 is common")
        self.outputs = outputs if self.regression else sizes.ways
        self.loss = mean_squared_error if self.regression else sizes.cross_entropy()
        self.classes = {}  # split -> those of enough examples, and how many they have
        for split in SPLITS:
            counts = [int(self.own.examples(split, c)) for c in range(int(self.own.classes(split)))]
            kept = usable_classes(range(len(counts)), counts, split, sizes, f"data.name: {name}", warn)
            self.classes[split] = torch.tensor(kept), torch.tensor([counts[i] for i in kept])
        self.digest = hashlib.sha256(repr((name, args, [c.tolist() for c, _ in self.classes.values()])).encode()).hexdigest()

    @classmethod
    def build(cls, settings: Settings, sizes: TaskSizes, context: Context) -> Own:
        return cls(settings.name, settings.args, sizes, context.seed, context.dtype, context.device, context.warn)

    @classmethod
    def describe(cls, settings: Settings, ways: int) -> Description:
        shape, outputs = shapes(settings.name, settings.args)
        if outputs is None:
            return Description(shape, ways, cross_entropy, False)
        return Description(shape, outputs, mean_squared_error, True)

    def batch(self, split: str, iteration: int | Tensor, indices: Tensor) -> TaskBatch:
        ways, shots = self.sizes.at(self.seed, split, iteration)
        kept, counts = self.classes[split]
        classes, places = draw_examples(self.seed, split, iteration, indices.cpu(), counts, ways, shots + self.sizes.queries)
        read = [self._read(split, int(c), p.numpy()) for c, p in zip(kept[classes].flatten(), places.flatten(0, 1))]
        x, *y = (torch.from_numpy(np.stack(part)).unflatten(0, (-1, ways)).to(self.device) for part in zip(*read))
        x, y = x.to(self.dtype), [part.to(self.dtype) if self.regression else part.long() for part in y]
        if not y:
            return classification_batch(x, shots)
        (support_x, query_x), (support_y, query_y) = support_and_query(x, shots), support_and_query(y[0], shots)
        return labelled(support_x, support_y, query_x, query_y)

    def _read(self, split: str, c: int, places: np.ndarray) -> tuple[np.ndarray, ...]:
        """x, or x and y; raises InputError where they are not what was promised."""
        found = self.own.read(split, c, places)
        found = tuple(np.asarray(part) for part in (found if isinstance(found, tuple) else (found,)))
        answers = (len(places), self.outputs) if self.regression else (len(places),)
        wanted = [(len(places), *self.input_shape), answers][:1 + (self.regression or len(found) > 1)]
        if [part.shape for part in found] != wanted or any(part.dtype.kind not in "fiub" for part in found):
            raise InputError(f"data.name: {self.name}.read({split!r}, {c}, places) returned "
                             f"{' and '.join(f'{part.dtype} {part.shape}' for part in found)}, it must return numbers of shape "
                             f"{' and '.join(map(str, wanted))}; correct it")
        return found

    def identity(self) -> dict[str, str]:
        return {"name": self.name, "digest": self.digest[:36]}
