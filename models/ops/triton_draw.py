"""`data.tasks.draw` as one Triton kernel, for CUDA: the same bits in one launch, where torch needs about fifty."""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256  # numbers of a program


@triton.jit
def _mix(state):
    state += 0x9E3779B97F4A7C15
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB
    return state ^ (state >> 31)


@triton.jit(do_not_specialize=["seed", "split", "stream", "count"])
def _draw(indices, iteration, out, seed, split, stream, count, BLOCK: tl.constexpr):
    task = tl.program_id(0)
    state = _mix(seed.to(tl.uint64))
    state = _mix(state ^ split.to(tl.uint64))
    state = _mix(state ^ tl.load(iteration).to(tl.uint64))
    state = _mix(state ^ tl.load(indices + task).to(tl.uint64))
    state = _mix(state ^ stream.to(tl.uint64))
    counter = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    bits = _mix(state + counter.to(tl.uint64) * 0x9E3779B97F4A7C15) >> 11
    tl.store(out + task.to(tl.int64) * count + counter, bits.to(tl.float64) * 1.1102230246251565e-16, counter < count)


def draw(seed: int, split: int, iteration: int | Tensor, indices: Tensor, stream: int, count: int) -> Tensor:
    """`split` by its number. The iteration is read from memory: a captured graph is then right for every iteration."""
    if not isinstance(iteration, Tensor):
        iteration = torch.full((), iteration, dtype=torch.int64, device=indices.device)  # a copy would wait
    tasks, indices = len(indices), indices.contiguous()
    out = torch.empty(tasks, count, dtype=torch.float64, device=indices.device)
    _draw[tasks, triton.cdiv(count, BLOCK)](indices, iteration, out, seed, split, stream, count, BLOCK=BLOCK)
    return out
