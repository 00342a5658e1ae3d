"""The training that is done harm: real processes, what they say, and what they leave."""
from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from processes import FORKS, ROOT, child, places

from alpha_maml.trainer.runs import checkpoint
from alpha_maml.trainer.runs.metrics import METRICS, read_metrics

ITERATIONS, EVERY = 400, 20
PROBLEM = ("train", "--task.batch", "4", "--evaluation.tasks", "8", "--checkpoint.every", str(EVERY), "--engine.timeout", "20")
TAIL = 2**16  # bytes of a metrics.jsonl that are read at once from its end
GRACE = 15  # seconds for what a process does beside waiting, on a busy machine


def last_line(path: Path) -> tuple[int, int]:
    """The step of the last whole line of a metrics.jsonl and the byte after it; zeros where there is none. Reads the file's
    end alone: a long run's is large."""
    if not path.is_file():
        return 0, 0
    with path.open("rb") as file:
        size, reach, text = file.seek(0, os.SEEK_END), 0, b""
        while reach < size and text.count(b"\n") < 2:
            reach = min(size, reach + TAIL)
            file.seek(size - reach)
            text = file.read(reach)
    whole, _, torn = text.rpartition(b"\n")
    return json.loads(whole.rpartition(b"\n")[2])["step"] if whole else 0, size - len(torn)


class Run:
    """alpha-maml train in a folder: one process, or `ranks` of one group; whatever still runs is killed at the end."""

    def __init__(self, folder: Path, *arguments: str, ranks: int = 0, target: Callable = child, log: Path | None = None):
        self.folder, self.log, self.processes = folder, log or folder.parent / f"{folder.name}.log", []
        self.log.unlink(missing_ok=True)
        for place in places(ranks):
            self.processes.append(FORKS.Process(target=target, args=(
                [*PROBLEM, *arguments, "--run_dir", str(folder)], place | {"PYTHONPATH": str(ROOT / "tests")}, str(self.log),
                str(self.log))))
            self.processes[-1].start()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        command = ["alpha_maml.trainer.tracking.sender", str(self.folder)]
        senders = [p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [])[-2:] == command]
        for process in (*self.processes, *senders):
            process.kill()

    def step(self) -> int:
        return last_line(self.folder / METRICS)[0]

    def wait_for(self, fact: Callable[[], object], seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not fact():
            assert time.monotonic() < end, f"nothing happened for {seconds} s: {self.text()}"
            time.sleep(0.005)

    def reach(self, step: int) -> None:
        self.wait_for(lambda: self.step() >= step or any(p.exitcode is not None for p in self.processes))

    def signal(self, number: int) -> None:
        for process in self.processes:
            os.kill(process.pid, number)

    def codes(self, seconds: float = GRACE) -> list[int]:
        """The exit codes, which must come within so many seconds."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
            assert process.exitcode is not None, f"hangs for more than {seconds} s: {self.text()}"
        return [process.exitcode for process in self.processes]

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def lines(self) -> list[str]:
        """What it said of the trouble: never a traceback."""
        assert "Traceback" not in self.text(), self.text()
        return [line for line in self.text().splitlines() if line.startswith("alpha-maml: ")]

    def is_whole(self) -> None:
        """Each iteration stands once in the record, and the newest checkpoint, if any, is whole and finite."""
        steps = [line["step"] for line in read_metrics(self.folder)]
        assert steps == list(range(1, len(steps) + 1)), "iterations are missing"
        path, complaints = checkpoint.newest(self.folder / "checkpoints")
        assert not complaints
        assert path is None or all(bool(torch.isfinite(t).all()) for t in checkpoint.read(path).values())

    def is_saved(self) -> None:
        """The last checkpoint is of the last iteration."""
        self.is_whole()
        assert int(checkpoint.saved(self.folder / "checkpoints")[-1].name) == self.step()
        assert not list((self.folder / "checkpoints").glob(".*")), "something was left aside"


def backwards(arguments: list[str], *rest: object) -> None:
    """A process whose clock goes an hour back after some iterations."""
    true, metrics = time.time, Path(arguments[-1]) / METRICS
    time.time = lambda: true() - (3600 if last_line(metrics)[0] >= EVERY else 0)
    child(arguments, *rest)


def on_a_terminal(arguments: list[str], environment: dict[str, str], output: str, errors: str) -> None:
    """A process that leads a session, as a login shell's command does, on the terminal `output`."""
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a harness under nohup hands on that it is ignored
    while not os.path.islink(output):
        time.sleep(0.01)
    fcntl.ioctl(os.open(output, os.O_RDWR), termios.TIOCSCTTY, 0)
    child(arguments, environment, output, errors)


def terminal(master: int, slave: int, closing: threading.Event) -> None:
    """Shows what is written to it until it is closed. A read that still waits would put that off, and without the slave,
    before the process has opened it, a read would fail."""
    while not closing.is_set():
        if select.select([master], [], [], 0.01)[0]:
            os.read(master, 4096)
    os.close(slave)
    os.close(master)
