"""A long training of two ranks, watched: memory, descriptors, threads, the unshipped rest of the spool, and the pace.

usage: python tests/faults/soak.py [--iterations 200000]

The sinusoid, two ranks under torchrun, into MLflow's sqlite store. Ends with 1 where a figure is beyond its bound.
"""
from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
from harness import ENVIRONMENT, ROOT
from victim import last_line

from trainer import spool, tracking

SECONDS = 1.0  # between samples
WARM = 0.1  # of the run, which is not counted: allocators and caches fill
SLOPE, PACE = 2**20, 0.05  # bytes of memory per 10,000 iterations; change of the pace
BACKLOG = 2**20  # bytes of the spool that are not yet in the store: some thousand iterations
RANKS = ("rank 0", "rank 1")


class Sample(NamedTuple):
    step: int
    memory: int  # resident, bytes
    descriptors: int
    threads: int


def processes(agent: psutil.Process) -> dict[str, psutil.Process]:
    """The ranks and the sender, by name."""
    found = {}
    for process in agent.children(recursive=True):
        command = process.cmdline()
        if "trainer.tracking" in command:
            found["sender"] = process
        elif "RANK" in process.environ():
            found[f"rank {process.environ()['RANK']}"] = process
    return found


def watch(iterations: int, folder: Path) -> tuple[dict[str, list[Sample]], list[tuple[int, int]]]:
    """Trains in `folder`; the samples of each process, and (iteration, bytes not shipped) all along."""
    run = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "launch", "train",
         "--task.batch", "4", "--evaluation.tasks", "8", "--iterations", str(iterations), "--run_dir", str(folder),
         "--tracking.timeout", "600"],
        cwd=ROOT, env=ENVIRONMENT, stdout=sys.stderr, stderr=sys.stderr)
    samples, backlog, agent = {}, [], psutil.Process(run.pid)
    while run.poll() is None:
        time.sleep(SECONDS)
        metrics = folder / spool.METRICS
        step, size = last_line(metrics)
        if not 0 < step < iterations:
            continue
        backlog.append((step, size - tracking.read_state(folder).get("offset", 0)))
        try:
            for name, process in processes(agent).items():
                with process.oneshot():
                    samples.setdefault(name, []).append(
                        Sample(step, process.memory_info().rss, process.num_fds(), process.num_threads()))
        except psutil.NoSuchProcess:
            pass
    if run.returncode:
        raise SystemExit(f"the training ended with {run.returncode}")
    return samples, backlog


def slope(samples: list[Sample]) -> float:
    """Bytes of resident memory per 10,000 iterations, by least squares."""
    steps, memory = (np.array([getattr(s, name) for s in samples], dtype=float) for name in ("step", "memory"))
    return float(np.polyfit(steps - steps.mean(), memory - memory.mean(), 1)[0] * 10_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=200_000)
    iterations = parser.parse_args().iterations
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "soak"
        begun = time.monotonic()
        samples, backlog = watch(iterations, folder)
        times = [line["perf/step_ms"] for line in spool.read_metrics(folder)]
        complete, size = tracking.read_state(folder).get("complete", False), (folder / spool.METRICS).stat().st_size
    good, first = [complete], int(WARM * iterations)
    print(f"{iterations} iterations in {time.monotonic() - begun:.0f} s, measured from iteration {first} on\n")
    print("| process | memory at the end, MB | MB per 10,000 iterations | file descriptors | threads |\n|---|---|---|---|---|")
    for name, all_of_it in sorted(samples.items()):
        counted = [s for s in all_of_it if s.step > first]
        rise, half, ranges = slope(counted), len(counted) // 2, []
        for values in ([s.descriptors for s in counted], [s.threads for s in counted]):
            ranges.append(f"{min(values)} to {max(values)}")
            good.append(max(values[half:]) <= max(values[:half]))
        print(f"| {name} | {counted[-1].memory / 2**20:.1f} | {rise / 2**20:+.2f} | {' | '.join(ranges)} |")
        good.append(rise < SLOPE or name not in RANKS)
    tenth = len(times) // 10
    start, end = statistics.median(times[tenth : 2 * tenth]), statistics.median(times[-tenth:])
    rest = [bytes_left for step, bytes_left in backlog if step > first]
    print(f"\npace: {start:.3f} ms an iteration in the second tenth, {end:.3f} in the last, {100 * (end / start - 1):+.1f} %\n"
          f"spool: {size / 2**20:.1f} MB recorded; unshipped at most {max(rest) / 2**20:.2f} MB, at the end "
          f"{rest[-1] / 2**20:.2f} MB; all in the store: {'yes' if complete else 'no'}\n")
    good += [end < (1 + PACE) * start, max(rest) < BACKLOG]
    print("within all bounds" if all(good) else "NOT within all bounds")
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
