"""The hand-written convolution in float32, whose products on a CPU are others than float64's, against float64."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alpha_maml.models.ops import convolution
from alpha_maml.models.ops.convolution import Convolution


def derivatives(x: Tensor, weight: Tensor, stride: int, shared: bool) -> list[Tensor]:
    """z, its first derivatives along fixed directions, and the derivatives of a function of those."""
    x, weight = x.requires_grad_(), weight.requires_grad_()
    z = Convolution.apply(x, weight[:1].expand(weight.shape) if shared else weight, stride)
    first = torch.autograd.grad((z * z).sum(), (x, weight), create_graph=True)
    second = torch.autograd.grad(sum((g * g).sum() for g in first), (x, weight))
    return [z.detach(), *first, *second]


@pytest.mark.parametrize("ways", ("columns", "columns, and torch's convolution on x", "torch's convolution"))
@pytest.mark.parametrize("shared", (False, True))
@pytest.mark.parametrize("stride", (1, 2))
@pytest.mark.parametrize("shape", ((3, 5, 14, 14, 1), (2, 20, 7, 7, 32), (1, 1, 2, 2, 3)))
def test_float32_gives_what_float64_gives(shape: tuple[int, ...], stride: int, shared: bool, ways: str, monkeypatch):
    monkeypatch.setattr(convolution, "COLUMNS", 0 if ways == "torch's convolution" else float("inf"))
    monkeypatch.setattr(convolution, "DIRECT", float("inf") if ways == "columns" else 0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    weight = torch.randn(shape[0], 16, 3, 3, shape[-1], generator=generator)
    found = derivatives(x.clone(), weight.clone(), stride, shared)
    expected = derivatives(x.double(), weight.double(), stride, shared)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5 * float(b.detach().abs().max()))
