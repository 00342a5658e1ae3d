"""ResNet-12: its shapes, and its derivatives."""
from __future__ import annotations

import pytest
import torch
from conftest import Small
from exactness import assert_exact

from alpha_maml.models.build import build as build_model


def test_has_the_papers_layers():
    model = build_model("resnet12", (3, 84, 84), 5, 0)
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len([m for m in convolutions if m.kernel_size == (3, 3)]) == 12
    assert [block.shortcut.out_channels for block in model.blocks] == [64, 160, 320, 640]
    widths = [3, 64, 160, 320, 640]
    weights = sum(9 * (i + 2 * o) * o + i * o + 8 * o for i, o in zip(widths, widths[1:]))
    assert sum(p.numel() for p in model.parameters()) == weights + 641 * 5
    assert model(torch.rand(2, 3, 84, 84)).shape == (2, 5)
    narrow = build_model("resnet12", (1, 28, 28), 5, 0, channels=8)
    assert [block.shortcut.out_channels for block in narrow.blocks] == [8, 20, 40, 80]
    assert narrow(torch.rand(2, 1, 28, 28)).shape == (2, 5)


@pytest.mark.parametrize("order", ("second", "first"))
@pytest.mark.parametrize("steps", (1, 2))
def test_its_meta_gradient_is_exact(steps: int, order: str):
    assert_exact(Small("resnet12"), steps, order)
