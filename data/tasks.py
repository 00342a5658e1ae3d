"""Tasks: what a batch of them looks like, and how one is drawn.

A task is a function of (seed, split, iteration, index in the global batch) and of nothing else: sharding the batch over
more ranks cannot change which tasks are seen, and a resumed run needs only its iteration number.

Shapes used throughout the project:
    T tasks in this rank's shard, N ways (classes), S shots and Q queries per class
    support_x [T, N*S, *input]   support_y [T, N*S] class indices, or [T, N*S, *output] for regression
    query_x   [T, N*Q, *input]   query_y   likewise
"""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

SPLITS = ("train", "val", "test")

# (outputs, targets) of one task -> (mean loss over its examples, accuracy or nan): both scalars. With an axis of tasks in front
# of outputs and targets, the same of each task.
Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class TaskBatch(NamedTuple):
    """T tasks; the shapes are in this module's docstring."""

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor


class TaskSource(Protocol):
    """A distribution of tasks."""

    input_shape: tuple[int, ...]
    outputs: int
    loss: Loss

    def batch(self, split: str, iteration: int, indices: Tensor) -> TaskBatch:
        """The tasks at `indices` (int64 [T], on the source's device) of the global batch of `iteration`."""

    def identity(self) -> dict[str, str]:
        """Name and digest of the data, for the record of a run."""


def classification_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and accuracy of logits [..., n, N] against labels [..., n]."""
    accuracy = (logits.detach().argmax(-1) == labels).to(logits.dtype).mean(-1)
    return -F.log_softmax(logits, -1).gather(-1, labels[..., None])[..., 0].mean(-1), accuracy


def regression_loss(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared error of outputs against targets, both [..., n, output]; accuracy does not apply (nan)."""
    loss = (outputs - targets).square().mean((-1, -2))
    return loss, torch.full_like(loss.detach(), float("nan"))


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


def draw(seed: int, split: str, iteration: int, indices: Tensor, stream: int, count: int) -> Tensor:
    """Uniform numbers in [0, 1) for each task: float64 [T, count], on the device of `indices`.

    `stream` names the purpose (classes, rotations, ...), so that purposes do not share numbers.
    """
    state = torch.zeros_like(indices)
    for part in (seed, SPLITS.index(split), iteration, indices, stream):
        state = _mix(state ^ part)
    counters = torch.arange(count, device=indices.device, dtype=torch.int64)
    return _shift(_mix(state[:, None] + counters * _GAMMA), 11).to(torch.float64) * 2.0**-53


def draw_subset(uniforms: Tensor, size: int) -> Tensor:
    """`size` distinct positions along the last axis of `uniforms` [..., n], in random order: int64 [..., size]."""
    return uniforms.topk(size, dim=-1).indices
