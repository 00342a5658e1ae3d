"""Where ranks meet: the shard of the task batch, sums, and rank 0's word."""
from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from alpha_maml.errors import Failure, first_line

AWAKE = 0.1  # seconds that a rank on a CPU waits for the others without sleeping


@contextmanager
def _together() -> Iterator[None]:
    """Around what all ranks do at once; raises Failure where one of them does not."""
    try:
        yield
    except RuntimeError as error:
        raise Failure(f"another rank has ended, or did not answer within engine.timeout ({first_line(error)})") from error


def _meet(collective: Callable[..., dist.Work | None], tensor: Tensor, *arguments: object) -> None:
    """The collective on `tensor`, to its end. A rank that sleeps meanwhile is woken late, 3 % of an iteration on a CPU."""
    until = time.monotonic() + AWAKE
    with _together():
        work = collective(tensor, *arguments, async_op=tensor.device.type == "cpu")
        if work is None:  # on a GPU's stream
            return
        while not work.is_completed() and time.monotonic() < until:
            os.sched_yield()
        work.wait()


@dataclass(frozen=True)
class World:
    """Who this process is among the ranks; made by the launcher. Size 1 needs no process group."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")

    def shard(self, count: int) -> Tensor:
        """This rank's indices out of `count`: int64, contiguous; sizes differ by at most one and none is dropped."""
        return torch.arange(count, device=self.device).tensor_split(self.size)[self.rank]


def broadcast(tensors: tuple[Tensor, ...], world: World) -> tuple[Tensor, ...]:
    """Rank 0's small tensors (any float type, made float64) on every rank, in one message."""
    packed = torch.cat([t.double().flatten() for t in tensors])
    if world.size > 1:
        _meet(dist.broadcast, packed, 0)
    return tuple(part.view(t.shape) for t, part in zip(tensors, packed.split([t.numel() for t in tensors])))


def broadcast_state(tensors: dict[str, Tensor], number: int, world: World) -> int:
    """Rank 0's tensors into every rank's, in place, and rank 0's number."""
    if world.size == 1:
        return number
    packed = torch.tensor(number, device=world.device)
    with _together():
        for tensor in (*tensors.values(), packed):
            dist.broadcast(tensor, 0)
    return int(packed)


def sum_in_place(tensor: Tensor, world: World) -> Tensor:
    if world.size > 1:
        _meet(dist.all_reduce, tensor)
    return tensor

