"""What a frozen backbone costs: a transformer of 50M parameters with adapters of 0.3M, 4 tasks at once, one inner step.

usage: python tests/benchmarks/frozen_memory.py
Prints the process's peak over the backbone's own size, for one meta-gradient after the set-up.
"""
from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor, nn

from alpha_maml.trainer.config import from_keys
from alpha_maml.trainer.engines.collective import World
from alpha_maml.trainer.setup import Parts, set_up
from alpha_maml.trainer.step import train_step

WIDTH, LAYERS, RANK = 1024, 6, 24


class Adapted(nn.Module):
    """A frozen square matrix, and a low-rank one beside it that learns."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.up, self.down = self.backbone
        self.a, self.b = nn.Parameter(torch.randn(RANK, WIDTH) / 32), nn.Parameter(torch.zeros(WIDTH, RANK))
        for part in self.backbone:
            part.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x))) / 4 + x @ self.a.mT @ self.b.mT


class Net(nn.Module):
    def __init__(self, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(Adapted() for _ in range(layers))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def tasks(split: str, number: int) -> tuple:
    x, y = torch.randn(10, WIDTH, generator=torch.Generator().manual_seed(number)), torch.arange(10) % 5
    return (x[:5], y[:5]), (x[5:], y[5:])


def kilobytes(name: str) -> int:
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))


def main() -> None:
    torch.set_num_threads(1)
    keys = {"model.name": "python:Net", "data.name": "python:tasks", "task.batch": 4, "rates.rule": "fixed"}
    config = from_keys(keys, "", {})
    train_step(*set_up(config, World(), parts=Parts(Net(0), tasks)), False)  # the program itself, all of it
    start, model = kilobytes("VmRSS"), Net(LAYERS)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    problem, state = set_up(config, World(), parts=Parts(model, tasks))
    del model
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(3):
        state, _ = train_step(problem, state, False)
    over = (kilobytes("VmHWM") - start) * 1024 / (frozen * 4)
    print(f"frozen {frozen / 1e6:.1f}M, learned {learned / 1e6:.2f}M parameters; peak of a step {over:.2f} backbones")


if __name__ == "__main__":
    main()
