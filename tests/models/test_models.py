"""Models by name and by import path, and what is said of those that cannot be used."""
from __future__ import annotations

import pytest
import torch
from torch import nn

from alpha_maml.errors import InputError
from alpha_maml.models.build import build as build_model


class Own(nn.Module):
    def __init__(self, input_shape, outputs, width=3):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(input_shape[0], width), nn.Tanh(), nn.Linear(width, outputs))

    def forward(self, x):
        return self.layers(x)


class Extra(Own):
    def __init__(self, input_shape, outputs, extra):
        super().__init__(input_shape, outputs)
        if extra == "lazy":
            self.more = nn.LazyLinear(2)
        elif extra == "fails":
            raise KeyError("no such extra")
        else:
            self.more = nn.Parameter(torch.ones(2, dtype=getattr(torch, extra)), requires_grad=extra == "complex64")


class Nothing(nn.Module):
    def __init__(self, input_shape, outputs):
        super().__init__()


@pytest.mark.parametrize(("name", "shape", "outputs", "size"), (
    ("mlp", (1,), 1, 40 + 40 + 40 * 40 + 40 + 40 + 1),
    ("conv4", (1, 28, 28), 20, 9 * 64 + 3 * 9 * 64 * 64 + 4 * 2 * 64 + 64 * 20 + 20),
    ("conv4_pooled", (3, 84, 84), 5, 9 * 3 * 64 + 3 * 9 * 64 * 64 + 4 * 2 * 64 + 25 * 64 * 5 + 5),
))
def test_shipped_models_have_their_shapes(name: str, shape: tuple, outputs: int, size: int):
    model = build_model(name, shape, outputs, seed=0)
    assert model(torch.rand(4, *shape)).shape == (4, outputs)
    assert sum(p.numel() for p in model.parameters()) == size


def test_the_seed_alone_decides_the_start():
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first, second, other = (build_model("conv4", (1, 28, 28), 5, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    assert not torch.equal(first.blocks[0].conv.weight, other.blocks[0].conv.weight)
    assert torch.equal(state, torch.random.get_rng_state()), "the user's generator was touched"


def test_a_model_of_ones_own():
    model = build_model("test_models:Own", (2,), 3, 0, args={"width": 7})
    assert model(torch.rand(4, 2)).shape == (4, 3) and model.layers[1].out_features == 7


@pytest.mark.parametrize(("arguments", "words"), (
    (("nowhere.to:Find", (2,), 1, 0), "model.name: 'nowhere.to:Find' cannot be imported"),
    (("test_models:Missing", (2,), 1, 0), "cannot be imported"),
    (("test_models:Own", (2,), 1, 0, 5), "model.args: .* cannot be built .*channels"),
    (("test_models:Extra", (2,), 1, 0, None, {"extra": "lazy"}), r"without a shape \(more.weight\)"),
    (("test_models:Extra", (2,), 1, 0, None, {"extra": "complex64"}), r"a parameter of torch.complex64 \(more\)"),
    (("test_models:Extra", (2,), 1, 0, None, {"extra": "fails"}), "KeyError: 'no such extra', at test_models.py"),
    (("conv4", (1, 28, 28), 1, 0, None, {"norm": "instance"}), "norm 'instance' must be one of batch, frozen, group, layer"),
    (("resnet12", (1, 8, 8), 1, 0), "8 x 8 are too small"),
    (("test_models:Nothing", (2,), 1, 0), "no parameters"),
    (("conv4_pooled", (1, 8, 8), 1, 0), "8 x 8 are too small"),
))
def test_what_cannot_be_used_is_one_line(arguments: tuple, words: str):
    with pytest.raises(InputError, match=words) as caught:
        build_model(*arguments)
    assert "\n" not in str(caught.value)
