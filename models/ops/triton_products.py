"""Inner products of many tensors in one Triton kernel, for CUDA: torch needs two launches for each tensor."""
from __future__ import annotations

from functools import cache
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # elements that a program has in registers at a time


@triton.jit(do_not_specialize=["length", "tensors"])
def _products(a, b, ends, out, length, tensors, BLOCK: tl.constexpr):
    task, tensor = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, end = tl.load(ends + tensor), tl.load(ends + tensor + 1)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(start, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(a + task * length + at, at < end, 0.0)
        total += (x * tl.load(b + task * length + at, at < end, 0.0)).to(tl.float64)
    tl.store(out + task * tensors + tensor, tl.sum(total, 0))


@cache  # built before a graph is captured, which could not copy from the host
def _ends(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=device)


def products(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """sum(a b) over each tensor [T, ...] but for its first axis: float64 [T, N], products in the tensors' own type."""
    tasks, sizes = len(a[0]), tuple(x[0].numel() for x in a)
    a, b = (torch.cat([x.reshape(tasks, -1) for x in each], 1) for each in (a, b))
    out = torch.empty(tasks, len(sizes), dtype=torch.float64, device=a.device)
    _products[tasks, len(sizes)](a, b, _ends(sizes, a.device), out, sum(sizes), len(sizes), BLOCK=BLOCK, num_warps=8)
    return out
