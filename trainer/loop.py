"""The training step, and the loop around it."""
from __future__ import annotations

import math
import os
import platform
import random
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pooch
import torch
from torch import Tensor, nn

import data
import models
from data.errors import InputError, say
from data.tasks import TaskBatch, TaskSizes, TaskSource
from trainer import checkpoint, inner, rates, spool
from trainer.collective import World, broadcast, broadcast_state
from trainer.config import check_ownership, run_dir, to_yaml, trajectory
from trainer.engine import Engine, TorchEngine
from trainer.evaluate import evaluate
from trainer.inner import InnerLoop
from trainer.keys import Config, storage
from trainer.maml import VMAP_INPUTS, Apply, MetaGradient, each_task, meta_gradient, one_task

METRICS = ("loss/train", "loss/support", "accuracy/train", "rates/alpha", "rates/beta", "hypergradients/alpha",
           "hypergradients/beta", "guards/skipped", "guards/nonfinite")
ALPHA, BETA, SKIPPED, NONFINITE = (
    METRICS.index(name) for name in ("rates/alpha", "rates/beta", "guards/skipped", "guards/nonfinite"))
CALIBRATING = 16  # tasks whose support sets set frozen norms: at any number of ranks the same
HOPELESS = 50  # skipped iterations in a row after which a run has diverged: more than halving alpha from 10 to 1e-6 takes


class Diverged(Exception):
    """No iteration gives a finite loss any more; the message says where and what to try."""


@dataclass(frozen=True)
class Problem:
    """What stays the same over a run."""

    config: Config
    world: World
    source: TaskSource
    apply: Apply  # in evaluation mode
    train_apply: Apply  # in training mode, in which a model may draw random numbers
    indices: Tensor  # this rank's shard of the task batch
    dtype: torch.dtype
    apply_tasks: Apply | None = None  # `apply` of many tasks at once, where the model can
    forward_tasks: Apply | None = None  # the same of `train_apply`
    each_task: Callable[..., MetaGradient] = each_task  # or that function compiled
    chunk: int = 0  # tasks differentiated at once; 0 is automatic
    adapted: tuple[str, ...] | None = None  # the tensors that move within a task; None: all
    draw_seed: int = 0  # of what the model draws in iteration 0: for this rank's first task, or for all tasks
    per_step: tuple[str, ...] = ()  # the tensors of which each inner step has its own

    def inner(self, iteration: int) -> InnerLoop:
        return inner.at(self.config, self.adapted, iteration, self.world.device, self.draw_seed, self.per_step)


class State(NamedTuple):
    """What an iteration changes. The engine changes in place."""

    engine: Engine
    rates: rates.Rates
    iteration: int


def train_step(problem: Problem, state: State, stop: bool) -> tuple[State, Tensor]:
    """One meta-iteration of Algorithm 2: the new state, and the values of METRICS with the count of ranks asked to stop."""
    tasks = problem.source.batch("train", state.iteration, problem.indices)
    stopping = torch.full((), float(stop), device=problem.world.device)
    return advance(problem, state, tasks, problem.inner(state.iteration), stopping)


def advance(problem: Problem, state: State, tasks: TaskBatch, loop: InnerLoop, stop: Tensor) -> tuple[State, Tensor]:
    """`train_step` on the given tasks. Every gradient is taken at theta_{t-1}, on the same tasks."""
    config, world, batch = problem.config, problem.world, problem.config.task.batch
    alpha = state.rates.alpha.to(problem.dtype)
    local = meta_gradient(problem.train_apply, problem.source.loss, state.engine.theta(), alpha, tasks, loop, problem.chunk,
                          problem.forward_tasks, problem.each_task)  # 1: adapt with alpha_t
    decided = []

    def decide(total: rates.Total) -> tuple[Tensor, Tensor]:
        """2: beta_t, before theta moves; 4: alpha_{t+1}. Rank 0 decides, every rank obeys."""
        signals, usable = rates.signals(config, total)
        new, finite = state.rates, usable
        if world.rank == 0:
            new, usable, finite = rates.guarded(config, state.rates, total, signals, usable)
        *new, usable, finite = broadcast((*new, usable, finite), world)
        decided.extend((total, signals, rates.Rates(*new), usable > 0, finite > 0))
        return decided[2].beta, decided[3]

    state.engine.step(local, stop, decide)  # the sums over all ranks, the decision, 3: theta_t
    total, signals, new, usable, finite = decided
    values = torch.stack([x.double() for x in (
        total.sums.loss / batch, total.sums.support_loss / batch, total.sums.accuracy / batch, state.rates.alpha.mean(),
        new.beta, signals.alpha_gradient.sum(), -signals.product, ~usable, ~finite, total.stopping)])
    return State(state.engine, new, state.iteration + 1), values


def set_up(config: Config, world: World, outputs: int = 0) -> tuple[Problem, State]:
    """Everything the first iteration needs; raises InputError for what the configuration gets wrong. The model has `outputs`
    outputs where the tasks ask for fewer."""
    task, dtype = config.task, getattr(torch, storage(config.precision))
    products = "tf32" if config.precision == "tf32" else "ieee"  # torch's own default is tf32 for convolutions alone
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = products
    if config.capture and world.device.type != "cuda":
        raise InputError("capture: true needs a GPU, and there is none; leave it null")
    if world.size > task.batch:
        raise InputError(f"task.batch: {task.batch} tasks cannot be shared by {world.size} ranks; raise it, or start at "
                         f"most {task.batch} processes")
    sizes = TaskSizes(task.ways, task.shots, task.queries, task.min_ways, task.min_shots)
    source = data.build(config.data, cache(), sizes, config.seed, dtype, world.device,
                        say if world.rank == 0 else lambda line: None)
    outputs = max(outputs, source.outputs)
    model = models.build(config.model.name, source.input_shape, outputs, config.seed, config.model.channels,
                         config.model.args).to(world.device, dtype)
    if ":" in config.model.name:  # ours are held against this by the tests, and torch.func takes a second to import
        models.check(config.model.name, model, source.input_shape, outputs, config.model.randomness,
                     config.inner.order == "second")
    some = torch.arange(CALIBRATING, device=world.device)
    models.calibrate(model, lambda: source.batch("train", 0, some).support_x.flatten(0, 1))
    per_step = inner.stepped(dict(model.named_parameters()), config.inner.per_step)
    models.for_each_step(model, per_step, config.inner.steps)
    skeleton, indices = models.skeleton(model), world.shard(task.batch)  # theta lives in the engine
    if config.engine.name == "deepspeed":
        from trainer.zero import ZeroEngine

        engine = ZeroEngine(model, config, world)
    else:
        engine = TorchEngine({name: p.detach().clone() for name, p in model.named_parameters()}, config, world)
    apply, train_apply = (models.function(skeleton, training) for training in (False, True))
    apply_tasks = forward_tasks = getattr(skeleton, "forward_tasks", None)
    chunk = task.chunk
    inputs = task.ways * (task.shots + task.queries) * math.prod(source.input_shape)
    native = _native(skeleton, config, world)
    graph = bool(config.compile) and not native
    if config.model.randomness != "error" or graph:
        forward_tasks = None  # only vmap can tell tasks' draws apart, and be one graph
    elif forward_tasks is None and world.device.type == "cpu" and inputs > VMAP_INPUTS:
        forward_tasks, chunk = one_task(train_apply), 1
    draw_seed = random.Random(config.seed).getrandbits(60) + (int(indices[0]) if config.model.randomness == "different" else 0)
    theta = dict(model.named_parameters())
    way = models.compiled(each_task, sizes.count()) if graph else each_task
    problem = Problem(config, world, source, apply, train_apply, indices, dtype, apply_tasks, forward_tasks, way, chunk,
                      inner.chosen(theta, config.inner.adapts, per_step), draw_seed, per_step)
    alpha = inner.alpha_sizes(problem.inner(0), theta)
    return problem, State(engine, rates.initial(config.rates, world.device, alpha), 0)


def cache() -> Path:
    """Where decoded data and compiled code are kept; users and tests move it by XDG_CACHE_HOME."""
    return Path(pooch.os_cache("alpha-maml"))


def _native(skeleton: nn.Module, config: Config, world: World) -> bool:
    """Whether the model runs many tasks as native code."""
    if config.compile is False or world.device.type != "cpu":
        return False
    try:
        return models.natively(skeleton, cache(), os.environ.get("CXX", "c++"))
    except InputError as error:
        if config.compile:
            raise InputError(f"compile: true, but {error}; or set compile: false") from None
        if world.rank == 0:
            say(f"{error}; until then this takes about twice as long")
        return False


def resume(state: State, folder: Path, world: World) -> State:
    """The newest whole checkpoint's state, or `state` where there is none; rank 0 reads, and every rank ends with its
    bits. Raises InputError where the checkpoints do not fit."""
    tensors, iteration = {name: t.clone() for name, t in snapshot(state).items()}, 0
    if world.rank == 0:
        path, complaints = checkpoint.newest(folder / "checkpoints")
        for line in complaints:
            say(line)
        if path is not None:
            checkpoint.load(path, tensors)
            iteration = checkpoint.facts(path)["iteration"]
    return restored(state.engine, tensors, broadcast_state(tensors, iteration, world))


def restored(engine: Engine, tensors: dict[str, Tensor], iteration: int) -> State:
    """The inverse of `snapshot`; `engine` takes the tensors over."""
    values = {name: tensors[f"rates.{name}"] for name in rates.Rates._fields}
    engine.load({name: t for name, t in tensors.items() if not name.startswith("rates.")})
    return State(engine, rates.Rates(**values), iteration)


def snapshot(state: State) -> dict[str, Tensor]:
    """The whole training state by name, as checkpoints hold it, whatever the engine. Every rank must call."""
    return state.engine.state() | {f"rates.{name}": t for name, t in state.rates._asdict().items()}


def train(config: Config, world: World, stop_requested: Callable[[], bool], started: Callable[[Path, bool], None],
          watch: Callable[[int, dict], None]) -> str:
    """Trains up to config.iterations, going on from what the run's folder holds. Returns FINISHED, or KILLED where a stop
    was requested: then the iteration was completed and saved.

    `started(folder, finished before)` and, on flushed iterations, `watch(iteration, metrics)` are called on rank 0.
    Raises InputError, and Diverged.
    """
    begun, folder, status, diverged = time.monotonic(), run_dir(config), "FAILED", False
    with spool.lock(folder) if world.rank == 0 else nullcontext():
        if world.rank == 0:
            check_ownership(folder, config)
        problem, state = set_up(config, world)
        state = resume(state, folder, world)
        finished = state.iteration >= config.iterations
        recorder = spool.Recorder(folder if world.rank == 0 and not finished else None, METRICS, config.task.batch)
        if world.rank == 0:
            if not finished:
                begin(folder, config, problem, state.iteration)
            started(folder, finished)
        if finished:
            return "FINISHED"
        saver = checkpoint.Saver(folder / "checkpoints", config.checkpoint.keep)
        with ExitStack() as ends:  # each of these, whatever another one meets
            if world.rank == 0:
                ends.callback(lambda: conclude(folder, config, world, begun, status, diverged))
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


def begin(folder: Path, config: Config, problem: Problem, iteration: int) -> None:
    """Leaves in the run's folder what it is and that it runs."""
    spool.write_text(folder / "config.yaml", to_yaml(config))
    spool.write_json(folder / "status.json", {
        "status": "RUNNING", "world_size": problem.world.size, "host": platform.node(), "resumed_at": iteration,
        "data": problem.source.identity()})


def conclude(folder: Path, config: Config, world: World, begun: float, status: str, diverged: bool) -> None:
    """Leaves in the run's folder how it ended and what came out."""
    facts = {"world_size": world.size, "device": _device_name(world.device), "engine": config.engine.name,
             "rule": config.rates.rule, "seconds": time.monotonic() - begun, "status": status, "diverged": diverged,
             "versions": {"python": platform.python_version(), "torch": torch.__version__}}
    summary = spool.summarise(spool.read_metrics(folder), config.loss_threshold)
    spool.write_json(folder / "summary.json", summary | facts)
    spool.write_json(folder / "status.json", {"status": status})


def hopeless(config: Config, row: list[float], skipped: int) -> bool:
    """Whether a run ends at an iteration with the values `row`, the last of so many skipped in a row."""
    return skipped >= HOPELESS or (config.on_nonfinite == "stop" and row[NONFINITE] > 0)


def _iterate(problem: Problem, state: State, recorder: spool.Recorder, saver: checkpoint.Saver,
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
                    saver.save(state.iteration, tensors, {"world_size": world.size, "trajectory": trajectory(config)})
        if stopping and not last:
            return "KILLED"
    return "FINISHED"


def _stepper(problem: Problem, state: State) -> Callable[[State, bool], tuple[State, Tensor]]:
    """`train_step`, as CUDA graphs where that can be."""
    config, can = problem.config, problem.world.device.type == "cuda" and problem.config.model.randomness == "error"
    if config.capture is False or not can or not isinstance(state.engine, TorchEngine):
        return partial(train_step, problem)
    from trainer.graph import Captured

    return Captured(problem, state)


def _due(every: int, before: int, iteration: int) -> bool:
    """Whether a multiple of `every` lies after `before`, up to `iteration`."""
    return every > 0 and iteration // every > before // every


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def validate(problem: Problem, state: State) -> dict[str, float]:
    """Metrics of the validation split with the current theta and alpha, and the mean rate of each tensor that has its own."""
    config = problem.config
    alpha = state.rates.alpha.to(problem.dtype)
    result = evaluate(problem.apply, problem.source, state.engine.learned(), alpha, "val", config.evaluation.tasks,
                      problem.inner(state.iteration), problem.world, forward_tasks=problem.apply_tasks)
    found = {"loss/val": result.loss, "accuracy/val": result.accuracy, "accuracy_ci95/val": result.accuracy_ci95}
    return found | inner.means(state.rates.alpha, problem.inner(state.iteration), state.engine.learned())
