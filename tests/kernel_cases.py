"""The Triton kernels against torch: on the GPU, or in Triton's interpreter (TRITON_INTERPRET=1). test_kernels.py runs this file
in a process of its own."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alpha_maml.data import tasks
from alpha_maml.models.ops import convolution, triton_draw
from alpha_maml.models.ops import triton_convolution as kernels
from alpha_maml.models.ops.triton_products import products

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = ((2, 1, 3), (3, 20, 8), (2, 128, 5), (2, 700, 11), (1, 1400, 2))  # T, m, O


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_same(function: str, *arguments: Tensor | torch.Size | int) -> None:
    """The kernel, in float64 and in float32, gives what torch gives on the CPU in float64."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        given = [x.to(DEVICE, dtype) if isinstance(x, Tensor) else x for x in arguments]
        exact = [x.to(dtype).double() if isinstance(x, Tensor) else x for x in arguments]
        found, expected = getattr(kernels, function)(*given), getattr(convolution, function)(*exact)
        for x, y in zip(*((r,) if isinstance(r, Tensor) else r for r in (found, expected)), strict=True):
            assert x.dtype == dtype and x.shape == y.shape
            largest = max(1.0, float(y.nan_to_num().abs().max()))
            torch.testing.assert_close(x.cpu().double(), y, rtol=tolerance, atol=tolerance * largest, equal_nan=True)


def norm_arguments(size: tuple[int, int, int], form: str) -> tuple[Tensor, ...]:
    """(z, gain, shift, da, ddz, ddgain, ddshift)"""
    tasks, rows, channels = size
    large = [random(tasks, rows, channels, seed=i) for i in range(3)]
    small = [random(tasks, 1, channels, seed=i) for i in range(3, 7)]
    large[0] = large[0] * 0.01 + 0.3  # a variance beside which EPS counts, and a mean that E[z^2] - E[z]^2 would not stand
    if form == "expanded":  # theta's own gain and shift, and the cotangents of sums
        small = [*(x[:1].expand(tasks, -1, -1) for x in small[:2]), *(x.mean().expand_as(x) for x in small[2:])]
        large = [large[0], large[1][:, :1].expand_as(large[1]), large[2][..., :1].expand_as(large[2])]
    elif form == "strided":
        large = [x.mT.contiguous().mT for x in large]
        small = [torch.stack((x, x), -1)[..., 0] for x in small]
    elif form == "nan":
        large[0][0, -1, -1] = torch.nan
    return large[0], small[0], small[1], *large[1:], *small[2:]


@pytest.mark.parametrize(("size", "form"), [*((size, "dense") for size in SIZES), (SIZES[2], "expanded"), (SIZES[3], "strided"),
                                            (SIZES[3], "nan")])
def test_norm(size: tuple[int, int, int], form: str):
    z, gain, shift, da, ddz, ddgain, ddshift = norm_arguments(size, form)
    assert_same("norm", z, gain, shift)
    saved = [x.contiguous() for x in convolution.norm(z, gain, shift)]
    assert_same("norm_first", da, gain, *saved)
    _, dgain, dshift = convolution.norm_first(da, gain, *saved)
    assert_same("norm_second", ddz, ddgain, ddshift, da, gain, *saved, dgain, dshift)
    bad = kernels.norm(z.to(DEVICE), gain.to(DEVICE), shift.to(DEVICE))[0].isnan().any(1)
    assert bad.sum() == (form == "nan")


@pytest.mark.parametrize("stride", (1, 2))
@pytest.mark.parametrize("shape", ((1, 1, 28, 28, 1), (2, 1, 14, 14, 5), (2, 3, 7, 7, 3), (1, 2, 4, 4, 72), (2, 1, 2, 2, 32),
                                   (2, 2, 5, 3, 5), (1, 2, 1, 1, 2)))
def test_columns(shape: tuple[int, ...], stride: int):
    x = random(*shape)
    assert_same("columns_of", x, stride)
    assert_same("columns_of", x.movedim(-1, 2).contiguous().movedim(2, -1), stride)
    columns = convolution.columns_of(x, stride)
    assert_same("add_columns", random(*columns.shape), x.shape, stride)


@pytest.mark.parametrize("seed", (0, 1, 12345, 2**31, 2**32 + 7, 2**63 - 1))
def test_draw(seed: int):
    indices = torch.tensor([[0, 0], [5, 1], [2**40, 2]])[:, 0]
    for split, iteration, stream, count in (("train", 0, 0, 1), ("val", 1, 1, 300), ("test", 2**33 + 1, 3, 256)):
        expected = tasks.draw(seed, split, iteration, indices, stream, count)
        for number in (iteration, torch.tensor(iteration, device=DEVICE)):
            found = triton_draw.draw(seed, tasks.SPLITS.index(split), number, indices.to(DEVICE), stream, count)
            assert torch.equal(found.cpu(), expected)
        assert torch.equal(tasks.draw(seed, split, torch.tensor(iteration), indices, stream, count), expected)


@pytest.mark.parametrize(("dtype", "tolerance"), ((torch.float64, 1e-14), (torch.float32, 1e-6)))
def test_products(dtype: torch.dtype, tolerance: float):
    shapes = ((5,), (2, 3, 3, 700), (1,), (4096,), (31, 2))
    a, b = ([random(3, *shape, seed=i).to(DEVICE, dtype) for i, shape in enumerate(shapes, start)] for start in (0, 9))
    b[1] = b[1][:1].expand_as(b[1])  # theta's own
    expected = torch.stack([(x.double() * y.double()).flatten(1).sum(1) for x, y in zip(a, b)], 1)
    size = torch.stack([(x.double() * y.double()).abs().flatten(1).sum(1) for x, y in zip(a, b)], 1)
    assert bool(((products(a, b) - expected).abs() <= tolerance * size).all())
