"""Mean squared error, the loss of regression."""
from __future__ import annotations

from typing import Any

from torch import Tensor

from alpha_maml.data.losses.contract import agree, answers, over_tasks, targets


def mean_squared_error(outputs: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean squared error of outputs against targets, both [n, *output]; targets of a single output may be [n]."""
    return _mean(outputs, batch, 0), {}


def _of_tasks(outputs: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    return _mean(outputs, batch, 1), {}


def _mean(outputs: Any, batch: Any, first: int) -> Tensor:
    """Over the axes from `first` on."""
    found, wanted = answers(outputs), targets(batch)
    if wanted.dim() == found.dim() - 1 and found.shape[-1] == 1:
        wanted = wanted[..., None]
    agree(found.shape, wanted.shape)
    return (found - wanted).square().mean(tuple(range(first - found.dim(), 0)))


over_tasks(mean_squared_error, _of_tasks)
