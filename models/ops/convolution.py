"""Convolution, and batch normalisation with ReLU, of many tasks at once, each task with parameters of its own; first and second
derivatives by hand.

Why not torch's own: a convolution whose weights differ from task to task becomes a grouped convolution, batch normalisation a
dozen passes over memory, and their second derivatives several times that. A convolution is bilinear, so its value and all its
derivatives are three products, of x with the weight, of dz with the weight, and of dz with x. Each is done in the faster of
two ways (tests/benchmarks/RESULTS.md): as a matrix product (im2col), batched over tasks on a GPU, or where x is large by
torch's convolution, one call a task; one call for all tasks where they share the weight, as in the first inner step. On a GPU
the passes over memory, norm and im2col, are triton_convolution.

Shapes: T tasks, n images, C channels in, O out, P = h' w' positions out, channels last throughout.
    x [T, n, h, w, C]   weight [T, O, 3, 3, C]   z [T, n, h', w', O]   columns [T, n P, 9 C]   gain, shift [T, O]
"""
# An autograd.Function takes what it is given.
# pyright: reportIncompatibleMethodOverride=false
from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from alpha_maml.models.ops.device import EPS, runs_triton

COLUMNS = 2**18  # numbers in a task's columns up to which a CPU is faster with them than with torch's convolution
DIRECT = 5e6  # multiply-adds of a task from which a CPU is faster with torch's convolution than with summing columns into dx
PARTS = 8  # in which a GPU takes the sum over a first layer's positions
BLOCK = 2**18  # elements that a pass over memory takes at a time on a CPU: what stays in its cache for the next pass
# torch's float32 products are MKL's, which on AMD's processors leaves AVX-512 alone: half the rate of oneDNN's.
ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def positions(size: int, stride: int) -> int:
    return (size - 1) // stride + 1


def shared(weight: Tensor) -> bool:
    """Whether all tasks have the same weight: theta itself, expanded."""
    return weight.stride(0) == 0


def _kernels(x: Tensor) -> ModuleType | None:
    """triton_convolution, where it runs."""
    if not runs_triton(x):
        return None
    from alpha_maml.models.ops import triton_convolution

    return triton_convolution


# The three products, of columns by matrix products or else of x itself by torch's convolution.


def columns_of(x: Tensor, stride: int) -> Tensor:
    """im2col of 3 x 3 windows with a border of one zero, C innermost."""
    if kernels := _kernels(x):
        return kernels.columns_of(x, stride)
    windows = F.pad(x, (0, 0, 1, 1, 1, 1)).unfold(2, 3, stride).unfold(3, 3, stride)  # [T, n, h', w', C, 3, 3]
    return windows.permute(0, 1, 2, 3, 5, 6, 4).reshape(len(x), -1, 9 * x.shape[-1])


def add_columns(columns: Tensor, shape: torch.Size, stride: int) -> Tensor:
    """The transpose of `columns_of`: sums columns into x's shape."""
    if kernels := _kernels(columns):
        return kernels.add_columns(columns, shape, stride)
    tasks, images, height, width, channels = shape
    rows, cols = positions(height, stride), positions(width, stride)
    windows = columns.view(tasks, images, rows, cols, 3, 3, channels)
    padded = columns.new_zeros(tasks, images, height + 2, width + 2, channels)
    for i in range(3):
        for j in range(3):
            padded[:, :, i : i + stride * (rows - 1) + 1 : stride, j : j + stride * (cols - 1) + 1 : stride] += \
                windows[:, :, :, :, i, j]
    return padded[:, :, 1:-1, 1:-1]


def _images_first(x: Tensor) -> Tensor:
    """[n, h, w, C] as torch's convolution takes it, [n, C, h, w], without a copy: memory stays channels last."""
    return x.permute(0, 3, 1, 2)


def _each_task(weight: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Pieces for one convolution call each: a task, or all tasks where they share the weight."""
    if shared(weight):
        yield *(t.flatten(0, 1) for t in tensors), weight[0]
    else:
        yield from zip(*tensors, weight)


def _by_onednn(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype is torch.float32 and ONEDNN is not None


def _times(a: Tensor, b: Tensor) -> Tensor:
    """a [m, k] times b [k, l]."""
    return ONEDNN(a, b.mT, None, "none", [], "") if ONEDNN is not None and _by_onednn(a) else a @ b


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [T, m, k] times b [T, k, l]; one large product where all tasks share b."""
    if shared(b):
        return _times(a.flatten(0, 1), b[0]).unflatten(0, a.shape[:2])
    return torch.stack([_times(*task) for task in zip(a, b)]) if _by_onednn(a) else torch.bmm(a, b)


def product(source: Tensor, weight: Tensor, z_shape: torch.Size, stride: int, columns: bool) -> Tensor:
    """z; `source` is x's columns or x."""
    if columns:
        return _matmul(source, weight.flatten(2).mT).view(z_shape)
    z = weight.new_empty(z_shape)
    for out, x_t, w in _each_task(weight, z, source):
        out.copy_(F.conv2d(_images_first(x_t), _images_first(w), stride=stride, padding=1).permute(0, 2, 3, 1))
    return z


def product_on_x(dz: Tensor, weight: Tensor, like: Tensor, stride: int, columns: bool) -> Tensor:
    """dx from dz; `like` has x's shape."""
    if columns:
        return add_columns(_matmul(dz.flatten(1, -2), weight.flatten(2)), like.shape, stride)
    dx = torch.empty_like(like, memory_format=torch.contiguous_format)
    for out, dz_t, x_t, w in _each_task(weight, dx, dz, like):
        out.copy_(_convolution_backward(dz_t, x_t, w, stride, (True, False, False))[0].permute(0, 2, 3, 1))
    return dx


def product_on_weight(dz: Tensor, source: Tensor, weight: Tensor, stride: int, columns: bool) -> Tensor:
    """d weight from dz and x's columns or x, of each task; `weight` gives its shape."""
    if columns:
        dz = dz.flatten(1, -2)
        few = source.shape[-1] < dz.shape[-1]  # the product wants the longer side last
        if few and source.is_cuda and source.shape[1] % PARTS == 0:  # a small result of a long sum leaves most of a GPU idle
            source, dz = (t.reshape(len(t) * PARTS, -1, t.shape[-1]) for t in (source, dz))
            return torch.bmm(dz.mT, source).unflatten(0, (-1, PARTS)).sum(1).reshape(weight.shape)
        return (_matmul(source.mT, dz).mT if few else _matmul(dz.mT, source)).reshape(weight.shape)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for out, dz_t, x_t, w in zip(dweight, dz, source, weight):
        out.copy_(_convolution_backward(dz_t, x_t, w, stride, (False, True, False))[1].permute(0, 2, 3, 1))
    return dweight


def _convolution_backward(dz: Tensor, x: Tensor, weight: Tensor, stride: int, wanted: tuple[bool, bool, bool]) -> tuple:
    return torch.ops.aten.convolution_backward(_images_first(dz), _images_first(x), _images_first(weight), None, [stride] * 2,
                                               [1, 1], [1, 1], False, [0, 0], 1, wanted)


def _ways(x: Tensor, weight: Tensor, stride: int) -> tuple[bool, bool]:
    """Whether the products of x, and whether those on x, are those of columns."""
    _, images, height, width, channels = x.shape
    count = images * positions(height, stride) * positions(width, stride) * 9 * channels
    columns = x.device.type != "cpu" or count <= COLUMNS
    return columns, columns and (x.device.type != "cpu" or count * weight.shape[1] < DIRECT)


class Convolution(Function):
    """apply(x, weight, stride) -> z, 3 x 3 with a border of one zero."""

    @staticmethod
    def forward(ctx, x, weight, stride):
        ctx.stride, (ctx.columns, ctx.on_x_columns) = stride, _ways(x, weight, stride)
        source = columns_of(x, stride) if ctx.columns else x
        ctx.save_for_backward(x, weight, source)
        z_shape = torch.Size((*x.shape[:2], *(positions(size, stride) for size in x.shape[2:4]), weight.shape[1]))
        return product(source, weight, z_shape, stride, ctx.columns)

    @staticmethod
    def backward(ctx, dz):
        first = ConvolutionFirst.apply(dz, *ctx.saved_tensors, ctx.stride, ctx.columns, ctx.on_x_columns,
                                       ctx.needs_input_grad[0])
        return *first, None


class ConvolutionFirst(Function):
    """The first derivative; without that of x where x is data. Its own derivative is exact; there is no third."""

    @staticmethod
    def forward(ctx, dz, x, weight, source, stride, columns, on_x_columns, with_x):
        ctx.stride, ctx.columns, ctx.on_x_columns, ctx.with_x = stride, columns, on_x_columns, with_x
        ctx.save_for_backward(dz, weight, source)
        dx = product_on_x(dz, weight, x, stride, on_x_columns) if with_x else None
        return dx, product_on_weight(dz, source, weight, stride, columns)

    @staticmethod
    @once_differentiable
    def backward(ctx, ddx, ddweight):
        dz, weight, source = ctx.saved_tensors
        stride, columns = ctx.stride, ctx.columns
        on_dz, on_x, on_weight = product(source, ddweight, dz.shape, stride, columns), None, None
        if ctx.with_x:
            on_x = product_on_x(dz, ddweight, ddx, stride, ctx.on_x_columns)
            ddsource = columns_of(ddx, stride) if columns else ddx
            on_dz += product(ddsource, weight, dz.shape, stride, columns)
            on_weight = product_on_weight(dz, ddsource, weight, stride, columns)
        return on_dz, on_x, on_weight, None, None, None, None, None


# Batch normalisation with ReLU: a = relu(gain zh + shift) with zh = scale (z - mean), by each task's own statistics.


def _blocks(z: Tensor) -> Iterator[slice]:
    """Ranges of tasks of which one tensor fills at most BLOCK elements, on a CPU."""
    step = max(1, BLOCK // z[0].numel()) if z.device.type == "cpu" else len(z)
    return (slice(start, start + step) for start in range(0, len(z), step))


def norm(z: Tensor, gain: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(a, z - mean, scale) of z [T, m, O]; gain, shift and scale [T, 1, O]."""
    if kernels := _kernels(z):
        return kernels.norm(z, gain, shift)
    a, centred, scale = torch.empty_like(z), torch.empty_like(z), torch.empty_like(z[:, :1])
    for b in _blocks(z):
        torch.sub(z[b], z[b].mean(1, keepdim=True), out=centred[b])
        torch.rsqrt(centred[b].square().mean(1, keepdim=True) + EPS, out=scale[b])
        torch.addcmul(shift[b], centred[b], scale[b] * gain[b], out=a[b]).relu_()
    return a, centred, scale


def norm_first(da: Tensor, gain: Tensor, a: Tensor, centred: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dz, d gain, d shift): with dy = da where a > 0, dz = gain scale (dy - mean(dy) - zh mean(dy zh))."""
    if kernels := _kernels(da):
        return kernels.norm_first(da, gain, a, centred, scale)
    count = centred.shape[1]
    dz, dgain, dshift = torch.empty_like(centred), torch.empty_like(scale), torch.empty_like(scale)
    for b in _blocks(centred):
        dy = torch.ops.aten.threshold_backward(da[b], a[b], 0)
        torch.sum(dy, 1, keepdim=True, out=dshift[b])
        torch.mul(scale[b], (dy * centred[b]).sum(1, keepdim=True), out=dgain[b])
        slope = gain[b] * scale[b]
        torch.addcmul(-slope * dshift[b] / count, centred[b], -slope * scale[b] * dgain[b] / count, out=dz[b])
        dz[b].addcmul_(dy, slope)
    return dz, dgain, dshift


def norm_second(ddz: Tensor, ddgain: Tensor, ddshift: Tensor, da: Tensor, gain: Tensor, a: Tensor, centred: Tensor,
                scale: Tensor, dgain: Tensor, dshift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From the cotangents of (dz, d gain, d shift) those of (da, z, gain).

    With U = ddz and the projection P v = v - mean(v) - zh mean(v zh), <U, dz> = gain scale <P U, dy>; zh and scale depend
    on z by d zh / d z = scale P and d scale / d z = -scale^2 zh / count.
    """
    if kernels := _kernels(da):
        return kernels.norm_second(ddz, ddgain, ddshift, da, gain, a, centred, scale, dgain, dshift)
    on_da, on_z, on_gain = torch.empty_like(centred), torch.empty_like(centred), torch.empty_like(scale)
    for b in _blocks(centred):
        _norm_second(ddz[b], ddgain[b], ddshift[b], da[b], gain[b], a[b], centred[b], scale[b], dgain[b], dshift[b],
                     on_da[b], on_z[b], on_gain[b])
    return on_da, on_z, on_gain


def _norm_second(ddz, ddgain, ddshift, da, gain, a, centred, scale, dgain, dshift, on_da, on_z, on_gain) -> None:
    count = centred.shape[1]
    dy = torch.ops.aten.threshold_backward(da, a, 0)
    total = ddz.sum(1, keepdim=True)
    along = scale * (ddz * centred).sum(1, keepdim=True)  # <U, zh>
    inner = (ddz * dy).sum(1, keepdim=True) - (total * dshift + along * dgain) / count  # <P U, dy>
    slope = gain * scale
    torch.mul(scale, inner, out=on_gain)
    on_dy = torch.addcmul(ddshift - slope * total / count, centred, scale * (ddgain - slope * along / count))
    on_da.copy_(torch.ops.aten.threshold_backward(on_dy.addcmul_(ddz, slope), a, 0))
    # h = on_zh = u U + v dy, its mean, and its mean along zh
    u, v = -slope * dgain / count, ddgain - slope * along / count
    mean, mean_along = (u * total + v * dshift) / count, (u * along + v * dgain) / count
    torch.addcmul(-scale * mean, centred, -scale.square() * (mean_along + slope * inner / count), out=on_z)
    on_z.addcmul_(ddz, scale * u).addcmul_(dy, scale * v)


class NormRelu(Function):
    """apply(z [T, ..., O], gain [T, O], shift [T, O]) -> a."""

    @staticmethod
    def forward(ctx, z, gain, shift):
        a, centred, scale = norm(z.flatten(1, -2), gain[:, None], shift[:, None])
        ctx.save_for_backward(z, gain, a, centred, scale)
        return a.view(z.shape)

    @staticmethod
    def backward(ctx, da):
        return NormReluFirst.apply(da, *ctx.saved_tensors)


class NormReluFirst(Function):
    """The first derivative; z is here for the graph alone. Its own derivative is exact; there is no third."""

    @staticmethod
    def forward(ctx, da, z, gain, a, centred, scale):
        dz, dgain, dshift = norm_first(da.flatten(1, -2), gain[:, None], a, centred, scale)
        ctx.save_for_backward(da, gain, a, centred, scale, dgain, dshift)
        return dz.view(z.shape), dgain[:, 0], dshift[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx, ddz, ddgain, ddshift):
        da, gain, *saved = ctx.saved_tensors
        on_da, on_z, on_gain = norm_second(ddz.flatten(1, -2), ddgain[:, None], ddshift[:, None], da.flatten(1, -2),
                                           gain[:, None], *saved)
        return on_da.view(da.shape), on_z.view(da.shape), on_gain[:, 0], None, None, None
