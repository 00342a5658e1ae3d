"""Times our own iteration on real Omniglot, 20-way 1-shot: the cost of the rates and of sampling, weak scaling, memory over K.

usage: python tests/benchmarks/iteration.py [--rounds 20]

Omniglot's archives are looked for in $OMNIGLOT_ROOT. Processes and interleaving as in bench.py.
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

import torch
from bench import ROOT, Contender, interleaved
from contenders import forget_peak, serve

from alpha_maml.launch import runtime
from alpha_maml.trainer import config as configuration
from alpha_maml.trainer.setup import set_up
from alpha_maml.trainer.step import train_step

OMNIGLOT = os.environ.get("OMNIGLOT_ROOT", str(ROOT / "../shared/data/omniglot"))
KEYS = {"data.name": "omniglot", "data.root": OMNIGLOT, "model.name": "conv4", "inner.steps": "1", "task.batch": "16",
        "task.ways": "20", "task.shots": "1", "task.queries": "1"}
ROW = 25  # iterations in a row, as a training has them: two ranks' first five after a pause are 1 to 4 % slower than the rest
PLAIN = {"outer.optimizer": "sgd", "outer.trust": "0", "outer.average": "false"}  # so that only the rates differ
RULES = {"fixed": {"rates.rule": "fixed"} | PLAIN, "paper": {"rates.rule": "paper"} | PLAIN, "adaptive": PLAIN, "default": {}}


def worker(count: int, keys: list[str]) -> None:
    """A contender: `count` iterations for every line of input, at one thread a rank."""
    torch.set_num_threads(1)
    with runtime.world("cpu", 60) as world:
        problem, state = set_up(configuration.build(None, KEYS | dict(zip(keys[::2], keys[1::2]))), world)

        def run() -> None:
            nonlocal state
            for _ in range(count):
                state, _ = train_step(problem, state, False)

        held = forget_peak()
        run()
        serve(run, world.size, held)


def start(folder: str, name: str, port: int, ranks: int = 1, count: int = 1, **keys: object) -> Contender:
    words = [word for key, value in keys.items() for word in (key.replace("__", "."), value)]
    contender = Contender(name, [__file__, "worker", count, *words], Path(folder), ranks, port)
    contender.ready()
    assert not contender.error, f"{name}: {contender.error}"
    return contender


def weak_scaling(rounds: int) -> tuple[float, float, float]:
    """Efficiency of two ranks with 16 tasks each against one; the same of their fastest rows, which other guests of the machine
    disturb least; and against two runs side by side that know nothing of each other: what is left then is the cost of the
    reduction and of waiting for each other."""
    with tempfile.TemporaryDirectory() as folder:
        one, two = start(folder, "one", 29680, count=ROW), start(folder, "two", 29681, 2, count=ROW, task__batch=32)
        apart = start(folder, "left", 29682, count=ROW), start(folder, "right", 29683, count=ROW)
        for _ in range(max(2, rounds // 2)):
            for group in ((one,), (two,), apart):
                for contender in group:
                    contender.go()
                for contender in group:
                    contender.done()
        for contender in (one, two, *apart):
            contender.end()
    both = [max(pair) for pair in zip(*(c.seconds for c in apart))]
    return 1 / pair_ratio(two.seconds, one.seconds), min(one.seconds) / min(two.seconds), 1 / pair_ratio(two.seconds, both)


def memory() -> dict[str, float]:
    """Peak of an iteration above what the process held before it, in MiB, by the number of inner steps."""
    cases = {f"K = {k}": {"inner__steps": k} for k in (1, 5, 50)}
    cases["K = 50 with inner.recompute: false"] = {"inner__steps": 50, "inner__recompute": "false"}
    with tempfile.TemporaryDirectory() as folder:
        started = [start(folder, name, 29684 + i, task__batch=8, task__ways=5, **keys)
                   for i, (name, keys) in enumerate(cases.items())]
        return {contender.name: contender.memory for contender in interleaved(started, 2)}


def start_up(rounds: int) -> float:
    """Seconds of a whole `alpha-maml train` of one iteration: what comes before the first iteration, at most."""
    seconds, words = [], [word for name, value in KEYS.items() for word in (f"--{name}", value)]
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            begun = time.perf_counter()
            subprocess.run([sys.executable, "-m", "alpha_maml", "train", *words, "--iterations", "1", "--evaluation.tasks", "1",
                            "--tracking.uri", "disabled", "--run_dir", folder], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def pair_ratio(a: list[float], b: list[float]) -> float:
    """The median over rounds of a's time by b's: neighbours in time see the same noise."""
    return statistics.median(x / y for x, y in zip(a, b))


def rules(rounds: int) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of an iteration under each rule, and of drawing its tasks: all in one process and in turn, since two processes
    differ by more than the rates cost."""
    seconds, drawing = {rule: [] for rule in RULES}, []
    with runtime.world("cpu", 60) as world:
        runs = {rule: set_up(configuration.build(None, KEYS | keys), world) for rule, keys in RULES.items()}
        for number in range(rounds + 2):
            for rule, (problem, state) in runs.items():
                begun = time.perf_counter()
                problem.source.batch("train", state.iteration, problem.indices)
                drawn = time.perf_counter()
                state, _ = train_step(problem, state, False)
                runs[rule] = problem, state
                if number >= 2:
                    drawing.append(drawn - begun)
                    seconds[rule].append(time.perf_counter() - drawn)
    return seconds, drawing


def main() -> None:
    if sys.argv[1:2] == ["worker"]:
        return worker(int(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    seconds, drawing = rules(2 * rounds)
    fixed = statistics.median(seconds["fixed"])
    more = {rule: 100 * pair_ratio(times, seconds["fixed"]) - 100 for rule, times in seconds.items() if rule != "fixed"}
    print(f"one thread, 16 tasks, K = 1: {1000 * fixed:.0f} ms an iteration with fixed rates; "
          + ", ".join(f"{rule} {percent:+.1f} %" for rule, percent in more.items()))
    print("(default: adaptive with Muon's direction, relative steps and the average)")
    print(f"drawing the 16 tasks: {100 * statistics.median(drawing) / fixed:.1f} % of it", flush=True)
    whole, fastest, communication = weak_scaling(rounds)
    print(f"weak scaling, 16 tasks a rank of one thread: two ranks reach {100 * whole:.1f} % of one ({100 * fastest:.1f} % in "
          f"the fastest rows), {100 * communication:.1f} % of two runs side by side", flush=True)
    print(f"a whole run of one iteration, from the command to its end: {start_up(3):.1f} s", flush=True)
    peaks = memory()
    print("peak memory of an iteration, 8 tasks of 5-way 1-shot: " + ", ".join(
        f"{name} {mib:.0f} MiB" for name, mib in peaks.items()) + f"; K = 50 by K = 1: {peaks['K = 50'] / peaks['K = 1']:.2f}")


if __name__ == "__main__":
    main()
