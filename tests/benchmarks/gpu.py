"""Everything that only a GPU can show: ours beside learn2learn and JAX, the iteration against its floor, what waits for the
device, and the iterations to a training loss of 2.5 from 49 starts at full size.

usage: python tests/benchmarks/gpu.py [--rounds 9] [--parts peers iteration starts]

Omniglot's archives are looked for in $OMNIGLOT_ROOT, learn2learn's source distribution in $LEARN2LEARN.
"""
from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from bench import ROOT, compare
from contenders import captured
from iteration import KEYS
from torch.utils.flop_counter import FlopCounterMode

from alpha_maml.models.ops import convolution
from alpha_maml.trainer import config as configuration
from alpha_maml.trainer.captured import Captured
from alpha_maml.trainer.engines.collective import World
from alpha_maml.trainer.runs.metrics import read_metrics
from alpha_maml.trainer.runs.summary import iterations_to
from alpha_maml.trainer.setup import set_up
from alpha_maml.trainer.step import METRICS, Problem, State, snapshot, train_step

SETTINGS = {"16 x 20-way 1-shot, K = 1": (16, 20, 1, 1, 28, 1, 64), "16 x 20-way 1-shot, K = 5": (16, 20, 1, 5, 28, 1, 64)}
PEERS = ["ours", "ours, captured", "ours, tf32", "ours, bf16", "learn2learn", "JAX", "JAX, tf32"]
FORMS = {"fixed": {"rates.rule": "fixed"}, "adaptive": {}, "adaptive, tf32": {"precision": "tf32"}}
STARTS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "Memcpy DtoH", "Memcpy HtoD")


def seconds(run: Callable[[], object], count: int, rounds: int = 5) -> float:
    """Of one call, when `count` are queued; the median of some rounds."""
    found = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            run()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) / 1000 / count)
    return statistics.median(found)


def ceilings() -> tuple[float, dict[str, float]]:
    """Bytes/s of a copy, read and written, and flop/s of a matrix product on random numbers, by precision."""
    source = torch.empty(2**30, device="cuda")
    target = torch.empty_like(source)
    bandwidth = 8 * source.numel() / seconds(lambda: target.copy_(source), 5)
    rates, n = {}, 8192
    for name, precision, dtype in (("float32", "ieee", torch.float32), ("tf32", "tf32", torch.float32),
                                   ("bf16", "ieee", torch.bfloat16)):
        torch.backends.cuda.matmul.fp32_precision = precision
        a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
        rates[name] = 2 * n**3 / seconds(lambda a=a, b=b: a @ b, 5, 3)
    print(f"ceilings: copy {bandwidth / 1e12:.2f} TB/s; products " + ", ".join(
        f"{name} {rate / 1e12:.0f} TFLOP/s" for name, rate in rates.items()), flush=True)
    return bandwidth, rates


def problem_of(steps: int, **keys: str) -> tuple[Problem, State]:
    world = World(device=torch.device("cuda", 0))
    return set_up(configuration.build(None, KEYS | {"inner.steps": str(steps)} | keys), world)


def work(problem: Problem, state: State) -> tuple[float, float]:
    """Floating-point operations of an iteration's products, and bytes of the operands and results of its convolutions' products
    and of its norms, each moved once."""
    moved, names = 0, ("product", "product_on_x", "product_on_weight", "norm", "norm_first", "norm_second")
    functions = {name: getattr(convolution, name) for name in names}

    def counted(function: Callable) -> Callable:
        def call(*arguments: object) -> object:
            nonlocal moved
            found = function(*arguments)
            results = found if isinstance(found, tuple) else (found,)
            moved += sum(x.numel() * x.element_size() for x in (*arguments, *results) if isinstance(x, torch.Tensor))
            return found
        return call

    for name, function in functions.items():
        setattr(convolution, name, counted(function))
    with FlopCounterMode(display=False) as counter:
        train_step(problem, state, False)
    for name, function in functions.items():
        setattr(convolution, name, function)
    return counter.get_total_flops(), moved


class Loop:
    """A captured iteration that goes on from where it stands."""

    def __init__(self, problem: Problem, state: State):
        self.state, self.step = state, Captured(problem, state)

    def __call__(self) -> torch.Tensor:
        self.state, values = self.step(self.state, False)
        return values


def iteration(steps: int, bandwidth: float, rates: dict[str, float]) -> None:
    print(f"\nan iteration on Omniglot, 16 tasks of 20-way 1-shot, K = {steps}", flush=True)
    problem, state = problem_of(steps)
    train_step(problem, state, False)
    operation_by_operation = seconds(lambda: train_step(problem, state, False), 3, 3)
    flops, moved = work(problem, state)
    runs = {}
    for name, keys in FORMS.items():  # a precision is torch's setting for all, and the captured graph's own
        runs[name] = Loop(*problem_of(steps, **keys))
        runs[name]()
        assert runs[name].step.forms, "not captured"
    taken = {name: [] for name in runs}
    for _ in range(7):
        for name, run in runs.items():
            taken[name].append(seconds(run, 20, 1))
    floor = max(flops / rates["float32"], moved / bandwidth)
    print(f"  operation by operation {1000 * operation_by_operation:.1f} ms; as one graph " + ", ".join(
        f"{name} {1000 * statistics.median(s):.2f} ms" for name, s in taken.items()))
    ours = statistics.median(taken["adaptive"])
    iterations = torch.zeros((), dtype=torch.int64, device="cuda")
    drawing = seconds(captured(lambda: problem.source.batch("train", iterations, problem.indices)), 20)
    adapting = statistics.median(a / f for a, f in zip(taken["adaptive"], taken["fixed"]))
    print(f"  adapting the rates {100 * adapting - 100:+.1f} %, drawing the tasks {100 * drawing / ours:.1f} % of it\n"
          f"  {flops / 1e9:.1f} GFLOP, {moved / 1e9:.2f} GB: floor "
          f"{1000 * flops / rates['float32']:.2f} ms (float32), {1000 * flops / rates['tf32']:.2f} ms (tf32), "
          f"{1000 * moved / bandwidth:.2f} ms (bytes); measured {ours / floor:.1f} x the float32 floor", flush=True)
    run = runs["adaptive"]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    count, kinds = 100 if steps == 1 else 10, torch.profiler.ProfilerActivity  # of more, the profile itself takes a minute
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profile:
        begun = time.perf_counter()
        for _ in range(count):
            run()
        host = time.perf_counter() - begun
        torch.cuda.set_sync_debug_mode("default")
    calls, kernels, time_of = Counter(), Counter(), Counter()
    for event in profile.events():
        if event.name.startswith(WAITS):
            calls[event.name] += 1
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels[event.name] += 1
            time_of[event.name] += event.device_time_total
    print(f"  {count} iterations in a profile: waits for the device {dict(calls)} (the one at its end is the profiler); the "
          f"host is done after {1000 * host:.0f} ms; {sum(kernels.values()) / count:.0f} kernels an iteration, "
          f"{sum(time_of.values()) / 1000 / count:.2f} ms in them")
    for name, total in time_of.most_common(12):
        print(f"    {total / 1000 / count:7.3f} ms {kernels[name] / count:6.1f} x  {name[:110]}")


def whole_run(iterations: int = 2000) -> None:
    """`alpha-maml train` by itself: how long until it iterates, and how fast then, evaluations left out."""
    with tempfile.TemporaryDirectory() as folder:
        words = [word for name, value in KEYS.items() for word in (f"--{name}", value)]
        begun = time.time()
        subprocess.run([sys.executable, "-m", "alpha_maml", "train", *words, "--iterations", str(iterations),
                        "--evaluation.every", "500", "--tracking.uri", "disabled", "--run_dir", folder], cwd=ROOT, check=True,
                       stdout=subprocess.DEVNULL)
        ended, summary = time.time(), json.loads((Path(folder) / "summary.json").read_text())
        first = read_metrics(Path(folder))[0]["timestamp"] / 1000
    print(f"\na whole run of {iterations} iterations, K = 1, 4 evaluations of 200 tasks: the first iteration after "
          f"{first - begun:.1f} s, {ended - begun:.1f} s in all, {summary['tasks_per_s']:.0f} tasks/s", flush=True)


def memory() -> None:
    """Peaks of an iteration of 16 tasks, above what is held, by the number of inner steps."""
    peaks = {}
    for steps in (1, 5, 50):
        problem, state = problem_of(steps)
        train_step(problem, state, False)
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        train_step(problem, state, False)
        peaks[steps] = (torch.cuda.max_memory_allocated() - held) / 2**20
    print("\npeak memory of an iteration: " + ", ".join(f"K = {k} {mib:.0f} MiB" for k, mib in peaks.items())
          + f"; K = 50 by K = 1: {peaks[50] / peaks[1]:.2f}", flush=True)


def starts(iterations: int, seeds: int) -> None:
    """Iterations to 2.5 from every start, adaptive rule, one graph a seed."""
    begun, found = time.perf_counter(), {}
    for seed in range(seeds):
        problem, first = problem_of(1, seed=str(seed))
        run, initial = Captured(problem, first), {name: t.clone() for name, t in snapshot(first).items()}
        for alpha in STARTS:
            for beta in STARTS:
                for name, t in (initial | {"rates.alpha": torch.full_like(initial["rates.alpha"], alpha),
                                           "rates.beta": torch.full_like(initial["rates.beta"], beta)}).items():
                    run.tensors[name].copy_(t)
                state, rows = first, []
                for _ in range(iterations):
                    state, values = run(state, False)
                    rows.append(values)
                lines = [dict(zip(METRICS, row)) | {"step": i} for i, row in enumerate(torch.stack(rows).tolist(), 1)]
                found[seed, alpha, beta] = iterations_to(lines, 2.5)
    reached = sorted(n for n in found.values() if n is not None)
    print(f"\niterations to 2.5, 64 channels, 16 tasks, medians of {seeds} seeds; {len(reached)} of {len(found)} reach it in "
          f"{iterations}, the median run in {statistics.median(reached or [float('nan')])}, the worst in {reached[-1:]}; "
          f"{time.perf_counter() - begun:.0f} s\n  alpha_0 \\ beta_0 " + " ".join(f"{b:6g}" for b in STARTS))
    for alpha in STARTS:
        print(f"  {alpha:15g} " + " ".join(
            f"{statistics.median(found[s, alpha, b] or iterations + 1 for s in range(seeds)):6g}" for b in STARTS), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--parts", nargs="*", default=["peers", "iteration", "starts"])
    options = parser.parse_args()
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # its process would take three quarters of the memory
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    if "peers" in options.parts:
        for title, setting in SETTINGS.items():
            worked = compare(title, setting, PEERS, options.rounds, "cuda")
            for a, b in (("ours, captured", "learn2learn"), ("ours, captured", "JAX"), ("ours, tf32", "JAX, tf32")):
                if a in worked and b in worked:
                    print(f"  {a} / {b}: {worked[b].median() / worked[a].median():.2f} x", flush=True)
    if "iteration" in options.parts:
        found = ceilings()
        for steps in (1, 5):
            iteration(steps, *found)
        memory()
        whole_run()
    if "starts" in options.parts:
        starts(80, 3)


if __name__ == "__main__":
    main()
