"""Mean squared error, the loss of regression."""
from __future__ import annotations

from typing import Any

from torch import Tensor

from alpha_maml.data.losses.contract import answers, over_tasks, targets


@over_tasks
def mean_squared_error(outputs: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean squared error of outputs against targets, both [..., n, output]."""
    return (answers(outputs) - targets(batch)).square().mean((-1, -2)), {}
