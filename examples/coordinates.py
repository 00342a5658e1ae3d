"""Coordinate networks: each task is one drawing, learned from some of its pixels and tested on the others."""
import math

import torch
from torch import nn

import alpha_maml


def drawing(split: str, number: int):
    """Three discs on a canvas of [-1, 1]^2; where a point lies in one of them the answer is 1."""
    generator = torch.Generator().manual_seed(3 * number + ("train", "val", "test").index(split))
    centres, radii = 1.4 * torch.rand(3, 2, generator=generator) - 0.7, 0.2 + 0.3 * torch.rand(3, generator=generator)
    points = 2 * torch.rand(200, 2, generator=generator) - 1
    inside = ((points[:, None] - centres).norm(dim=-1) < radii).any(1, keepdim=True).float()
    return (points[:100], inside[:100]), (points[100:], inside[100:])


class Siren(nn.Module):
    """Sitzmann et al. 2020: sines for activations."""

    def __init__(self, width: int = 48, frequency: float = 8.0):
        super().__init__()
        self.frequency = frequency
        self.layers = nn.ModuleList([nn.Linear(2, width), nn.Linear(width, width), nn.Linear(width, 1)])
        for layer in self.layers[1:]:
            bound = math.sqrt(6 / width) / frequency
            nn.init.uniform_(layer.weight, -bound, bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            x = torch.sin(self.frequency * layer(x))
        return self.layers[-1](x) + 0.5


torch.manual_seed(0)
run = alpha_maml.train(Siren(), drawing, run_dir="runs/coordinates",
                       config={"iterations": 150, "task.batch": 8, "inner.steps": 3, "evaluation.tasks": 30})
curve = run.evaluate(tasks=30)["curve"]["loss"]
print("squared error after 0 to 3 inner steps:", *(f"{x:.4f}" for x in curve))
assert curve[-1] < 0.9 * curve[0]
