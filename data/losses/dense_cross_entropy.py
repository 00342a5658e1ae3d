"""Cross-entropy at many places of an example: segmentation, token classification, the next token."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from alpha_maml.data.losses.contract import IGNORED, agree, answers, targets


def dense_cross_entropy(outputs: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Of logits [n, C, H, W] against labels [n, H, W], or [n, L, C] against [n, L]; labels of -100 take no part."""
    logits, labels = answers(outputs), targets(batch)
    return _places(logits if logits.shape[:-1] == labels.shape else logits.movedim(1, -1), labels)


def next_token(outputs: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Of logits [n, L, V], each against the label [n, L] one place later; labels of -100 take no part."""
    return _places(answers(outputs)[:, :-1], targets(batch)[:, 1:])


def _places(logits: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Means over the places that count; their logits' last axis is that of the classes."""
    agree(logits.shape[:-1], labels.shape)
    counts = labels != IGNORED
    number = counts.sum().clamp(min=1)
    chosen = F.log_softmax(logits, -1).gather(-1, torch.where(counts, labels, 0)[..., None])[..., 0]
    right = ((logits.detach().argmax(-1) == labels) & counts).sum() / number
    return -torch.where(counts, chosen, 0).sum() / number, {"accuracy": right.to(logits.dtype)}
