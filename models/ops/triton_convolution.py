"""The passes of ops.convolution over memory as Triton kernels, for CUDA: one launch each, where torch needs up to thirty.

Of many small tasks an iteration is thousands of small kernels, and their launches are what it waits for. Names, shapes and
formulas are those of ops.convolution; results are the same up to rounding, and the same bits from run to run (no atomics).
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alpha_maml.models.ops.device import EPS

_EPS = tl.constexpr(EPS)
BLOCK = 8  # channels of a program of the norm: 32 bytes of float32, what memory moves at once, and many programs
TILE = 4096  # elements that a program has in registers at a time

# Batch normalisation with ReLU; a, centred and scale are those of `norm`, contiguous. A program has all rows of BLOCK channels
# of one task: first for the sums, then again, from the cache, for the result. Masked rows and channels are loaded as zeros,
# which add nothing to a sum.


@triton.jit
def _columns(channels, BLOCK: tl.constexpr):
    """The program's channels [1, BLOCK], and which of them exist."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    return column, column < channels


@triton.jit
def _program(rows, channels, BLOCK: tl.constexpr):
    """The program's task, where that begins in [T, rows, O], its channels [1, BLOCK], which of them exist, and their place in
    [T, 1, O]."""
    task = tl.program_id(0).to(tl.int64)
    column, exists = _columns(channels, BLOCK)
    return task, task * rows * channels, column, exists, task * channels + column


@triton.jit
def _tile(start, rows, channels, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets within the task [ROWS, BLOCK], and which of them exist."""
    row = start + tl.arange(0, ROWS)[:, None]
    column, exists = _columns(channels, BLOCK)
    return row * channels + column, (row < rows) & exists


@triton.jit
def _masked(value, a):
    """ReLU's derivative, as threshold_backward has it: NaN in a lets it through."""
    return tl.where(a <= 0, 0.0, value)


@triton.jit(do_not_specialize=["rows", "gain_step", "shift_step"])
def _norm(z, gain, shift, a, centred, scale, gain_step, shift_step, rows, channels, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    task, base, column, exists, one = _program(rows, channels, BLOCK)
    count = rows.to(z.dtype.element_ty)
    total = tl.zeros((ROWS, BLOCK), z.dtype.element_ty)
    for start in range(0, rows, ROWS):
        at, mask = _tile(start, rows, channels, ROWS, BLOCK)
        total += tl.load(z + base + at, mask, 0.0)
    mean = tl.sum(total, 0, keep_dims=True) / count
    squares = tl.zeros((ROWS, BLOCK), z.dtype.element_ty)
    for start in range(0, rows, ROWS):
        at, mask = _tile(start, rows, channels, ROWS, BLOCK)
        difference = tl.where(mask, tl.load(z + base + at, mask, 0.0) - mean, 0.0)
        squares += difference * difference
    scaled = tl.rsqrt(tl.sum(squares, 0, keep_dims=True) / count + _EPS)
    tl.store(scale + one, scaled, exists)
    slope = scaled * tl.load(gain + task * gain_step + column, exists, 0.0)
    offset = tl.load(shift + task * shift_step + column, exists, 0.0)
    for start in range(0, rows, ROWS):
        at, mask = _tile(start, rows, channels, ROWS, BLOCK)
        difference = tl.load(z + base + at, mask, 0.0) - mean
        tl.store(centred + base + at, difference, mask)
        y = difference * slope + offset
        tl.store(a + base + at, tl.where(y < 0, 0.0, y), mask)  # maximum would lose NaN


@triton.jit(do_not_specialize=["rows", "gain_step"])
def _norm_first(da, gain, a, centred, scale, dz, dgain, dshift, gain_step, rows, channels, ROWS: tl.constexpr,
                BLOCK: tl.constexpr):
    task, base, column, exists, one = _program(rows, channels, BLOCK)
    count = rows.to(da.dtype.element_ty)
    total = tl.zeros((ROWS, BLOCK), da.dtype.element_ty)
    along = tl.zeros((ROWS, BLOCK), da.dtype.element_ty)
    for start in range(0, rows, ROWS):
        at, mask = _tile(start, rows, channels, ROWS, BLOCK)
        dy = _masked(tl.load(da + base + at, mask, 0.0), tl.load(a + base + at, mask, 0.0))
        total += dy
        along += dy * tl.load(centred + base + at, mask, 0.0)
    scaled = tl.load(scale + one, exists, 0.0)
    on_shift = tl.sum(total, 0, keep_dims=True)
    on_gain = scaled * tl.sum(along, 0, keep_dims=True)
    tl.store(dshift + one, on_shift, exists)
    tl.store(dgain + one, on_gain, exists)
    slope = scaled * tl.load(gain + task * gain_step + column, exists, 0.0)
    for start in range(0, rows, ROWS):
        at, mask = _tile(start, rows, channels, ROWS, BLOCK)
        dy = _masked(tl.load(da + base + at, mask, 0.0), tl.load(a + base + at, mask, 0.0))
        centre = tl.load(centred + base + at, mask, 0.0)
        tl.store(dz + base + at, slope * dy - slope * on_shift / count - centre * (slope * scaled * on_gain / count), mask)


@triton.jit(do_not_specialize=["rows", "gain_step"])
def _norm_second(ddz, ddgain, ddshift, da, gain, a, centred, scale, dgain, dshift, on_da, on_z, on_gain, gain_step, rows,
                 channels, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    task, base, column, exists, one = _program(rows, channels, BLOCK)
    count = rows.to(da.dtype.element_ty)
    total = tl.zeros((ROWS, BLOCK), da.dtype.element_ty)
    along = tl.zeros((ROWS, BLOCK), da.dtype.element_ty)
    inner = tl.zeros((ROWS, BLOCK), da.dtype.element_ty)
    for start in range(0, rows, ROWS):
        at, mask = _tile(start, rows, channels, ROWS, BLOCK)
        cotangent = tl.load(ddz + base + at, mask, 0.0)
        total += cotangent
        along += cotangent * tl.load(centred + base + at, mask, 0.0)
        inner += cotangent * _masked(tl.load(da + base + at, mask, 0.0), tl.load(a + base + at, mask, 0.0))
    scaled = tl.load(scale + one, exists, 0.0)
    on_scale = tl.load(dgain + one, exists, 0.0)
    on_shift = tl.load(dshift + one, exists, 0.0)
    total = tl.sum(total, 0, keep_dims=True)
    along = scaled * tl.sum(along, 0, keep_dims=True)
    inner = tl.sum(inner, 0, keep_dims=True) - (total * on_shift + along * on_scale) / count
    tl.store(on_gain + one, scaled * inner, exists)
    slope = scaled * tl.load(gain + task * gain_step + column, exists, 0.0)
    u = -slope * on_scale / count
    v = tl.load(ddgain + one, exists, 0.0) - slope * along / count
    constant = tl.load(ddshift + one, exists, 0.0) - slope * total / count
    mean = (u * total + v * on_shift) / count
    mean_along = (u * along + v * on_scale) / count + slope * inner / count
    for start in range(0, rows, ROWS):
        at, mask = _tile(start, rows, channels, ROWS, BLOCK)
        cotangent = tl.load(ddz + base + at, mask, 0.0)
        active = tl.load(a + base + at, mask, 0.0)
        dy = _masked(tl.load(da + base + at, mask, 0.0), active)
        normed = scaled * tl.load(centred + base + at, mask, 0.0)
        tl.store(on_da + base + at, _masked(constant + normed * v + cotangent * slope, active), mask)
        tl.store(on_z + base + at, scaled * (u * cotangent + v * dy - mean - normed * mean_along), mask)


def _launch(kernel: triton.JITFunction, like: Tensor, *arguments: Tensor | int) -> None:
    tasks, rows, channels = like.shape
    tile = 512 if rows > 128 else 128  # two sizes: each is compiled
    kernel[tasks, triton.cdiv(channels, BLOCK)](*arguments, rows, channels, ROWS=tile, BLOCK=BLOCK,
                                                num_warps=8 if tile > 128 else 4)


def _of_tasks(x: Tensor) -> Tensor:
    """gain or shift [T, 1, O], which all tasks may share (expanded), as the kernels take it: with a step from task to task."""
    return x if x.stride(2) == 1 else x.contiguous()


def norm(z: Tensor, gain: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    z, gain, shift = z.contiguous(), _of_tasks(gain), _of_tasks(shift)
    a, centred, scale = torch.empty_like(z), torch.empty_like(z), torch.empty_like(z[:, :1])
    _launch(_norm, z, z, gain, shift, a, centred, scale, gain.stride(0), shift.stride(0))
    return a, centred, scale


def norm_first(da: Tensor, gain: Tensor, a: Tensor, centred: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gain = _of_tasks(gain)
    dz, dgain, dshift = torch.empty_like(centred), torch.empty_like(scale), torch.empty_like(scale)
    _launch(_norm_first, a, da.contiguous(), gain, a, centred, scale, dz, dgain, dshift, gain.stride(0))
    return dz, dgain, dshift


def norm_second(ddz: Tensor, ddgain: Tensor, ddshift: Tensor, da: Tensor, gain: Tensor, a: Tensor, centred: Tensor,
                scale: Tensor, dgain: Tensor, dshift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gain = _of_tasks(gain)
    on_da, on_z, on_gain = torch.empty_like(centred), torch.empty_like(centred), torch.empty_like(scale)
    _launch(_norm_second, a, ddz.contiguous(), ddgain.contiguous(), ddshift.contiguous(), da.contiguous(), gain, a, centred,
            scale, dgain, dshift, on_da, on_z, on_gain, gain.stride(0))
    return on_da, on_z, on_gain


# im2col and its transpose. Tasks and images are one axis. Divisions are few: one a row and one a column of a tile, none an
# element, since an element's place is the sum of its row's and its column's.


@triton.jit(do_not_specialize=["total", "height", "width", "rows", "cols"])
def _columns_of(x, columns, total, height, width, rows, cols, channels, STRIDE: tl.constexpr, ROWS: tl.constexpr,
                BLOCK: tl.constexpr):
    position = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]  # of the windows
    image = (position // (rows * cols)).to(tl.int64)
    top = position // cols % rows * STRIDE - 1
    left = position % cols * STRIDE - 1
    column, exists = _columns(9 * channels, BLOCK)
    tap = column // channels
    i, j = tap // 3, tap % 3
    mask = (position < total) & exists
    inside = (top + i >= 0) & (top + i < height) & (left + j >= 0) & (left + j < width)
    corner = x + (image * height * width + top * width + left) * channels
    value = tl.load(corner + ((i * width + j) * channels + column % channels), mask & inside, 0.0)
    tl.store(columns + position.to(tl.int64) * (9 * channels) + column, value, mask)


@triton.jit(do_not_specialize=["total", "height", "width", "rows", "cols"])
def _add_columns(columns, x, total, height, width, rows, cols, channels, STRIDE: tl.constexpr, ROWS: tl.constexpr,
                 BLOCK: tl.constexpr):
    position = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]  # of x
    image = (position // (height * width)).to(tl.int64)
    down = position // width % height + 1
    right = position % width + 1
    channel, exists = _columns(channels, BLOCK)
    mask = (position < total) & exists
    value = tl.zeros((ROWS, BLOCK), x.dtype.element_ty)
    for i in tl.static_range(3):
        for j in tl.static_range(3):
            row, col = (down - i) // STRIDE, (right - j) // STRIDE
            # Products, not remainders, say that a window begins there: they are right below zero too.
            begins = (row * STRIDE == down - i) & (col * STRIDE == right - j)
            inside = begins & (row >= 0) & (row < rows) & (col >= 0) & (col < cols)
            window = columns + ((image * rows + row) * cols + col) * (9 * channels)
            value += tl.load(window + ((3 * i + j) * channels + channel), mask & inside, 0.0)
    tl.store(x + position.to(tl.int64) * channels + channel, value, mask)


def _launch_windows(kernel: triton.JITFunction, source: Tensor, out: Tensor, x_shape: torch.Size, stride: int) -> None:
    *_, height, width, channels = x_shape
    last = out.shape[-1]
    total, block = out.numel() // last, min(64, triton.next_power_of_2(last))
    tile = TILE // block
    rows, cols = (height - 1) // stride + 1, (width - 1) // stride + 1
    kernel[triton.cdiv(total, tile), triton.cdiv(last, block)](source, out, total, height, width, rows, cols, channels,
                                                               STRIDE=stride, ROWS=tile, BLOCK=block, num_warps=8)


def columns_of(x: Tensor, stride: int) -> Tensor:
    tasks, images, height, width, channels = x.shape
    columns = x.new_empty(tasks, images * ((height - 1) // stride + 1) * ((width - 1) // stride + 1), 9 * channels)
    _launch_windows(_columns_of, x.contiguous(), columns, x.shape, stride)
    return columns


def add_columns(columns: Tensor, shape: torch.Size, stride: int) -> Tensor:
    x = columns.new_empty(shape)
    _launch_windows(_add_columns, columns.contiguous(), x, shape, stride)
    return x
