"""metrics.jsonl: the record and the queue at once. One line an iteration, which the sender (trainer.tracking) ships from where
it left off."""
from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alpha_maml.errors import InputError, naming, reading
from alpha_maml.trainer.runs.folder import parsed_json

METRICS = "metrics.jsonl"


def read_lines(run_dir: Path, offset: int = 0) -> Iterator[tuple[int, dict]]:
    """(the byte at which it ends, the line) for every whole line of metrics.jsonl from a byte on; a torn last line, as a killed
    run leaves it, is not one. Raises InputError where one is no line of metrics, or not of the same run."""
    path, step = run_dir / METRICS, 0
    with reading("run_dir"):
        if not path.is_file():
            return
        with path.open("rb") as file:
            file.seek(offset)
            for text in file:
                if not text.endswith(b"\n"):
                    return
                line = parsed_json(text)
                if not _is_of_run(line, step):
                    raise InputError(f"run_dir: {path} is damaged at byte {offset} (not the line of an iteration after {step}"
                                     "); remove what does not belong there, or choose another run_dir")
                offset, step = offset + len(text), line["step"]
                yield offset, line


def _is_of_run(line: Any, after: int) -> bool:
    """Whether it is a line of metrics.jsonl that may follow that of iteration `after`."""
    return isinstance(line, dict) and all(type(value) in (int, float) for value in line.values()) and \
        all(type(line.get(name)) is int and line[name] < 2**63 for name in ("step", "timestamp")) and line["step"] > after


def read_metrics(run_dir: Path) -> list[dict]:
    """Every whole line of metrics.jsonl; raises InputError as `read_lines` does."""
    return [line for _, line in read_lines(run_dir)]


class Recorder:
    """Collects the iterations' values on the device, and on a flush reads them back and appends them to metrics.jsonl."""

    def __init__(self, run_dir: Path | None, names: tuple[str, ...], tasks: int):
        """`run_dir` None records without writing, as ranks other than 0 do; `tasks` are in an iteration's batch."""
        self.names, self.tasks, self.file, self.recorded = names, tasks, None, 0
        if run_dir is not None:
            self.path = run_dir / METRICS
            size = 0
            for size, line in read_lines(run_dir):  # noqa: B007  the last one's are meant
                self.recorded = line["step"]  # a resumed run repeats steps; their points stand already
            self.file = self.path.open("ab")
            self.file.truncate(size)
        self.pending: list[tuple[int, int, Tensor, dict[str, float]]] = []
        self.coming: list[tuple] = []  # blocks on their way from the device
        self.latest: dict[str, float] = {}
        self.clock = time.perf_counter()

    def close(self) -> None:
        if self.file:
            with naming(self.path):
                self.file.close()

    def add(self, step: int, values: Tensor) -> None:
        """An iteration's values: a device vector that begins with the `names`."""
        self.pending.append((step, int(time.time() * 1000), values, {}))

    def extend(self, metrics: dict[str, float]) -> None:
        """Rarer metrics of the iteration added last."""
        self.pending[-1][3].update(metrics)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What happens inside does not count as the iterations' time."""
        if self.pending:
            self.pending[-1][2].tolist()  # a GPU's iterations end before
        begun = time.perf_counter()
        yield
        self.clock += time.perf_counter() - begun

    def flush(self, wait: bool = True) -> list[tuple[int, list[float]]]:
        """Writes what is pending; returns (iteration, values) of each. Without `wait` that is what was pending at the call
        before, so that a GPU, whose values have arrived meanwhile, has more to do while they are read."""
        if self.pending:
            values = torch.stack([values for _, _, values, _ in self.pending])
            host, arrived = values.to("cpu", non_blocking=True), torch.cuda.Event() if values.is_cuda else None
            if arrived:
                arrived.record()
            self.coming.append((self.pending, host, arrived))
            self.pending = []
        taken = len(self.coming) if wait else len(self.coming) - 1
        ready, self.coming = self.coming[:taken], self.coming[taken:]
        if not ready:
            return []
        if arrived := ready[-1][2]:
            arrived.synchronize()
        rows = [row for pending, host, _ in ready for row in zip(pending, host.tolist())]
        now = time.perf_counter()
        seconds, self.clock = (now - self.clock) / len(rows), now
        pace = {"perf/step_ms": 1000 * seconds, "perf/tasks_per_s": self.tasks / seconds}
        for (step, timestamp, _, extra), row in rows:
            metrics = {**dict(zip(self.names, row)), **extra, **pace}
            metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}  # nan: does not apply
            self.latest |= metrics
            if self.file and step > self.recorded:
                self.file.write(json.dumps({"step": step, "timestamp": timestamp, **metrics}).encode() + b"\n")
        if self.file:
            with naming(self.path):
                self.file.flush()
        return [(step, row) for (step, *_), row in rows]
