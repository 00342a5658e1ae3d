"""Tasks: what a batch of them looks like, and how one is drawn.

A task is a function of (seed, split, iteration, index in the global batch) and of nothing else: sharding the batch over
more ranks cannot change which tasks are seen, and a resumed run needs only its iteration number.

A batch holds T tasks. Support and query are trees, which are tensors, or tuples or dicts of trees, of any type; every tensor
has the axis T in front, and one of examples behind it. Usual is a pair (x, y); of N ways, S shots and Q queries per class:
    x  support [T, N*S, *input], query [T, N*Q, *input]
    y  class indices [T, N*S], or targets [T, N*S, *output] for regression; queries likewise
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from alpha_maml.data.losses.cross_entropy import cross_entropy, cross_entropy_of_present
from alpha_maml.errors import InputError
from alpha_maml.models import ops

Tree = Any  # a tensor, or a tuple, a list or a dict of trees
SPLITS = ("train", "val", "test")
SIZES_STREAM = 3  # of `draw`; 0 to 2 are classes, examples, rotations

# (outputs, support or query) of one task -> (mean loss over its examples, metrics by name), all scalars: data.losses.
Loss = Callable[[Any, Tree], tuple[Tensor, dict[str, Tensor]]]


class TaskBatch(NamedTuple):
    """T tasks, or one without the axis T; the shapes are in this module's docstring."""

    support: Tree
    query: Tree

    def map(self, function: Callable[[Tensor], Tensor]) -> TaskBatch:
        """The same of every tensor."""
        return TaskBatch(tree_map(function, self.support), tree_map(function, self.query))

    def tensors(self) -> list[Tensor]:
        return tree_leaves((self.support, self.query))

    def __getattr__(self, name: str) -> Any:
        """support_x, support_y, query_x and query_y of pairs."""
        part, _, which = name.rpartition("_")
        if part in ("support", "query") and which in ("x", "y"):
            return getattr(self, part)["xy".index(which)]
        raise AttributeError(name)


def labelled(support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> TaskBatch:
    """Tasks of pairs."""
    return TaskBatch((support_x, support_y), (query_x, query_y))


class TaskSizes(NamedTuple):
    """How many classes a task has and how many examples of each. With a minimum, every training iteration has its own number,
    between the minimum and the full one: all tasks of an iteration have the same, so that nothing is padded (padding would
    enter batch norm's statistics). Validation and test tasks are full."""

    ways: int
    shots: int
    queries: int
    min_ways: int | None = None  # None: always `ways`
    min_shots: int | None = None

    def at(self, seed: int, split: str, iteration: int | Tensor) -> tuple[int, int]:
        """Ways and shots of an iteration, each uniform in its range; a function of (seed, split, iteration)."""
        most = (self.ways, self.shots)
        least = (self.min_ways or self.ways, self.min_shots or self.shots)
        if split != "train" or least == most:
            return most
        uniforms = draw(seed, split, iteration, torch.zeros(1, dtype=torch.int64), SIZES_STREAM, 2)[0].tolist()
        ways, shots = (low + int(u * (high - low + 1)) for u, low, high in zip(uniforms, least, most))
        return ways, shots

    def variety(self) -> int:
        """How many sizes the iterations' tasks have."""
        return (self.ways - (self.min_ways or self.ways) + 1) * (self.shots - (self.min_shots or self.shots) + 1)

    def largest(self) -> TaskSizes:
        """The same without minima."""
        return TaskSizes(self.ways, self.shots, self.queries)

    def cross_entropy(self) -> Loss:
        """The loss of tasks of these ways: a model has `ways` outputs, of which a smaller task uses the first."""
        return cross_entropy if self.min_ways in (None, self.ways) else cross_entropy_of_present


class TaskSource(Protocol):
    """A distribution of tasks."""

    input_shape: tuple[int, ...]
    outputs: int
    sizes: TaskSizes
    loss: Loss  # of a task where task.loss names none
    on_device: bool  # whether a batch is drawn without the host; `iteration` may be a tensor then

    def batch(self, split: str, iteration: int | Tensor, indices: Tensor) -> TaskBatch | list[TaskBatch]:
        """The tasks at `indices` (int64 [T], on the source's device) of the global batch of `iteration`; where their
        shapes differ, in several batches."""
        ...

    def identity(self) -> dict[str, str]:
        """Name and digest of the data, for the record of a run."""
        ...


def first_batch(source: TaskSource, split: str, iteration: int, indices: Tensor) -> TaskBatch:
    """The tasks at `indices`, or those of them that have the shapes of the first."""
    found = source.batch(split, iteration, indices)
    return found[0] if isinstance(found, list) else found


# SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators") as a counter-based generator.
# torch has no stateless generator, and a stateful one would tie a task to the order in which ranks draw. Integer
# arithmetic wraps identically on every device, so a GPU draws the very tasks that a CPU draws.
_GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift(bits: Tensor, n: int) -> Tensor:
    """Logical right shift of int64."""
    return (bits >> n) & ((1 << (64 - n)) - 1)


def _mix(state: Tensor) -> Tensor:
    state = state + _GAMMA
    state = (state ^ _shift(state, 30)) * _MIX_1
    state = (state ^ _shift(state, 27)) * _MIX_2
    return state ^ _shift(state, 31)


def draw(seed: int, split: str, iteration: int | Tensor, indices: Tensor, stream: int, count: int) -> Tensor:
    """Uniform numbers in [0, 1) for each task: float64 [T, count], on the device of `indices`; an iteration that is a tensor
    (int64, of no axis) is there too.

    `stream` names the purpose (classes, rotations, ...), so that purposes do not share numbers.
    """
    drawn = ops.uniforms(seed, SPLITS.index(split), iteration, indices, stream, count)
    if drawn is not None:
        return drawn
    state = torch.zeros_like(indices)
    for part in (seed, SPLITS.index(split), iteration, indices, stream):
        state = _mix(state ^ part)
    counters = torch.arange(count, device=indices.device, dtype=torch.int64)
    return _shift(_mix(state[:, None] + counters * _GAMMA), 11).to(torch.float64) * 2.0**-53


def draw_subset(uniforms: Tensor, size: int) -> Tensor:
    """`size` distinct positions along the last axis of `uniforms` [..., n], in random order: int64 [..., size]."""
    return uniforms.topk(size, dim=-1).indices


def draw_distinct(uniforms: Tensor, counts: Tensor) -> Tensor:
    """Distinct places out of `counts` [...], in random order, one for each of uniforms [..., k]: int64 [..., k].

    The work depends on k alone, however large the counts (`draw_subset` needs a number for every place): the j-th draw picks
    among the places not taken yet, and is moved up by one for each taken place that lies at or below it.
    """
    chosen = torch.empty((*uniforms.shape[:-1], 0), dtype=torch.int64, device=uniforms.device)
    for j in range(uniforms.shape[-1]):
        place = (uniforms[..., j] * (counts - j)).long()[..., None]  # among those not taken
        free_below = chosen.sort(-1).values - torch.arange(j, device=chosen.device)
        chosen = torch.cat([chosen, place + (free_below <= place).sum(-1, keepdim=True)], -1)
    return chosen


def draw_examples(seed: int, split: str, iteration: int | Tensor, indices: Tensor, counts: Tensor, ways: int,
                  examples: int) -> tuple[Tensor, Tensor]:
    """For each task at `indices` [T] `ways` classes out of those whose numbers of examples are `counts` [C], and of each so
    many examples: classes [T, N] and places [T, N, examples], int64, on the device of `indices`."""
    tasks = len(indices)
    classes = draw_distinct(draw(seed, split, iteration, indices, 0, ways),
                            torch.full((tasks,), len(counts), device=indices.device))
    uniforms = draw(seed, split, iteration, indices, 1, ways * examples).view(tasks, ways, examples)
    return classes, draw_distinct(uniforms, counts[classes])


def support_and_query(x: Tensor, shots: int) -> tuple[Tensor, Tensor]:
    """x [T, N, S+Q, ...] as [T, N*S, ...] and [T, N*Q, ...]."""
    return x[:, :, :shots].flatten(1, 2), x[:, :, shots:].flatten(1, 2)


def classification_batch(x: Tensor, shots: int) -> TaskBatch:
    """Tasks of x [T, N, S+Q, *input], class n labelled n."""
    labels = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
    support, query = support_and_query(x, shots)
    return labelled(support, labels.repeat_interleave(shots, 1), query, labels.repeat_interleave(x.shape[2] - shots, 1))


def usable_classes(names: Sequence[object], counts: list[int], split: str, sizes: TaskSizes, where: str,
                   warn: Callable[[str], None]) -> list[int]:
    """The positions of the classes with enough examples for a task; the others are named. Raises InputError where too few
    are left."""
    need = sizes.shots + sizes.queries
    kept = [i for i, count in enumerate(counts) if count >= need]
    for name, count in zip(names, counts):
        if count < need:
            warn(f"{where}: class {name!r} of split {split} has {count} examples, a task needs {need}; it is left out")
    if len(kept) < sizes.ways:
        raise InputError(f"task.ways: {sizes.ways} is more than the {len(kept)} classes of split {split} that have the "
                         f"{need} examples of task.shots + task.queries ({where}); lower one of them, or give more data")
    return kept
