"""models/native.cpp against torch's own convolution, batch normalisation and pooling, and in a whole run."""
from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import newest_state
from processes import ROOT, command, succeed
from torch import Tensor
from torch.nn import functional as F

from alpha_maml.errors import InputError
from alpha_maml.models.conv4 import Conv4
from alpha_maml.models.ops import EPS, native
from alpha_maml.trainer.setup import cache

CACHE = cache()
SHAPES = (  # images, side, colours, channels, stride, pooled, whether tasks share the parameters
    (5, 14, 64, 64, 2, False, False), (7, 28, 1, 64, 2, False, True), (20, 7, 32, 32, 2, False, True),
    (6, 4, 32, 48, 2, False, False), (1, 3, 16, 16, 2, False, False), (3, 9, 16, 32, 1, True, False),
    (2, 10, 3, 32, 1, True, True), (13, 5, 5, 80, 1, True, False), (3, 6, 4, 32, 2, False, False),
    (2, 6, 12, 16, 1, False, True), (2, 7, 2, 48, 2, False, False),
    (4, 12, 32, 16, 1, False, True), (2, 21, 16, 48, 1, True, False), (1, 100, 16, 16, 1, True, True),  # by squares, as 9 is
    (4, 5, 16, 32, 1, True, False))


@pytest.fixture(autouse=True)
def loaded():
    assert native.enable_native(Conv4((1, 28, 28), 5, 32), CACHE, "c++")


def torch_block(x: Tensor, weight: Tensor, gain: Tensor, shift: Tensor, stride: int, pooled: bool) -> Tensor:
    """One task after the other, by torch's operations, each of which torch itself differentiates twice."""
    done = []
    for x_t, w, g, s in zip(x, weight, gain, shift):
        z = F.conv2d(x_t.permute(0, 3, 1, 2), w.permute(0, 3, 1, 2), stride=stride, padding=1)
        a = F.relu(F.batch_norm(z, None, None, g, s, training=True, eps=EPS))
        done.append((F.max_pool2d(a, 2) if pooled else a).permute(0, 2, 3, 1))
    return torch.stack(done)


def example(shape: tuple, dtype: torch.dtype) -> list[Tensor]:
    images, side, colours, channels, _, _, shared = shape
    generator = torch.Generator().manual_seed(0)

    def some(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64).to(dtype)

    tasks, of = 3, 1 if shared else 3
    theta = [0.2 * some(of, channels, 3, 3, colours), 1 + 0.3 * some(of, channels), 0.3 * some(of, channels)]
    x = some(tasks, images, side, side, colours).requires_grad_(colours % 16 == 0)
    return [x, *(p.expand(tasks, *p.shape[1:]).detach().requires_grad_() for p in theta)]


def value_and_derivatives(block, inputs: list[Tensor], stride: int, pooled: bool) -> list[Tensor]:
    """a, its gradient along some direction, and that gradient's own along others, by the inputs and by the direction."""
    generator = torch.Generator().manual_seed(1)

    def like(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)

    wanted = [t for t in inputs if t.requires_grad]
    a = block(*inputs, stride, pooled)
    along = like(a).requires_grad_()
    first = torch.autograd.grad(a, wanted, along, create_graph=True)
    second = torch.autograd.grad(first, [*wanted, along], [like(g) for g in first], materialize_grads=True)
    return [a, *first, *second]


def as_torch(inputs: list[Tensor], shape: tuple, tolerance: float) -> None:
    """Holds native code against torch's operations in float64."""
    how, exact = shape[4:6], [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    found, expected = value_and_derivatives(native.block, inputs, *how), value_and_derivatives(torch_block, exact, *how)
    assert found[0].abs().sum() > 0
    for i, (f, e) in enumerate(zip(found, expected)):
        assert (f - e).norm() <= tolerance * e.norm(), i


@pytest.mark.parametrize("threads", (1, 2))
@pytest.mark.parametrize(("dtype", "tolerance"), ((torch.float64, 1e-12), (torch.float32, 1e-5)))
@pytest.mark.parametrize("shape", SHAPES)
def test_a_block_and_its_derivatives(shape: tuple, dtype: torch.dtype, tolerance: float, threads: int):
    torch.set_num_threads(threads)
    as_torch(example(shape, dtype), shape, tolerance)


def test_two_blocks_in_a_row():
    """What flows back into a block in the second derivative joins what the block's own second derivative has."""
    shapes = (4, 8, 1, 16, 1, True, False), (4, 4, 16, 32, 2, False, False)
    (x, *one), (_, *two) = (example(shape, torch.float64) for shape in shapes)

    def both(block):
        return lambda *parameters: block(block(x, *parameters[:3], 1, True), *parameters[3:6], *parameters[6:])

    native_, torch_ = (value_and_derivatives(both(block), [*one, *two], 2, False) for block in (native.block, torch_block))
    for i, (f, e) in enumerate(zip(native_, torch_)):
        assert (f - e).norm() <= 1e-12 * e.norm(), i


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[2] % 16])
def test_data_far_from_zero(shape: tuple):
    """Pixels up to 255, whose mean is large beside what tells them apart."""
    x, *parameters = example(shape, torch.float32)
    as_torch([100 + x, *parameters], shape, 2e-4)


@pytest.mark.parametrize("threads", (1, 2))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_products(dtype: torch.dtype, threads: int):
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    a, b = ([torch.randn(3, *sizes, generator=generator, dtype=dtype) for sizes in ((40000,), (7, 3), (1,), (5, 4), (16,))]
            for _ in range(2))
    a[1], b[3] = a[1][:1].expand(3, 7, 3), torch.randn(4, 3, 5, generator=generator, dtype=dtype).permute(1, 2, 0)
    expected = torch.stack([(x * y).double().flatten(1).sum(1) for x, y in zip(a, b)], 1)
    assert torch.allclose(native.products(a, b), expected, rtol=1e-12, atol=1e-12)


def test_what_it_does_not_take():
    x, weight, gain, shift = example(SHAPES[1], torch.float64)
    with pytest.raises(ValueError, match="channels by 16, not 1 and 64"):
        native.block(x.detach().requires_grad_(), weight, gain, shift, 2, False)
    with pytest.raises(ValueError, match="channels by 16, not 1 and 24"):
        native.block(x, weight[:, :24], gain[:, :24], shift[:, :24], 2, False)
    for model in (Conv4((1, 28, 28), 5, 24), Conv4((1, 28, 28), 5, 32, norm="group"), torch.nn.Linear(1, 1)):
        assert not native.enable_native(model, CACHE, "/no/compiler")


ARGUMENTS = ("train", "--data.name", "omniglot", "--model.name", "conv4", "--model.channels", 16, "--task.ways", 5,
             "--task.batch", 3, "--inner.steps", 2, "--iterations", 5, "--evaluation.tasks", 8, "--precision", "float64",
             "--tracking.uri", "disabled")


def test_a_run_with_and_without_it(tmp_path: Path, omniglot_root: str):
    common = (*ARGUMENTS, "--data.root", omniglot_root)
    states, ways = {}, {"without": ("--compile", "false"), "native": ("--compile", "true"), "by itself": ()}
    for name, more in ways.items():
        succeed(*common, *more, "--run_dir", tmp_path / name, ranks=2 if name == "by itself" else 1)
        states[name] = newest_state(tmp_path / name)
    for name in ("native", "by itself"):
        same = [torch.equal(states[name][n], p) for n, p in states["without"].items() if n.startswith("theta")]
        assert same and not all(same), "native code rounds differently: equal bits are a run without it"
        for n, p in states["without"].items():
            assert torch.allclose(states[name][n], p, rtol=1e-8, atol=1e-11), (name, n)


def test_without_a_compiler(tmp_path: Path, omniglot_root: str):
    environment = os.environ | {"CXX": "/no/compiler", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    common = (*ARGUMENTS, "--data.root", omniglot_root, "--run_dir", tmp_path / "r")

    def run(*more: object) -> subprocess.CompletedProcess:
        return subprocess.run(command(*common, *more), cwd=ROOT, env=environment, capture_output=True, text=True)

    refused = run("--compile", "true")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "alpha-maml: compile: true, but native code needs a C++ compiler, and there is no /no/compiler" in refused.stderr
    warned = run()
    assert warned.returncode == 0 and warned.stderr.count("native code needs a C++ compiler") == 1
    assert run("--compile", "false").returncode == 0


@pytest.mark.parametrize(("compiler", "line"), (
    ("/no/compiler", r"native code needs a C\+\+ compiler, and there is no /no/compiler"),
    ("false", r"native code: false cannot compile native.cpp \(it does not say why\)"),
    ("c++", r"native code: .* cannot be made or loaded \(File exists\); name another folder")))
def test_what_cannot_be_compiled(compiler: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, "_library", None)
    folder = tmp_path / "cache"
    if compiler == "c++":
        folder.write_text("no folder")
    model = Conv4((1, 28, 28), 5, 32)
    with pytest.raises(InputError, match=line):
        native.enable_native(model, folder, compiler)
    assert model.native is False and not list(tmp_path.rglob("*.so"))
