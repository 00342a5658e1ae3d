"""The two-layer perceptron of MAML's sinusoid (Finn et al. 2017, section 5.1)."""
from __future__ import annotations

from math import prod

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
