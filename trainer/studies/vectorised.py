"""Runs that differ only in numbers, trained as one program: the training step mapped over an axis of runs (torch.func.vmap).

theta, its memory and the rates get one more axis in front; the tasks, which such runs share, do not. What a run leaves in its
folder is what it leaves when it is trained by itself.
"""
from __future__ import annotations

import copy
import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.func import vmap

from alpha_maml.trainer import config as configuration
from alpha_maml.trainer import loop, objective
from alpha_maml.trainer.config.keys import NUMBER, Config, names
from alpha_maml.trainer.core.meta_gradient import each_task
from alpha_maml.trainer.core.names import RATES
from alpha_maml.trainer.engines.collective import World
from alpha_maml.trainer.runs import checkpoint, summary
from alpha_maml.trainer.runs.folder import lock
from alpha_maml.trainer.runs.metrics import Recorder
from alpha_maml.trainer.setup import set_up
from alpha_maml.trainer.step import Problem, State, restored, snapshot, train_step

WINDOW = 50  # iterations between looks at the values: nothing waits for a GPU in between
LINE_SECONDS = 10.0  # between lines of progress
SHARE = 0.5  # of the free memory that a chunk of runs may take


def together(configs: list[Config]) -> list[list[int]]:
    """The positions of the configurations that agree in all but numbers of the rates and the run's folder: each group can be
    one program."""
    groups: dict[tuple, list[int]] = {}
    free = (*names(NUMBER), "run_dir")
    for position, config in enumerate(configs):
        values = configuration.flat_values(config).items()
        rest = tuple((name, str(value)) for name, value in values if name not in free)
        groups.setdefault(rest, []).append(position)
    return list(groups.values())


def at_once(problem: Problem, state: State, wanted: int) -> int:
    """How many of `wanted` runs fit the memory at once, by what one iteration of one run takes."""
    device = problem.world.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held, free = torch.cuda.memory_allocated(device), torch.cuda.mem_get_info(device)[0]
        train_step(problem, state, False)
        taken = torch.cuda.max_memory_allocated(device) - held
    else:
        try:
            ctypes.CDLL(None).malloc_trim(0)  # what an earlier chunk freed is not this one's
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            held, free = _kilobytes("/proc/self/status", "VmRSS"), _kilobytes("/proc/meminfo", "MemAvailable")
            train_step(problem, state, False)
            taken = _kilobytes("/proc/self/status", "VmHWM") - held
        except (OSError, AttributeError):  # not Linux, not glibc
            return min(wanted, 16)
    return max(1, min(wanted, int(SHARE * free / max(taken, 1))))


def _largest(problem: Problem) -> Problem:
    """The problem with every task as large as any is."""
    source = copy.copy(problem.source)
    source.sizes = source.sizes.largest()
    return replace(problem, source=source)


def _kilobytes(path: str, name: str) -> int:
    return next(int(line.split()[1]) for line in Path(path).read_text().splitlines() if line.startswith(name))


def train(configs: list[Config], world: World, stop_requested: Callable[[], bool]) -> Iterator[tuple[int, str]]:
    """Trains all, in as few programs as can be, and yields (position in `configs`, status) as each run ends: FINISHED,
    DIVERGED, or KILLED where a stop was requested; such a run starts again from its beginning. Raises InputError."""
    for group in together(configs):
        problem, state = set_up(configs[group[0]], world)
        problem = replace(problem, forward_tasks=None, each_task=each_task, chunk=problem.config.task.chunk)  # what vmap maps
        size = at_once(_largest(problem), _copied(state), len(group))
        for start in range(0, len(group), size):
            chunk = group[start : start + size]
            statuses = _train(problem, _copied(state), [configs[i] for i in chunk], stop_requested)
            yield from zip(chunk, statuses)
            if "KILLED" in statuses:
                return


def _copied(state: State) -> State:
    """A state whose engine may change."""
    return state._replace(engine=copy.copy(state.engine))


def _train(problem: Problem, state: State, configs: list[Config], stop_requested: Callable[[], bool]) -> list[str]:
    begun, world = time.monotonic(), problem.world
    iterations, every = problem.config.iterations, problem.config.evaluation.every
    numbers = {}
    for name in names(NUMBER):
        values = [configuration.flat_values(config)[name] for config in configs]
        if set(values) != {configuration.flat_values(problem.config)[name]}:
            numbers[name] = torch.tensor(values, dtype=torch.float64, device=world.device)
    tensors = {name: t.expand(len(configs), *t.shape) for name, t in snapshot(state).items()}
    for name in (f"{RATES}alpha", f"{RATES}beta"):
        if name in numbers:
            tensors[name] = numbers[name].view(-1, *[1] * (tensors[name].dim() - 1)).expand_as(tensors[name])

    def run(tensors: dict[str, Tensor], numbers: dict[str, Tensor], iteration: int) -> tuple[dict[str, Tensor], Tensor]:
        """One iteration of one run."""
        config = problem.config
        for name, value in numbers.items():
            config = configuration.with_key(config, name, value)
        own = replace(problem, config=config, rule=objective.rule(config))
        new, values = train_step(own, restored(copy.copy(state.engine), tensors, iteration), False)
        return snapshot(new), values

    step, pending, shown = vmap(run, in_dims=(0, 0, None), randomness="same"), [], time.monotonic()
    with ExitStack() as locks:
        runs = [_Run(locks, config, problem, begun) for config in configs]
        for done in range(1, iterations + 1):
            tensors, values = step(tensors, numbers, done - 1)
            pending.append(values)
            evaluated = done == iterations or (every > 0 and done % every == 0)
            if not evaluated and len(pending) < WINDOW:
                continue
            for i, (one, rows) in enumerate(zip(runs, torch.stack(pending, 1).cpu())):
                own = {name: t[i].clone() for name, t in tensors.items()}
                one.take(done, rows, restored(copy.copy(state.engine), own, done), evaluated)
            pending.clear()
            if time.monotonic() - shown > LINE_SECONDS:
                shown = time.monotonic()
                print(f"{done}/{iterations} iterations of {len(runs)} runs at once", flush=True)
            if stop_requested():
                break
        return [one.end() for one in runs]


class _Run:
    """One of the runs: its folder, held by a lock, and its record."""

    def __init__(self, locks: ExitStack, config: Config, problem: Problem, begun: float):
        self.config, self.problem, self.folder, self.begun = config, problem, configuration.run_dir(config), begun
        self.status, self.skipped = "KILLED", 0  # until it comes to another end
        locks.enter_context(lock(self.folder))
        configuration.check_ownership(self.folder, config)
        summary.begin(self.folder, config, problem.source.identity(), problem.world.size, 0)
        self.recorder = locks.enter_context(closing(Recorder(self.folder, problem.metrics, config.task.batch)))

    def take(self, iteration: int, rows: Tensor, state: State, evaluated: bool) -> None:
        """Records the values of the iterations up to `iteration`, whose state is given; nothing once the run has diverged."""
        if self.status == "DIVERGED":
            return
        for number, row in enumerate(rows, iteration - len(rows) + 1):
            self.recorder.add(number, row)
            self.skipped = self.skipped + 1 if row[loop.SKIPPED] else 0
            if loop.hopeless(self.config, row, self.skipped):
                self.status = "DIVERGED"
                break
        else:
            if evaluated:
                self.recorder.extend(loop.validate(self.problem, state))
            if iteration == self.config.iterations:
                self.status = "FINISHED"
                checkpoint.save(self.folder / "checkpoints", iteration, snapshot(state), {
                    "world_size": 1, "trajectory": configuration.trajectory(self.config),
                    "relative": self.problem.radius > 0}, self.config.checkpoint.keep)
        self.recorder.flush()

    def end(self) -> str:
        diverged = self.status == "DIVERGED"
        world = self.problem.world
        summary.conclude(self.folder, self.config, world.size, world.device, self.begun,
                         "FAILED" if diverged else self.status, diverged)
        return self.status
