"""Binary cross-entropy, the loss of multi-label classification."""
from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from alpha_maml.data.losses.contract import agree, answers, targets


def binary_cross_entropy(outputs: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Of logits [n, L] against targets [n, L] of 0 and 1, with the share of labels that are right."""
    logits, wanted = answers(outputs), targets(batch)
    agree(logits.shape, wanted.shape)
    right = ((logits.detach() > 0) == (wanted > 0.5)).to(logits.dtype).mean()
    return F.binary_cross_entropy_with_logits(logits, wanted.to(logits.dtype)), {"accuracy": right}
