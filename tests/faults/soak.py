"""A long training of two ranks, watched: memory, descriptors, threads, the unshipped rest of the spool, and the pace.

usage: python tests/faults/soak.py [--iterations 200000]

The sinusoid, two ranks under torchrun, into MLflow's sqlite store. The first tenth is not counted: allocators and caches fill.
Right after it a fresh run of a tenth: where the machine itself has become slower, that one is slow too. Ends with 1 where a
figure is beyond its bound.
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

from alpha_maml.trainer.runs.metrics import METRICS, read_metrics
from alpha_maml.trainer.tracking.state import read_state

SECONDS = 1.0  # between samples
SLOPE, PACE = 2**20, 0.05  # bytes of memory per 10,000 iterations; change of the pace
BACKLOG = 2**20  # bytes of the spool that are not yet in the store: some thousand iterations
RANKS = ("rank 0", "rank 1")


class Sample(NamedTuple):
    step: int
    memory: int  # resident, bytes
    descriptors: int
    threads: int
    cpu: float  # seconds that it has used


def processes(agent: psutil.Process) -> dict[str, psutil.Process]:
    """The ranks and the sender, by name."""
    found = {}
    for process in agent.children(recursive=True):
        command = process.cmdline()
        if "alpha_maml.trainer.tracking.sender" in command:
            found["sender"] = process
        elif "RANK" in process.environ():
            found[f"rank {process.environ()['RANK']}"] = process
    return found


def watch(iterations: int, folder: Path) -> tuple[dict[str, list[Sample]], list[tuple[int, int]]]:
    """Trains in `folder`; the samples of each process, and (iteration, bytes not shipped) all along."""
    run = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "alpha_maml", "train",
         "--task.batch", "4", "--evaluation.tasks", "8", "--iterations", str(iterations), "--run_dir", str(folder),
         "--tracking.timeout", "600"],
        cwd=ROOT, env=ENVIRONMENT, stdout=sys.stderr, stderr=sys.stderr)
    samples, backlog, agent = {}, [], psutil.Process(run.pid)
    while run.poll() is None:
        time.sleep(SECONDS)
        metrics = folder / METRICS
        step, size = last_line(metrics)
        if not 0 < step < iterations:
            continue
        backlog.append((step, size - read_state(folder).get("offset", 0)))
        try:
            for name, process in processes(agent).items():
                with process.oneshot():
                    samples.setdefault(name, []).append(
                        Sample(step, process.memory_info().rss, process.num_fds(), process.num_threads(),
                               sum(process.cpu_times()[:2])))
        except psutil.NoSuchProcess:
            pass
    if run.returncode:
        raise SystemExit(f"the training ended with {run.returncode}")
    return samples, backlog


def slope(samples: list[Sample]) -> float:
    """Bytes of resident memory per 10,000 iterations, by least squares."""
    steps, memory = (np.array([getattr(s, name) for s in samples], dtype=float) for name in ("step", "memory"))
    return float(np.polyfit(steps - steps.mean(), memory - memory.mean(), 1)[0] * 10_000)


def row(name: str, samples: list[Sample]) -> tuple[str, bool]:
    """A process's row of the table, and whether it is within its bounds. Threads and descriptors that come and go, as a
    save's, are no growth: the medians of both halves count."""
    rise, half, kept, good = slope(samples), len(samples) // 2, [], True
    for values in ([s.descriptors for s in samples], [s.threads for s in samples]):
        kept.append(f"{min(values)} to {max(values)}")
        good &= statistics.median(values[half:]) <= statistics.median(values[:half])
    work = [1000 * (b.cpu - a.cpu) / (b.step - a.step) for a, b in ((samples[0], samples[half]), (samples[half], samples[-1]))]
    text = (f"| {name} | {samples[-1].memory / 2**20:.1f} | {rise / 2**20:+.2f} | {' | '.join(kept)} "
            f"| {work[0]:.2f}, {work[1]:.2f} |")
    return text, good and (rise < SLOPE or name not in RANKS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=200_000)
    iterations = parser.parse_args().iterations
    tenth, begun = iterations // 10, time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        folder, fresh = Path(place) / "soak", Path(place) / "fresh"
        samples, backlog = watch(iterations, folder)
        seconds = time.monotonic() - begun
        watch(tenth, fresh)
        times, again = ([line["perf/step_ms"] for line in read_metrics(x)] for x in (folder, fresh))
        complete, size = read_state(folder).get("complete", False), (folder / METRICS).stat().st_size
    print(f"{iterations} iterations in {seconds:.0f} s, measured from iteration {tenth} on\n\n"
          "| process | memory at the end, MB | MB per 10,000 iterations | file descriptors | threads | CPU ms an iteration, "
          "first and second half |\n|---|---|---|---|---|---|")
    good = [complete]
    for name, all_of_it in sorted(samples.items()):
        text, within = row(name, [s for s in all_of_it if s.step > tenth])
        print(text)
        good.append(within)
    pace = [statistics.median(times[i * tenth : (i + 1) * tenth]) for i in range(10)]
    fresh_pace = statistics.median(again[tenth // 10 :])
    rest = [bytes_left for step, bytes_left in backlog if step > tenth]
    print(f"\npace: {', '.join(f'{p:.2f}' for p in pace)} ms an iteration in each tenth: "
          f"{100 * (pace[-1] / pace[1] - 1):+.1f} % from the second to the last. A fresh run right after it: {fresh_pace:.2f}; "
          f"the last tenth is {100 * (pace[-1] / fresh_pace - 1):+.1f} % off that\n"
          f"spool: {size / 2**20:.1f} MB recorded; unshipped at most {max(rest) / 2**20:.2f} MB, at the end "
          f"{rest[-1] / 2**20:.2f} MB; all in the store: {'yes' if complete else 'no'}\n")
    good += [pace[-1] < (1 + PACE) * max(pace[1], fresh_pace), max(rest) < BACKLOG]
    print("within all bounds" if all(good) else "NOT within all bounds")
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
