"""Tasks from data sets that know nothing of tasks: a torch Dataset with labels, a DataLoader, a Hugging Face dataset."""
from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import torch

from alpha_maml.data.losses.contract import TARGETS
from alpha_maml.data.tasks import SPLITS
from alpha_maml.errors import InputError

SHARES = (0.64, 0.16)  # of the classes, train and val; the rest is test: mini-ImageNet's own


class ClassTasks:
    """N-way tasks of a data set's own classes, as `alpha_maml.train` takes them.

    Args:
        dataset: a map-style torch Dataset of (x, label) or of dicts with a label, a DataLoader of one, or one of Hugging Face.
        ways, shots, queries: classes of a task, and support and query examples of each.
        label: the key of the label where examples are dicts; None: the first of labels, y, targets, target, label.
        seed: of the shuffle that shares the classes out among the splits.

    >>> from torch.utils.data import TensorDataset
    >>> data = TensorDataset(torch.randn(120, 3), torch.arange(120) % 12)
    >>> support, query = ClassTasks(data, ways=2, shots=1, queries=3).task("train", 0)
    >>> support[0].shape, query[1].tolist()
    (torch.Size([2, 3]), [0, 0, 0, 1, 1, 1])
    """

    def __init__(self, dataset: Any, ways: int, shots: int, queries: int, label: str | None = None, seed: int = 0):
        self.dataset = getattr(dataset, "dataset", dataset)  # of a DataLoader
        if not hasattr(self.dataset, "__getitem__") or not hasattr(self.dataset, "__len__"):
            raise InputError(f"dataset: {type(dataset).__name__} has no length or no items by number; pass a map-style "
                             "data set")
        self.ways, self.shots, self.queries, self.label = ways, shots, queries, label
        members = defaultdict(list)
        for i, answer in enumerate(self._labels()):
            members[answer].append(i)
        usable = [name for name in sorted(members, key=str) if len(members[name]) >= shots + queries]
        order = np.random.RandomState(seed).permutation(len(usable))  # the legacy generator's stream is frozen
        ends = np.cumsum([round(share * len(usable)) for share in SHARES])
        self.members = {split: [members[usable[i]] for i in part] for split, part in zip(SPLITS, np.split(order, ends))}
        for split, classes in self.members.items():
            if len(classes) < ways:
                raise InputError(f"ways: {ways} is more than the {len(classes)} classes of split {split} that have the "
                                 f"{shots + queries} examples of shots + queries; lower one of them, or give more data")

    def _labels(self) -> list[Any]:
        columns = getattr(self.dataset, "column_names", None)
        if columns:  # of a Hugging Face dataset, without decoding the rest
            return list(self.dataset[self._key(columns)])
        return [self._parts(self.dataset[i])[1] for i in range(len(self.dataset))]

    def _key(self, names: Any) -> str:
        found = self.label or next((name for name in TARGETS if name in names), None)
        if found is None or found not in names:
            raise InputError(f"label: {self.label!r} is no key of the examples ({', '.join(map(str, names))}); name the one of "
                             "the label")
        return found

    def _parts(self, example: Any) -> tuple[Any, Any]:
        """The example without its label, and the label as a plain value."""
        if isinstance(example, dict):
            key = self._key(example)
            x, y = {name: value for name, value in example.items() if name != key}, example[key]
        else:
            x, y = example[0], example[1]
        return x, y.item() if hasattr(y, "item") else y

    def task(self, split: str, number: int) -> tuple[Any, Any]:
        """Task `number` of the split: the classes and the examples that it draws are a function of these alone."""
        random, classes = np.random.RandomState((SPLITS.index(split) * 2**29 + number) % 2**32), self.members[split]
        drawn = [classes[c] for c in random.choice(len(classes), self.ways, replace=False)]
        places = [random.choice(len(members), self.shots + self.queries, replace=False) for members in drawn]
        rows = [[members[i] for i in chosen] for members, chosen in zip(drawn, places)]
        return (self._batch([row[: self.shots] for row in rows]), self._batch([row[self.shots :] for row in rows]))

    def _batch(self, rows: list[list[int]]) -> Any:
        x = [self._parts(self.dataset[i])[0] for row in rows for i in row]
        y = torch.arange(self.ways).repeat_interleave(len(rows[0]))
        if isinstance(x[0], dict):
            return {name: _stacked([example[name] for example in x]) for name in x[0]} | {"labels": y}
        return _stacked(x), y


def _stacked(values: list[Any]) -> torch.Tensor:
    """Tensors, arrays, images of PIL, numbers or lists of them, as one tensor."""
    return torch.stack([torch.as_tensor(np.asarray(value)) for value in values])
