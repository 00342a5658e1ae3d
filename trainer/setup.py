"""From a configuration to everything that the first iteration needs."""
from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pooch
import torch
from torch import Tensor, nn

from alpha_maml.data import LOSSES, Context
from alpha_maml.data.build import build as build_source
from alpha_maml.data.function import FunctionTasks, Task
from alpha_maml.data.losses.contract import as_loss
from alpha_maml.data.tasks import Loss, TaskBatch, TaskSizes, TaskSource, first_batch
from alpha_maml.errors import InputError, say
from alpha_maml.models import checks, ops
from alpha_maml.models.build import build as build_model
from alpha_maml.models.build import copied, usable
from alpha_maml.models.functional import for_each_step, function, function_of_tasks, learned, skeleton
from alpha_maml.models.norm import calibrate
from alpha_maml.models.prepare import prepare
from alpha_maml.trainer import objective
from alpha_maml.trainer.compiled import compiled
from alpha_maml.trainer.config import Config, run_dir, storage
from alpha_maml.trainer.core.adaptation import Apply
from alpha_maml.trainer.core.inner import alpha_sizes, per_step_names
from alpha_maml.trainer.core.meta_gradient import VMAP_INPUTS, each_task, inputs_of_task, one_task
from alpha_maml.trainer.core.sweep import MetaGradient
from alpha_maml.trainer.engines import ENGINES
from alpha_maml.trainer.engines.collective import World
from alpha_maml.trainer.evaluate import CHUNK
from alpha_maml.trainer.start import frozen_digest, start
from alpha_maml.trainer.step import Problem, State

CALIBRATING = 16  # tasks whose support sets set frozen norms: at any number of ranks the same


class Parts(NamedTuple):
    """What a Python program brings as objects, in the place of the names in a configuration; None: by name."""

    model: nn.Module | None = None
    task: Task | None = None  # (split, number) -> (support, query)
    loss: Callable[[Any, Any], Any] | None = None


class Ways(NamedTuple):
    """How the tasks of a model are differentiated, and evaluated."""

    apply_tasks: Apply | None
    forward_tasks: Apply | None
    each_task: Callable[..., MetaGradient]
    chunk: int
    evaluated: int


def set_up(config: Config, world: World, outputs: int = 0, parts: Parts = Parts()) -> tuple[Problem, State]:  # noqa: B008
    """The problem and the first state; raises InputError for what the configuration gets wrong. The model has `outputs` outputs
    where the tasks ask for fewer."""
    task, dtype = config.task, getattr(torch, storage(config.precision))
    products = "tf32" if config.precision == "tf32" else "ieee"  # torch's own default is tf32 for convolutions alone
    torch_settings: Any = torch  # its stubs lack the newer of these
    torch_settings.backends.cuda.matmul.fp32_precision = torch_settings.backends.cudnn.conv.fp32_precision = products
    torch_settings._C._functorch._set_vmap_fallback_warning_enabled(False)  # of operations that vmap does one by one
    if config.capture and world.device.type != "cuda":
        raise InputError("capture: true needs a GPU, and there is none; leave it null")
    if world.size > task.batch:
        raise InputError(f"task.batch: {task.batch} tasks cannot be shared by {world.size} ranks; raise it, or start at "
                         f"most {task.batch} processes")
    sizes = TaskSizes(task.ways, task.shots, task.queries, task.min_ways, task.min_shots)
    warn = say if world.rank == 0 else lambda line: None
    context = Context(cache(), config.seed, dtype, world.device, warn, task.batch)
    source = build_source(config.data, sizes, context) if parts.task is None else FunctionTasks(
        config.data.name, parts.task, context, task.ways)
    loss = as_loss(parts.loss) if parts.loss else source.loss if task.loss is None else as_loss(LOSSES.find(task.loss))
    outputs = max(outputs, source.outputs)
    model, alpha = _model(config, parts, source, outputs, world, dtype, warn)
    first = first_batch(source, "train", 0, torch.zeros(1, dtype=torch.int64, device=world.device))
    trial = _tried(config, parts, model, loss, first.map(lambda x: x[0]), outputs)
    for line in trial.notes + ([trial.alone] if trial.alone else []):
        warn(line)
    some = torch.arange(CALIBRATING, device=world.device)
    calibrate(model, lambda: first_batch(source, "train", 0, some).support[0].flatten(0, 1))
    for_each_step(model, per_step_names(learned(model), config.inner.per_step), config.inner.steps)

    theta, hollow, indices, outer = learned(model), skeleton(model), world.shard(task.batch), objective.outer_step(config)
    engine = ENGINES.find(config.engine.name).build(theta, outer, objective.divisor(config), world, config.engine.zero_stage)
    apply, train_apply = (function(hollow, training) for training in (False, True))
    ways = _ways(config, world, hollow, apply, train_apply, trial, inputs_of_task(first), sizes.variety())
    seed = random.Random(config.seed).getrandbits(60) + (int(indices[0]) if config.model.randomness == "different" else 0)
    loop = objective.inner_loop(config, theta, seed)
    if task.inner_loss is not None:
        loop = loop._replace(loss=as_loss(LOSSES.find(task.inner_loss)))
    problem = Problem(config, world, source, loss, apply, train_apply, indices, dtype, loop, objective.rule(config),
                      trial.metrics, outer.radius, *ways, hollow, frozen_digest(hollow))
    rates = objective.first_rates(config, alpha_sizes(loop, theta), world.device)
    if alpha is not None and alpha.shape == rates.alpha.shape:  # of the run that this one starts from
        rates = rates._replace(alpha=alpha.to(rates.alpha))
    return problem, State(engine, rates, 0)


def _model(config: Config, parts: Parts, source: TaskSource, outputs: int, world: World, dtype: torch.dtype,
           warn: Callable[[str], None]) -> tuple[nn.Module, Tensor | None]:
    """The model with the values that it starts from, and alpha of the run that it starts from, where there is one."""
    settings = config.model
    if parts.model is not None:
        model = usable(settings.name, copied(parts.model, settings.learns))
    else:
        model = build_model(settings.name, source.input_shape, outputs, config.seed, settings.channels, settings.args)
    model = model.to(world.device, dtype)
    lines = prepare(settings.name, model, settings.learns)
    alpha, notes = start(config, model, run_dir(config))
    for line in lines + notes:
        warn(line)
    return model, alpha


def _tried(config: Config, parts: Parts, model: nn.Module, loss: Loss, first: TaskBatch, outputs: int) -> checks.Trial:
    """What a trial of the model and the loss on the first task finds out."""
    if ":" not in config.model.name:  # ours are held against it by the tests, and torch.func takes a second to import
        with torch.no_grad():
            outputs_of = function(model, training=False)(learned(model), first.query)
            return checks.Trial(tuple(checks.measured(config.model.name, outputs_of, first.query, loss)[1]), None, [])
    plain = isinstance(first.support, tuple) and isinstance(first.support[0], Tensor)
    own = parts.loss or parts.model is not None or config.task.loss
    return checks.check(config.model.name, model, first.support, loss, outputs if plain and not own else None,
                        config.model.randomness, config.inner.order == "second", first.query)


def _ways(config: Config, world: World, model: nn.Module, apply: Apply, train_apply: Apply, trial: checks.Trial, inputs: int,
          sizes: int) -> Ways:
    """`inputs`: numbers that the inputs of a task hold; `sizes`: in how many sizes tasks come."""
    if trial.alone:
        return Ways(one_task(apply), one_task(train_apply), each_task, 1, 1)
    chunk, native, together = config.task.chunk, _enable_native(model, config, world), function_of_tasks(model)
    graph = bool(config.compile) and not native
    if config.model.randomness != "error" or graph:  # only vmap can tell tasks' draws apart, and be one graph
        return Ways(together, None, compiled(each_task, sizes) if graph else each_task, chunk, CHUNK)
    if together is None and world.device.type == "cpu" and inputs > VMAP_INPUTS:
        return Ways(None, one_task(train_apply), each_task, 1, CHUNK)
    return Ways(together, together, each_task, chunk, CHUNK)


def cache() -> Path:
    """Where decoded data and compiled code are kept; users and tests move it by XDG_CACHE_HOME."""
    return Path(pooch.os_cache("alpha-maml"))


def _enable_native(model: nn.Module, config: Config, world: World) -> bool:
    """Whether the model runs many tasks as native code from now on."""
    if config.compile is False or world.device.type != "cpu":
        return False
    try:
        return ops.enable_native(model, cache(), os.environ.get("CXX", "c++"))
    except InputError as error:
        if config.compile:
            raise InputError(f"compile: true, but {error}; or set compile: false") from None
        if world.rank == 0:
            say(f"{error}; until then this takes about twice as long")
        return False
