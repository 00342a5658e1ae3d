"""Times a sweep of 49 starts on the sinusoid trained in turn, by two processes side by side, and as one program, in one run.

usage: python tests/benchmarks/vectorised.py [--rounds 3] [--iterations 300]

Each way is `alpha-maml sweep` as a user starts it, on two threads in all; printed: the medians over rounds of the seconds,
their ratios, and by how much the first losses differ.
"""
from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from alpha_maml.trainer.runs.folder import read_json

ROOT = Path(__file__).parents[2]
STARTS = "1e-5,1e-4,1e-3,1e-2,1e-1,1,10"
WAYS = {"in turn": (), "in turn, --jobs 2": ("--jobs", "2"), "--vectorised": ("--vectorised",)}


def timed(folder: Path, iterations: int, words: tuple[str, ...]) -> float:
    threads = "1" if "--jobs" in words else "2"
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-m", "alpha_maml", "sweep", "--config", "configs/study/sinusoid.yaml", "--iterations",
                    str(iterations), "--grid", f"rates.alpha={STARTS}", "--grid", f"rates.beta={STARTS}", "--tracking.uri",
                    "disabled", "--run_dir", str(folder), *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
                   env=os.environ | {"OMP_NUM_THREADS": threads})
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=300)
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for way, words in WAYS.items():
                place = Path(folder, f"{way}{number}")
                seconds[way].append(timed(place, options.iterations, words))
                losses[way] = [read_json(path)["loss_first"] for path in sorted(place.glob("*/summary.json"))]
    vectorised = statistics.median(seconds["--vectorised"])
    for way in WAYS:
        median = statistics.median(seconds[way])
        apart = max(abs(a / b - 1) for a, b in zip(losses[way], losses["in turn"]))
        print(f"49 runs, {options.iterations} iterations, {way:18} {median:6.1f} s, {median / vectorised:.2f} x --vectorised; "
              f"the mean loss of the first 20 iterations differs by {apart:.0e} at most")


if __name__ == "__main__":
    main()
