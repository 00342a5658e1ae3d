"""A model over tokens and its tasks, importable so that a learner of them can be pickled."""
from __future__ import annotations

import torch
from torch import Tensor, nn
from zoo import generator, halves


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids)).mean(1))


def tokens(split: str, number: int) -> tuple:
    ids = torch.randint(9, (6, 4), generator=generator(split, number))
    return halves({"ids": ids, "labels": torch.arange(6) % 3}, 3)
