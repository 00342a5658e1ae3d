"""The two-layer perceptron of MAML's sinusoid (Finn et al. 2017, section 5.1)."""
from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """x [n, *input_shape] -> [n, outputs]: two hidden layers of `channels` units with ReLU.

    Weights are normal with standard deviation 0.01 in MAML's code; that start is a plateau for plain SGD, so torch's
    own initialisation is used.
    """

    def __init__(self, input_shape: tuple[int, ...], outputs: int, channels: int = 40):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(prod(input_shape), channels), nn.ReLU(),
            nn.Linear(channels, channels), nn.ReLU(),
            nn.Linear(channels, outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def forward_tasks(self, params: dict[str, Tensor], x: Tensor) -> Tensor:
        """`forward` of T tasks at once, each with parameters of its own: params by name, each with an axis T in front,
        x [T, n, *input_shape] -> [T, n, outputs]."""
        x = x.flatten(2)
        for i in (1, 3, 5):
            x = x.relu() if i > 1 else x
            x = torch.baddbmm(params[f"layers.{i}.bias"][:, None], x, params[f"layers.{i}.weight"].mT)
        return x
