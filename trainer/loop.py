"""The loop around the training step: resuming, recording, evaluating, saving, stopping."""
from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path

from torch import Tensor

from alpha_maml.errors import InputError, say
from alpha_maml.trainer.captured import Captured
from alpha_maml.trainer.config import Config, check_ownership, run_dir, trajectory
from alpha_maml.trainer.core.inner import mean_rates
from alpha_maml.trainer.engines import ENGINES
from alpha_maml.trainer.engines.collective import World, broadcast_state
from alpha_maml.trainer.evaluate import evaluate
from alpha_maml.trainer.runs import checkpoint, summary
from alpha_maml.trainer.runs.folder import lock
from alpha_maml.trainer.runs.metrics import Recorder
from alpha_maml.trainer.setup import Parts, set_up
from alpha_maml.trainer.start import keep_frozen
from alpha_maml.trainer.step import METRICS, Problem, State, restored, snapshot, train_step

ALPHA, BETA, SKIPPED, NONFINITE = (
    METRICS.index(name) for name in ("rates/alpha", "rates/beta", "guards/skipped", "guards/nonfinite"))
HOPELESS = 50  # skipped iterations in a row after which a run has diverged: more than halving alpha from 10 to 1e-6 takes


class Diverged(Exception):
    """No iteration gives a finite loss any more; the message says where and what to try."""


def resume(state: State, folder: Path, world: World, problem: Problem | None = None) -> State:
    """The newest whole checkpoint's state, or `state` where there is none; rank 0 reads, and every rank ends with its
    bits. Raises InputError where the checkpoints do not fit, or could not be trained on as a part of `problem`."""
    tensors, iteration = {name: t.clone() for name, t in snapshot(state).items()}, 0
    if world.rank == 0:
        path, complaints = checkpoint.newest(folder / "checkpoints")
        for line in complaints:
            say(line)
        if path is not None:
            facts = checkpoint.facts(path)
            iteration = facts["iteration"]
            if problem is not None:
                _check_the_same(problem, facts, folder)
            checkpoint.load(path, tensors)
    return restored(state.engine, tensors, broadcast_state(tensors, iteration, world))


def _check_the_same(problem: Problem, facts: dict, folder: Path) -> None:
    if problem.frozen is not None and facts.get("frozen", problem.frozen) != problem.frozen:
        raise InputError(f"run_dir: {folder} was trained beside other frozen parameters than the model has now; give the model "
                         "that it began with, or another run_dir")
    if facts.get("relative", False) != (problem.radius > 0):
        raise InputError(f"run_dir: {folder} was trained by rule adaptive of version 0.1, which took other steps; choose "
                         "another run_dir, or go on with that version")


def train(config: Config, world: World, stop_requested: Callable[[], bool], started: Callable[[Path, bool], None],
          watch: Callable[[int, dict], None], parts: Parts = Parts()) -> str:  # noqa: B008
    """Trains up to config.iterations, going on from what the run's folder holds. Returns FINISHED, or KILLED where a stop
    was requested: then the iteration was completed and saved.

    `started(folder, finished before)` and, on flushed iterations, `watch(iteration, metrics)` are called on rank 0.
    Raises InputError, and Diverged.
    """
    begun, folder, status, diverged = time.monotonic(), run_dir(config), "FAILED", False
    with lock(folder) if world.rank == 0 else nullcontext():
        if world.rank == 0:
            check_ownership(folder, config)
        problem, state = set_up(config, world, parts=parts)
        state = resume(state, folder, world, problem)
        finished = state.iteration >= config.iterations
        recorder = Recorder(folder if world.rank == 0 and not finished else None, problem.metrics, config.task.batch)
        if world.rank == 0:
            if not finished:
                if problem.model is not None:
                    keep_frozen(problem.model, config, folder)
                summary.begin(folder, config, problem.source.identity(), world.size, state.iteration)
            started(folder, finished)
        if finished:
            return "FINISHED"
        saver = checkpoint.Saver(folder / "checkpoints", config.checkpoint.keep)
        with ExitStack() as ends:  # each of these, whatever another one meets
            if world.rank == 0:
                ends.callback(lambda: summary.conclude(folder, config, world.size, world.device, begun, status, diverged))
            ends.callback(saver.wait)
            ends.callback(recorder.close)
            try:
                ended = _iterate(problem, state, recorder, saver, stop_requested, watch)
                saver.wait()  # a run whose last checkpoint cannot be written has not finished
                status = ended
            except Diverged:
                diverged = True
                raise
    return status


def hopeless(config: Config, row: Sequence[float] | Tensor, skipped: int) -> bool:
    """Whether a run ends at an iteration with the values `row`, the last of so many skipped in a row."""
    return skipped >= HOPELESS or (config.on_nonfinite == "stop" and bool(row[NONFINITE] > 0))


def _iterate(problem: Problem, state: State, recorder: Recorder, saver: checkpoint.Saver,
             stop_requested: Callable[[], bool], watch: Callable[[int, dict], None]) -> str:
    config, world, skipped, saved = problem.config, problem.world, 0, state.iteration
    every = 1 if world.device.type == "cpu" else 10  # starting to read values back costs a GPU's host some time
    step = _stepper(problem, state)
    while state.iteration < config.iterations:
        state, values = step(state, stop_requested())
        last = state.iteration == config.iterations
        recorder.add(state.iteration, values)
        evaluating = last or _due(config.evaluation.every, state.iteration - 1, state.iteration)
        if evaluating:
            with recorder.aside():
                recorder.extend(validate(problem, state))
        if not (last or _due(every, state.iteration - 1, state.iteration)):
            continue
        saving = last or _due(config.checkpoint.every, saved, state.iteration)
        rows = recorder.flush(wait=every == 1 or evaluating or saving)
        saver.check()
        for iteration, row in rows:
            skipped = skipped + 1 if row[SKIPPED] else 0
            if hopeless(config, row, skipped):
                raise Diverged(f"training diverged at iteration {iteration}, without a usable loss for {skipped}, at alpha "
                               f"{row[ALPHA]:.3g} and beta {row[BETA]:.3g}; lower rates.alpha and rates.beta, or use "
                               "rates.rule adaptive; the last checkpoint is from before")
        if world.rank == 0 and rows:
            watch(rows[-1][0], recorder.latest)
        stopping = any(row[-1] for _, row in rows)  # the same on all ranks, since it came through the all-reduce
        # Not while iterations are skipped: a theta at which nothing is finite would push the good checkpoints out.
        if last or stopping or (saving and not skipped):
            saved = state.iteration
            recorder.flush()
            with recorder.aside():
                tensors = snapshot(state)
                if world.device.type == "cuda":
                    tensors = {name: t.clone() for name, t in tensors.items()}  # a graph writes its own anew
                if world.rank == 0:
                    saver.save(state.iteration, tensors, {
                        "world_size": world.size, "trajectory": trajectory(config), "frozen": problem.frozen,
                        "relative": problem.radius > 0})
        if stopping and not last:
            return "KILLED"
    return "FINISHED"


def _stepper(problem: Problem, state: State) -> Callable[[State, bool], tuple[State, Tensor]]:
    """`train_step`, as CUDA graphs where that can be."""
    config = problem.config
    can = ENGINES.has(config.engine.name, "replicated") and config.model.randomness == "error"
    if can and problem.world.device.type == "cuda" and config.capture is not False:
        return Captured(problem, state)
    return partial(train_step, problem)


def _due(every: int, before: int, iteration: int) -> bool:
    """Whether a multiple of `every` lies after `before`, up to `iteration`."""
    return every > 0 and iteration // every > before // every


def validate(problem: Problem, state: State) -> dict[str, float]:
    """Metrics of the validation split with the current theta and alpha, and the mean rate of each tensor that has its own."""
    config = problem.config
    alpha = state.rates.alpha.to(problem.dtype)
    result = evaluate(problem.apply, problem.source, problem.loss, state.engine.learned(), alpha, "val",
                      config.evaluation.tasks, problem.inner(state.iteration), problem.world, forward_tasks=problem.apply_tasks,
                      at_once=problem.evaluated)
    found = {f"{name}/val": value for name, value in result.figures().items() if name != "loss_ci95"}
    return found | mean_rates(state.rates.alpha, problem.inner(state.iteration), state.engine.learned())
