"""Sinusoid regression (Finn et al. 2017, section 5.1): y = A sin(x - phase)."""
from __future__ import annotations

import math

import torch
from torch import Tensor

from alpha_maml.data import Context, Description, Settings
from alpha_maml.data.losses.mean_squared_error import mean_squared_error
from alpha_maml.data.tasks import TaskBatch, TaskSizes, draw, labelled


class Sinusoid:
    """Amplitude in [0.1, 5], phase in [0, pi], x in [-5, 5], all uniform; the same distribution in every split.

    support_x [T, S, 1], support_y [T, S, 1], query_x [T, Q, 1], query_y [T, Q, 1].
    """

    input_shape = (1,)
    outputs = 1
    on_device = True
    loss = staticmethod(mean_squared_error)

    def __init__(self, sizes: TaskSizes, seed: int, dtype: torch.dtype):
        self.sizes, self.seed, self.dtype = sizes, seed, dtype

    @classmethod
    def build(cls, settings: Settings, sizes: TaskSizes, context: Context) -> Sinusoid:
        return cls(sizes, context.seed, context.dtype)

    @classmethod
    def describe(cls, settings: Settings, ways: int) -> Description:
        return Description(cls.input_shape, cls.outputs, mean_squared_error, True)

    def batch(self, split: str, iteration: int | Tensor, indices: Tensor) -> TaskBatch:
        _, shots = self.sizes.at(self.seed, split, iteration)
        uniforms = draw(self.seed, split, iteration, indices, 0, 2 + shots + self.sizes.queries)
        amplitude = 0.1 + 4.9 * uniforms[:, 0, None, None]
        phase = math.pi * uniforms[:, 1, None, None]
        x = 10.0 * uniforms[:, 2:, None] - 5.0
        x, y = x.to(self.dtype), (amplitude * torch.sin(x - phase)).to(self.dtype)
        return labelled(x[:, :shots], y[:, :shots], x[:, shots:], y[:, shots:])

    def identity(self) -> dict[str, str]:
        return {"name": "sinusoid", "digest": "analytic"}
