"""Times ours and the field's libraries on the same tasks, weights and processor, interleaved, in one run.

usage: python tests/benchmarks/bench.py [--rounds 7] [--settings 0 1 2 3 4] [--only NAME ...]

Every contender is a process of its own that waits while the others run. Before anything is timed, its gradient in float64 is
compared with ours. Printed: the median of each contender's rounds, as tasks/s and as a ratio to the best of learn2learn, higher
and TorchOpt in the same run, and its peak memory. One that cannot be installed, fails, or is not ready in time is named.
"""
from __future__ import annotations

import argparse
import os
import select
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from contenders import CONTENDERS

ROOT = Path(__file__).parents[2]
SETTINGS = {  # tasks ways shots steps size colours channels
    "16 x 5-way 1-shot, K = 1": (16, 5, 1, 1, 28, 1, 64),
    "16 x 20-way 1-shot, K = 1": (16, 20, 1, 1, 28, 1, 64),
    "8 x 20-way 1-shot, K = 5": (8, 20, 1, 5, 28, 1, 64),
    "8 x 5-way 5-shot, K = 5": (8, 5, 5, 5, 28, 1, 64),
    "4 x 5-way 5-shot, K = 5, 84 x 84 x 3": (4, 5, 5, 5, 84, 3, 32),
}
GPU_ONLY = ("ours, captured", "ours, tf32", "ours, bf16", "JAX, tf32")
LIBRARIES = ("learn2learn", "higher", "TorchOpt")
PATIENCE = 150  # seconds for a contender's first results, compilation included
SLOW = 3.0  # seconds from which a contender takes only two rounds


class Contender:
    """A process, or two ranks, that computes once whenever it is told to (contenders.serve)."""

    def __init__(self, name: str, command: list[object], folder: Path, ranks: int = 1, port: int = 29671):
        self.name, self.seconds, self.memory, self.error = name, [], 0.0, ""
        environment = os.environ | {"PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self.log = folder / f"{name}.log"
        self.processes = [subprocess.Popen(
            [sys.executable, "-W", "ignore", *map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            stderr=self.log.open("w"), env=environment | {"RANK": str(rank), "WORLD_SIZE": str(ranks)})
            for rank in range(ranks)]

    def ready(self, patience: float = PATIENCE) -> None:
        """Waits for its first results; `error` says why there are none."""
        if not select.select([self.processes[0].stdout], [], [], patience)[0]:
            self.error = f"no first result within {patience} s"
            for process in self.processes:
                process.kill()
        elif self._line() != "ready":
            self.error = (self.log.read_text().strip().splitlines() or ["ended"])[-1][:150]

    def median(self) -> float:
        return statistics.median(self.seconds)

    def _line(self) -> str:
        return self.processes[0].stdout.readline().strip()

    def go(self) -> None:
        self.processes[0].stdin.write("\n")
        self.processes[0].stdin.flush()

    def done(self) -> None:
        self.seconds.append(float(self._line()))

    def end(self) -> None:
        for process in self.processes:
            process.stdin.close()
        self.memory = float(self._line() or 0)
        for process in self.processes:
            process.wait()


def interleaved(contenders: list[Contender], rounds: int) -> list[Contender]:
    """Lets them run in turn, ends them, and returns those that worked."""
    working = [c for c in contenders if not c.error]
    for _ in range(rounds):
        for contender in working:
            if len(contender.seconds) < 2 or contender.seconds[0] < SLOW:
                contender.go()
                contender.done()
    for contender in contenders:
        contender.end()
    return working


def difference(a: Path, b: Path) -> float:
    """Relative distance of two gradients."""
    a, b = np.load(a), np.load(b)
    squares = [[((a[n].astype(float) - b[n]) ** 2).sum(), (b[n].astype(float) ** 2).sum()] for n in b]
    return float(np.sqrt(np.divide(*np.sum(squares, 0))))


def compare(title: str, setting: tuple[int, ...], names: list[str], rounds: int, device: str = "cpu") -> dict[str, Contender]:
    """Prints the table of one setting; those that worked, by name."""
    with tempfile.TemporaryDirectory() as folder:
        gradients = {name: Path(folder, f"{name}.npz") for name in names}
        script, contenders = Path(__file__).with_name("contenders.py"), []
        for name in names:
            contenders.append(Contender(name, [script, name, gradients[name], *setting, "--device", device], Path(folder),
                                        2 if name.endswith("2 ranks") else 1, 29671 + len(contenders)))
            if device == "cpu":  # on a GPU's machine there are cores for all to compile at once
                contenders[-1].ready()
        for contender in contenders if device == "cuda" else ():
            contender.ready(90)
        working = interleaved(contenders, rounds)
        best = min((c.median() for c in working if c.name in LIBRARIES), default=float("nan"))
        print(f"\n{title}\n  {'':26} tasks/s  ratio  slowest..fastest  peak MiB  gradient (float64) differs by"
              + ", as timed by" * (device == "cuda"), flush=True)
        for c in contenders:
            if c.error:
                print(f"  {c.name:26} failed: {c.error}")
                continue
            rates, ours = sorted(setting[0] / s for s in c.seconds), gradients["ours"]
            errors = [difference(gradients[c.name], ours)]
            if device == "cuda":
                errors.append(difference(gradients[c.name].with_suffix(".timed.npz"), ours.with_suffix(".exact.npz")))
            print(f"  {c.name:26} {setting[0] / c.median():7.1f} {best / c.median():6.2f}  "
                  f"{rates[0]:7.1f}..{rates[-1]:<8.1f} {c.memory:8.0f}  " + "  ".join(f"{e:.1e}" for e in errors), flush=True)
    return {c.name: c for c in working}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--settings", type=int, nargs="*", default=range(len(SETTINGS)))
    parser.add_argument("--only", nargs="*", default=[n for n in CONTENDERS if n not in GPU_ONLY])
    options = parser.parse_args()
    for number in options.settings:
        compare(*list(SETTINGS.items())[number], options.only, options.rounds)


if __name__ == "__main__":
    main()
