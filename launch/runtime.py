"""From the environment that torchrun (or SLURM) sets to a World: the process group, the device, the signals."""
from __future__ import annotations

import atexit
import ctypes
import gc
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # noqa: F401  its default arguments would keep a group that is there already alive

from alpha_maml.errors import InputError, first_line
from alpha_maml.trainer.engines.collective import World

PR_SET_PDEATHSIG = 1  # linux/prctl.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def environment(name: str, default: int) -> int:
    """An integer of the launcher's environment; raises InputError where it is none."""
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise InputError(f"{name}: {text!r} must be a whole number; start with torchrun, which sets it, or unset it")
    return int(text)


def settle() -> None:
    """Spares a process that computes for long two habits. glibc hands blocks above 32 MB back to the system on every free and
    gets them again page by page, zeroed: a tenth to a third of an iteration on a CPU. Python's collector goes through all that
    was imported, again and again: 2 to 4 %."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    gc.freeze()


@contextmanager
def world(device: str, timeout: float, keep: bool = False) -> Iterator[World]:
    """This process's place among the ranks, inside a process group where a launcher started several (NCCL on GPUs, gloo
    without). A rank that does not answer within `timeout` seconds ends the run. A group that is there already is used; `keep`
    leaves it there, since one process cannot join a second one of the same launcher.

    Raises InputError for a device that is not there.
    """
    size, rank, local_rank = environment("WORLD_SIZE", 1), environment("RANK", 0), environment("LOCAL_RANK", 0)
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device: cuda was asked for and there is none; use device auto or cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    settle()
    place = torch.device("cpu")
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise InputError(f"LOCAL_RANK: {local_rank} has no GPU, there are {torch.cuda.device_count()}; start at most that "
                             "many processes on this node, or use device cpu")
        place = torch.device("cuda", local_rank)
        torch.cuda.set_device(place)
    elif size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // environment("LOCAL_WORLD_SIZE", size)))
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        grouped = dist.is_initialized()
        yield World(dist.get_rank(), dist.get_world_size(), local_rank, place) if grouped else World(device=place)
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # An agent that is killed takes its processes along: they would train on unseen and keep the run's folder locked.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout),
                                device_id=place if place.type == "cuda" else None)
    except (dist.DistNetworkError, dist.DistStoreError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise InputError(f"MASTER_ADDR: {where} and all {size} ranks cannot be reached within {timeout:g} s "
                         f"({first_line(error)}); check the address, or start with torchrun") from None
    if keep:
        atexit.register(dist.destroy_process_group)
    yield World(rank, size, local_rank, place)
    if not keep:
        dist.destroy_process_group()  # not after an error: with a peer that hangs it would wait once more


class StopRequest:
    """Turns SIGTERM, SIGUSR1, SIGINT and SIGHUP into a wish to stop: the iteration is finished and saved first. A second
    SIGINT ends the process at once. Handlers may run twice, since schedulers signal more than one process."""

    def __init__(self) -> None:
        self.signal: int | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup wants it ignored
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: object) -> None:
        self.signal = number
        if number == signal.SIGINT:  # the system's own way to end works inside a save or a sum over ranks too
            signal.signal(number, signal.SIG_DFL)

    def __call__(self) -> bool:
        return self.signal is not None

    @property
    def code(self) -> int:
        """The exit code of a run that was stopped: the signal's own, SIGTERM's where another rank alone has received it."""
        return 128 + (self.signal or signal.SIGTERM)
