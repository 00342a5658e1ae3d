"""The blocks of ops.convolution, and inner products, as native code on a CPU: native.cpp, compiled once for each kind of
processor.

Each of torch's operations passes over the activations of all tasks; native code takes one task through a whole block, and its
products leave out what lies on the border (tests/benchmarks/RESULTS.md).
"""
# An autograd.Function takes what it is given.
# pyright: reportIncompatibleMethodOverride=false
from __future__ import annotations

import ctypes
import hashlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from alpha_maml.errors import InputError
from alpha_maml.models.ops.device import EPS

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ("-std=gnu++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", f"-DEPS={EPS}")
CHANNELS = 16  # of which a block's width is a multiple: a vector of any processor
TENSORS = ("x", "weight", "gain", "shift", "a", "z", "mean", "scale", "da", "dx", "dweight", "dgain", "dshift", "ddx",
           "ddweight", "ddgain", "ddshift", "on_da", "on_x", "on_weight", "on_z", "on_gain", "more", "moments", "sums")
FORWARD, FIRST, SECOND = range(3)


class _Call(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("tasks", "threads", "pooled", "data", "n", "h", "w", "C", "O", "stride")]


class _One(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("apart", ctypes.c_int64)]


class _Tensors(ctypes.Structure):
    _fields_ = [(name, _One) for name in TENSORS]


_library: ctypes.CDLL | None = None


def enable_native(model: nn.Module, folder: Path, compiler: str) -> bool:
    """Makes the model's `forward_tasks` native code wherever it can be; whether it is. What the C++ `compiler` makes is kept
    in `folder`. Raises InputError where the model could, and there is no compiler, or no place for what it makes."""
    global _library
    if getattr(model, "native", None) is None:
        return False
    _library = _library or _loaded(folder, compiler)
    setattr(model, "native", True)  # noqa: B010  a module's attribute is a Tensor or a Module for type checkers
    return True


def loaded() -> bool:
    """Whether `enable_native` has made code ready in this process."""
    return _library is not None


def _loaded(folder: Path, compiler: str) -> ctypes.CDLL:
    # The processor belongs to the name: a home may be shared by machines of several kinds.
    made_of = (SOURCE.read_bytes(), *(x.encode() for x in (*FLAGS, *TENSORS, compiler, _processor())))
    version = hashlib.sha256(b" ".join(made_of)).hexdigest()[:16]
    path = folder / f"native-{version}.so"
    try:
        if not path.exists() or _version(path) != version:
            folder.mkdir(parents=True, exist_ok=True)
            _compile(compiler, path, version)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise InputError(f"native code: {path} cannot be made or loaded ({error.strerror or error}); name another folder in "
                         "XDG_CACHE_HOME") from None


def _version(path: Path) -> str:
    """What the compiled file says that it was made from; empty where it says nothing."""
    try:
        version = ctypes.CDLL(str(path)).version
    except (OSError, AttributeError):  # cut off, or of something else
        return ""
    version.restype = ctypes.c_char_p
    return version().decode()


def _compile(compiler: str, path: Path, version: str) -> None:
    if shutil.which(compiler) is None:
        raise InputError(f"native code needs a C++ compiler, and there is no {compiler}; install g++, or name another in CXX")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # several processes may be here: each leaves a whole file
        made = Path(folder, path.name)
        result = subprocess.run([compiler, *FLAGS, f"-DVERSION={version}", "-o", str(made), str(SOURCE)], capture_output=True,
                                text=True)
        if result.returncode != 0:
            said = (result.stderr.strip().splitlines() or ["it does not say why"])[0]
            raise InputError(f"native code: {compiler} cannot compile {SOURCE.name} ({said}); name another compiler in CXX")
        made.replace(path)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor()


def _run(order: int, stride: int, pooled: bool, outputs: int, x: Tensor, **others: Tensor | None) -> None:
    call = _Call(len(x), torch.get_num_threads(), pooled, "moments" in others, *x.shape[1:], outputs, stride)
    packed = _Tensors()
    for name, t in {"x": x, **others}.items():
        if t is not None:
            setattr(packed, name, _one(t))
    _function("run", x)(ctypes.byref(call), ctypes.byref(packed), order)


def _function(name: str, x: Tensor) -> Callable:
    return getattr(_library, f"{name}_{'float' if x.dtype is torch.float32 else 'double'}")


def _one(t: Tensor) -> _One:
    return _One(t.data_ptr(), t.stride(0) if t.size(0) > 1 else 0)


def _rows(t: Tensor) -> Tensor:
    """t, with each task's part contiguous; tasks may share one."""
    return t if t.is_contiguous() or t[0].is_contiguous() else t.contiguous()


def products(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """sum(a b) over each tensor [T, ...] but for its first axis: float64 [T, N], products in the tensors' own type. Only where
    native code is `loaded`. torch would write the products, write them again as float64, and then sum them."""
    a, b = ([_rows(t) for t in each] for each in (a, b))
    out = a[0].new_empty(len(a[0]), len(a), dtype=torch.float64)
    sizes = (ctypes.c_int64 * len(a))(*(t[0].numel() for t in a))
    left, right = ((_One * len(a))(*map(_one, each)) for each in (a, b))
    counts = (ctypes.c_int64(count) for count in (len(out), torch.get_num_threads(), len(a)))
    _function("products", a[0])(*counts, sizes, left, right, ctypes.c_void_p(out.data_ptr()))
    return out


def _shapes(x: Tensor, outputs: int, stride: int, pooled: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of z and of a."""
    tasks, images, *sides, _ = x.shape
    rows, cols = ((side - 1) // stride + 1 for side in sides)
    z = tasks, images, rows, cols, outputs
    return z, (tasks, images, rows // 2, cols // 2, outputs) if pooled else z


class _Block(Function):
    """(a, z); z only for its derivative, which is the rest of what `_BlockFirst` has for x and weight."""

    @staticmethod
    def forward(ctx, x, weight, gain, shift, stride, pooled):
        x, weight, gain, shift = (_rows(t) for t in (x, weight, gain, shift))
        outputs = weight.shape[1]
        z, a = (x.new_empty(shape) for shape in _shapes(x, outputs, stride, pooled))
        mean, scale = x.new_empty(2, len(x), outputs)
        _run(FORWARD, stride, pooled, outputs, x=x, weight=weight, gain=gain, shift=shift, a=a, z=z, mean=mean, scale=scale)
        ctx.stride, ctx.pooled, ctx.a_shape = stride, pooled, a.shape
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, gain, shift, z, mean, scale)
        return a, z

    @staticmethod
    def backward(ctx, da, dz):
        if da is None:  # nothing but z led here
            da = torch.zeros(ctx.a_shape, dtype=dz.dtype)
        return *_BlockFirst.apply(da, dz, *ctx.saved_tensors, ctx.stride, ctx.pooled, ctx.needs_input_grad[0]), None, None


class _BlockFirst(Function):
    """The first derivative, from that of a, and of z where there is one; without that of x where x is data. Its own derivative,
    of the case without, is exact; there is no third."""

    @staticmethod
    def forward(ctx, da, more, x, weight, gain, shift, z, mean, scale, stride, pooled, with_x):
        da, more = _rows(da), None if more is None else _rows(more)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format) if with_x else None
        dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        dgain, dshift = torch.empty_like(scale), torch.empty_like(scale)
        _run(FIRST, stride, pooled, weight.shape[1], x=x, weight=weight, gain=gain, shift=shift, z=z, mean=mean, scale=scale,
             da=da, more=more, dx=dx, dweight=dweight, dgain=dgain, dshift=dshift)
        ctx.stride, ctx.pooled, ctx.with_x = stride, pooled, with_x
        ctx.save_for_backward(da, x, weight, gain, shift, z, mean, scale, dgain, dshift)
        return dx, dweight, dgain, dshift

    @staticmethod
    @once_differentiable
    def backward(ctx, ddx, ddweight, ddgain, ddshift):
        da, x, weight, gain, shift, z, mean, scale, dgain, dshift = ctx.saved_tensors
        ddweight, ddgain, ddshift = (_rows(t) for t in (ddweight, ddgain, ddshift))
        on_da, on_x, on_weight, on_z, on_gain = torch.empty_like(da), None, None, torch.empty_like(z), torch.empty_like(scale)
        if ctx.with_x:
            on_x, on_weight = torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(ddweight)
        _run(SECOND, ctx.stride, ctx.pooled, weight.shape[1], x=x, weight=weight, gain=gain, shift=shift, z=z, mean=mean,
             scale=scale, da=da, dgain=dgain, dshift=dshift, ddx=_rows(ddx) if ctx.with_x else None, ddweight=ddweight,
             ddgain=ddgain, ddshift=ddshift, on_da=on_da, on_x=on_x, on_weight=on_weight, on_z=on_z, on_gain=on_gain)
        return on_da, None, on_x, on_weight, on_gain, None, on_z, None, None, None, None, None


class _DataBlock(Function):
    """`_Block` of data: of x there is no derivative. Nothing of z's size is kept."""

    @staticmethod
    def forward(ctx, x, weight, gain, shift, stride, pooled):
        x, weight, gain, shift = (_rows(t) for t in (x, weight, gain, shift))
        outputs, seen = weight.shape[1], 9 * x.shape[-1]
        a = x.new_empty(_shapes(x, outputs, stride, pooled)[1])
        moments = x.new_empty(len(x), seen + 1, seen, dtype=torch.float64)  # of what an output sees: covariance, mean
        _run(FORWARD, stride, pooled, outputs, x=x, weight=weight, gain=gain, shift=shift, a=a, moments=moments)
        ctx.stride, ctx.pooled = stride, pooled
        ctx.save_for_backward(x, weight, gain, shift, moments)
        return a

    @staticmethod
    def backward(ctx, da):
        return None, *_DataBlockFirst.apply(da, *ctx.saved_tensors, ctx.stride, ctx.pooled), None, None


class _DataBlockFirst(Function):
    """Its first derivative, whose own is exact; there is no third."""

    @staticmethod
    def forward(ctx, da, x, weight, gain, shift, moments, stride, pooled):
        da = _rows(da)
        tasks, seen, outputs = len(x), moments.shape[-1], weight.shape[1]
        dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        dgain, dshift = x.new_empty(2, tasks, outputs)
        sums = moments.new_empty(tasks, seen + 1, outputs)
        _run(FIRST, stride, pooled, outputs, x=x, weight=weight, gain=gain, shift=shift, da=da, dweight=dweight, dgain=dgain,
             dshift=dshift, moments=moments, sums=sums)
        ctx.stride, ctx.pooled, ctx.a_shape = stride, pooled, da.shape
        ctx.save_for_backward(x, weight, gain, shift, moments, sums)
        return dweight, dgain, dshift

    @staticmethod
    @once_differentiable
    def backward(ctx, ddweight, ddgain, ddshift):
        x, weight, gain, shift, moments, sums = ctx.saved_tensors
        ddweight, ddgain, ddshift = (_rows(t) for t in (ddweight, ddgain, ddshift))
        on_da, on_weight, on_gain = x.new_empty(ctx.a_shape), torch.empty_like(ddweight), torch.empty_like(ddgain)
        _run(SECOND, ctx.stride, ctx.pooled, weight.shape[1], x=x, weight=weight, gain=gain, shift=shift, ddweight=ddweight,
             ddgain=ddgain, ddshift=ddshift, on_da=on_da, on_weight=on_weight, on_gain=on_gain, moments=moments, sums=sums)
        return on_da, None, on_weight, on_gain, None, None, None, None


def block(x: Tensor, weight: Tensor, gain: Tensor, shift: Tensor, stride: int, pooled: bool) -> Tensor:
    """x [T, n, h, w, C], weight [T, O, 3, 3, C], gain and shift [T, O] -> a, channels last: convolution with a border of one
    zero, batch normalisation, ReLU, and 2 x 2 max pooling where `pooled`. Raises ValueError unless O is a multiple of CHANNELS,
    and C too or x in no need of a gradient."""
    if weight.shape[1] % CHANNELS or (x.requires_grad and x.shape[-1] % CHANNELS):
        raise ValueError(f"native code takes channels by {CHANNELS}, not {x.shape[-1]} and {weight.shape[1]}")
    if x.shape[-1] % CHANNELS:
        return _DataBlock.apply(x, weight, gain, shift, stride, pooled)
    return _Block.apply(x, weight, gain, shift, stride, pooled)[0]
