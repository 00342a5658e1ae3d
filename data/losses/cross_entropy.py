"""Cross-entropy, the loss of classification."""
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and accuracy of logits [..., n, N] against labels [..., n]."""
    accuracy = (logits.detach().argmax(-1) == labels).to(logits.dtype).mean(-1)
    right = labels[..., None] == torch.arange(logits.shape[-1], device=logits.device)  # gather would tie a graph to one size
    return -torch.where(right, F.log_softmax(logits, -1), 0).sum(-1).mean(-1), accuracy


def cross_entropy_of_present(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`cross_entropy` among a task's own classes, which are those up to its highest label; the logits [..., n, N] of the others
    take no part."""
    absent = torch.arange(logits.shape[-1], device=logits.device) > labels.amax(-1)[..., None, None]
    return cross_entropy(logits.masked_fill(absent, torch.finfo(logits.dtype).min), labels)
