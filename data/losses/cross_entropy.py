"""Cross-entropy, the loss of classification."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from alpha_maml.data.losses.contract import agree, answers, over_tasks, targets, tried


@over_tasks
def cross_entropy(outputs: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy and accuracy of logits [..., n, N] against labels [..., n]."""
    return _classes(answers(outputs), targets(batch))


@over_tasks
def cross_entropy_of_present(outputs: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """`cross_entropy` among a task's own classes, which are those up to its highest label; the logits [..., n, N] of the others
    take no part."""
    logits, labels = answers(outputs), targets(batch)
    absent = torch.arange(logits.shape[-1], device=logits.device) > labels.amax(-1)[..., None, None]
    return _classes(logits.masked_fill(absent, torch.finfo(logits.dtype).min), labels)


def _classes(logits: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    agree(logits.shape[:-1], labels.shape)
    accuracy = (logits.detach().argmax(-1) == labels).to(logits.dtype).mean(-1)
    right = labels[..., None] == torch.arange(logits.shape[-1], device=logits.device)  # gather would tie a graph to one size
    return -torch.where(right, F.log_softmax(logits, -1), 0).sum(-1).mean(-1), {"accuracy": accuracy}


def _classes_exist(outputs: Any, batch: Any) -> None:
    highest, number = int(targets(batch).max()), answers(outputs).shape[-1]
    if highest >= number:
        raise ValueError(f"label {highest} is none of the {number} classes that the model has outputs for, which count from 0")


for _loss in (cross_entropy, cross_entropy_of_present):
    tried(_loss, _classes_exist)
