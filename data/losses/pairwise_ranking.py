"""Pairwise logistic loss, of ranking (Burges et al. 2005)."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from alpha_maml.data.losses.contract import agree, answers, targets


def pairwise_ranking(outputs: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Of scores [n] or [n, 1] against relevances of the same shape: over all pairs of examples of which one is more relevant,
    with the share of pairs in the right order."""
    scores, relevance = answers(outputs).flatten(), targets(batch).flatten()
    agree(scores.shape, relevance.shape)
    higher = relevance[:, None] > relevance[None]
    margin, number = scores[:, None] - scores[None], higher.sum().clamp(min=1)
    right = ((margin.detach() > 0) & higher).sum() / number
    return torch.where(higher, F.softplus(-margin), 0).sum() / number, {"order": right.to(scores.dtype)}
