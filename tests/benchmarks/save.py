"""How long an iteration waits for a checkpoint: medians over alternating iterations with and without a save.

usage: python tests/benchmarks/save.py [--megabytes 100]
"""
from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from alpha_maml.trainer.runs.checkpoint import Saver


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=100)
    size = parser.parse_args().megabytes
    state = {f"theta.{i}": torch.randn(size * 1_000_000 // 4 // 10) for i in range(10)}
    torch.set_num_threads(1)  # as torchrun sets it: what is measured is the wait, not the lack of a processor
    work = torch.randn(400, 400)
    calls, during, alone, whole = [], [], [], []

    def iteration() -> float:
        begun = time.perf_counter()
        for _ in range(20):
            work @ work
        return 1000 * (time.perf_counter() - begun)

    with tempfile.TemporaryDirectory() as folder:
        saver = Saver(Path(folder), keep=2)
        saver.save(1, state, {})  # the imports
        saver.wait()
        for number in range(2, 7):
            alone += [iteration() for _ in range(20)]
            begun = time.perf_counter()
            saver.save(number, state, {})
            calls.append(1000 * (time.perf_counter() - begun))
            while saver.thread.is_alive():
                during.append(iteration())
            saver.wait()
            whole.append(1000 * (time.perf_counter() - begun))
    print(f"{size} MB: the call takes {statistics.median(calls):.2f} ms (longest {max(calls):.2f}), the save "
          f"{statistics.median(whole):.0f} ms; an iteration of {statistics.median(alone):.1f} ms takes "
          f"{statistics.median(during):.1f} ms meanwhile (longest {max(during):.1f})")


if __name__ == "__main__":
    main()
