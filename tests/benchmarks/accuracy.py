"""Trains several runs side by side on one GPU, each on a stream of its own, for a given time, and prints their accuracy over
600 tasks as it rises. Each leaves in its folder what `alpha-maml train` leaves, so that `alpha-maml evaluate` takes it.

usage: python tests/benchmarks/accuracy.py --seconds 480 --out runs/accuracy NAME: --KEY VALUE ... NAME: --KEY VALUE ...

A NAME ends in a colon, and its keys follow; before the first one stand keys of all.
"""
from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from alpha_maml.trainer import config as configuration
from alpha_maml.trainer.captured import Captured
from alpha_maml.trainer.engines.collective import World
from alpha_maml.trainer.evaluate import evaluate
from alpha_maml.trainer.runs import checkpoint
from alpha_maml.trainer.runs.metrics import Recorder
from alpha_maml.trainer.runs.summary import begin, conclude
from alpha_maml.trainer.setup import set_up
from alpha_maml.trainer.step import METRICS, snapshot

FLUSH = 50  # iterations between two looks at the values


class Run:
    """One of the runs, on a stream of its own."""

    def __init__(self, name: str, keys: dict[str, str], folder: Path):
        self.name, self.world, self.folder = name, World(device=torch.device("cuda", 0)), folder / name
        self.config = configuration.build(None, keys | {"run_dir": str(self.folder), "iterations": str(10**9)})
        self.problem, self.state = set_up(self.config, self.world)
        self.folder.mkdir(parents=True)
        begin(self.folder, self.config, self.problem.source.identity(), 1, 0)
        self.recorder = Recorder(self.folder, METRICS, self.config.task.batch)
        self.step, self.stream, self.begun = Captured(self.problem, self.state), torch.cuda.Stream(), time.monotonic()
        self.advance()
        assert self.step.forms, "not captured"

    def advance(self) -> None:
        with torch.cuda.stream(self.stream):
            self.state, values = self.step(self.state, False)
        self.recorder.add(self.state.iteration, values)

    def look(self) -> None:
        """Waits for what was started so far, and records it."""
        with torch.cuda.stream(self.stream):
            self.recorder.flush()

    def accuracy(self, split: str) -> tuple[float, float]:
        """Mean over 600 of the split's tasks, and half of its 95 % interval."""
        problem, theta = self.problem, self.state.engine.learned()
        alpha = self.state.rates.alpha.to(problem.dtype)
        result = evaluate(problem.apply, problem.source, problem.loss, theta, alpha, split, 600,
                          problem.inner(self.state.iteration), self.world, forward_tasks=problem.apply_tasks)
        return result.figures()["accuracy"], result.figures()["accuracy_ci95"]

    def end(self) -> None:
        self.recorder.close()
        checkpoint.save(self.folder / "checkpoints", self.state.iteration, snapshot(self.state), {
            "world_size": 1, "trajectory": configuration.trajectory(self.config)}, 1)
        conclude(self.folder, self.config, 1, self.world.device, self.begun, "FINISHED", False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--looks", type=int, default=8, help="at the accuracy, spread over the time")
    options, words = parser.parse_known_args()
    shared, runs = {}, {}
    keys = shared
    for word in words:
        if word.endswith(":"):
            keys = runs[word[:-1]] = dict(shared)
        elif word.startswith("--"):
            name = word[2:]
        else:
            keys[name] = word
    begun = time.perf_counter()
    runs = [Run(name, keys, options.out) for name, keys in runs.items()]
    torch.cuda.synchronize()
    print(f"{torch.cuda.get_device_name()}: {len(runs)} runs captured after {time.perf_counter() - begun:.1f} s", flush=True)
    begun, looks = time.perf_counter(), 0
    while (passed := time.perf_counter() - begun) < options.seconds:
        for _ in range(FLUSH):
            for run in runs:
                run.advance()
        for run in runs:
            run.look()
        if passed >= options.seconds * (looks + 1) / options.looks:
            looks += 1
            torch.cuda.synchronize()
            print(f"{passed:5.0f} s, {runs[0].state.iteration:6d} iterations: " + ", ".join(
                f"{run.name} {100 * run.accuracy('val')[0]:.2f} % (loss {run.recorder.latest['loss/train']:.3f})"
                for run in runs), flush=True)
    torch.cuda.synchronize()
    passed = time.perf_counter() - begun
    for run in runs:
        run.end()
        mean, interval = run.accuracy("test")
        print(f"{run.name}: test accuracy {100 * mean:.2f} % +- {100 * interval:.2f} over 600 tasks, after "
              f"{run.state.iteration} iterations and {passed:.0f} s beside the others; alpha "
              f"{float(run.state.rates.alpha.mean()):.3g}, beta {float(run.state.rates.beta):.3g}", flush=True)


if __name__ == "__main__":
    main()
