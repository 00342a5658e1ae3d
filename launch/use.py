"""The verbs that put a trained run to use: evaluate, adapt, export."""
from __future__ import annotations

import argparse
import csv
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar

from alpha_maml.errors import InputError, say
from alpha_maml.trainer import config as configuration
from alpha_maml.trainer.config.keys import EVALUATION, Config, table

Result = TypeVar("Result")
FULL = {"task.min_ways": "null", "task.min_shots": "null"}  # what an evaluation's tasks are, whatever the training's were


def add_options(sub: argparse.ArgumentParser, verb: str) -> None:
    if verb == "evaluate":  # the run's folder and what may differ are keys
        sub.add_argument("--split", choices=("val", "test"), default="test", help="whose tasks (default: test)")
        sub.add_argument("--out", type=Path, metavar="FOLDER", help="of the figure and the tables (default: in the run's "
                         "folder, named after the split and after what differs from the training)")
        return
    if verb == "export":
        sub.add_argument("--out", type=Path, metavar="FILE", help="the weights (default: model.safetensors in the run)")
        return
    for name, what in (
            ("support", "the task's labelled examples: a folder of images for each class, or an .npz with x, y"),
            ("query", "what to predict: a folder of images, or an .npz file with x; labels, if there are, are scored")):
        sub.add_argument(f"--{name}", type=Path, required=True, metavar="DIR_OR_NPZ", help=what)
    sub.add_argument("--out", type=Path, metavar="FILE", help="the predictions as CSV (default: printed)")
    sub.add_argument("--inner.steps", type=int, metavar="K", dest="steps", help="gradient steps (default: the run's K)")


def evaluate(known: argparse.Namespace, overrides: dict[str, str]) -> int:
    run_dir = configuration.build(None, {k: v for k, v in overrides.items() if k == "run_dir"}).run_dir
    if run_dir is None:
        raise InputError("run_dir: is needed here; give the folder of a trained run with --run_dir")
    folder = Path(run_dir)
    trained, config = configuration.of_run(folder, {}), configuration.of_run(
        folder, {"evaluation.tasks": "600"} | overrides | FULL)
    name = _name(known.split, trained, config)
    ways = config.task.ways
    if ways > trained.task.ways:
        raise InputError(f"task.ways: {ways} is more than the {trained.task.ways} that the model has outputs for; take at most "
                         "as many")
    out = known.out or folder / f"evaluation-{name}"
    from tqdm import tqdm

    from alpha_maml.data.losses.contract import answers
    from alpha_maml.launch import runtime
    from alpha_maml.trainer import evaluate as evaluation
    from alpha_maml.trainer.loop import resume
    from alpha_maml.trainer.setup import set_up
    from alpha_maml.trainer.tracking import client

    with runtime.world(config.device, config.engine.timeout) as world:
        # alpha may have a row for each inner step of the training; more ranks than tasks in its iterations are welcome here.
        as_trained = configuration.with_key(config, "inner.steps", trained.inner.steps)
        problem, state = set_up(
            configuration.with_key(as_trained, "task.batch", max(config.task.batch, world.size)), world, trained.task.ways)
        state = resume(state, folder, world)
        if state.iteration == 0:
            raise InputError(f"run_dir: {folder} has no checkpoint yet; train it first")
        if world.rank == 0:
            with _written(out):
                out.mkdir(parents=True, exist_ok=True)
        alpha = state.rates.alpha.to(problem.dtype)

        def bar(chunks: Sequence) -> Iterable:
            scale = len(chunks[0]) * world.size if chunks else 1  # a rank may have none
            return tqdm(chunks, unit="task", unit_scale=scale, disable=True if world.rank else None, leave=False,
                        dynamic_ncols=True)

        def of_ways(apply: Callable) -> Callable:
            return apply if ways == trained.task.ways else lambda params, batch: answers(apply(params, batch))[..., :ways]

        loop = problem.inner(state.iteration)._replace(steps=config.inner.steps)
        result = evaluation.evaluate(of_ways(problem.apply), problem.source, problem.loss, state.engine.learned(), alpha,
                                     known.split, config.evaluation.tasks, loop, world, curve=True, progress=bar,
                                     forward_tasks=problem.apply_tasks and of_ways(problem.apply_tasks),
                                     at_once=problem.evaluated)
    if world.rank == 0:
        summary = result.summary() | {
            "split": known.split, "iteration": state.iteration, "steps": config.inner.steps, "ways": config.task.ways,
            "shots": config.task.shots, "queries": config.task.queries, "alpha": float(alpha.mean()), "out": str(out)}
        with _written(out):
            paths = evaluation.write(result, summary, out)
        print(json.dumps(summary), flush=True)
        quoted = result.figures() | {"ece": summary["ece"]}
        figures = {f"{name}/{key}": value for key, value in quoted.items() if value is not None and math.isfinite(value)}
        _in_store(config, folder, lambda: client.log_evaluation(config, folder, figures, paths, f"evaluation/{name}"))
    return 0


def _name(split: str, trained: Config, config: Config) -> str:
    """What an evaluation is called: its split, and what it does in another way than the training, such as test-shots5. Raises
    InputError where that cannot differ."""
    before, words = configuration.trajectory(trained), [split]
    for key, value in configuration.trajectory(config).items():
        if value == before[key] or key in FULL:
            continue
        if EVALUATION not in table()[key].facts:
            raise InputError(f"{key}: {value} is not what the run was trained with, {before[key]}, and cannot differ in an "
                             "evaluation; leave it out")
        words.append(f"{key.rpartition('.')[2]}{value}")
    return re.sub(r"[^\w.-]+", ".", "-".join(words))  # a folder's name, and a metric's


def adapt(known: argparse.Namespace, overrides: dict[str, str]) -> int:
    from alpha_maml.data import examples
    from alpha_maml.data.build import describe

    config = configuration.of_run(known.run_dir, {})
    prepare = describe(config.data, config.task.ways).prepare
    support, query = (examples.read(path, f"--{name}", prepare)
                      for name, path in (("support", known.support), ("query", known.query)))
    if support.y is None:
        raise InputError(f"--support: {known.support} has no labels; give a folder for each class, or an .npz file with y")
    if known.steps is not None and known.steps < 0:
        raise InputError(f"--inner.steps: {known.steps} must be 0 or more; correct it")
    from alpha_maml.trainer.learner import load

    learner = load(known.run_dir)
    try:
        rows = learner.fit(support.x, support.y, known.steps).table(query.x, query.names)
    except ValueError as error:
        raise InputError(f"adapt: {error} (--support {known.support}, --query {known.query})") from None
    with _written(known.out), known.out.open("w", newline="") if known.out else nullcontext(sys.stdout) as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    if query.y is not None and not learner.regression:
        right = sum(str(row[1]) == str(label) for row, label in zip(rows[1:], query.y))
        print(f"accuracy {100 * right / len(query.y):.2f} % of {len(query.y)} examples", file=sys.stderr)
    return 0


def export(known: argparse.Namespace, overrides: dict[str, str]) -> int:
    config, out = configuration.of_run(known.run_dir, {}), known.out or known.run_dir / "model.safetensors"
    if out.suffix != ".safetensors":
        raise InputError(f"--out: {out} must end in .safetensors; correct it")
    from alpha_maml.trainer.learner import load
    from alpha_maml.trainer.tracking import client
    from alpha_maml.trainer.tracking.state import store_uri

    learner = load(known.run_dir)
    with _written(out):
        learner.save(out)
    print(out, flush=True)
    model = _in_store(config, known.run_dir, lambda: client.log_model(config, known.run_dir, learner, out))
    if model:
        store = store_uri(config, known.run_dir)
        print(f"MLFLOW_TRACKING_URI={store} mlflow models serve --env-manager local -m {model}")
    return 0


@contextmanager
def _written(out: Path | None) -> Iterator[None]:
    """Turns what hinders writing `out` into an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"--out: {out} cannot be written ({error.strerror}); choose another place") from None


def _in_store(config: Config, folder: Path, log: Callable[[], Result]) -> Result | None:
    """What `log` puts into the MLflow run of the folder, or a line that says why it is not there."""
    from alpha_maml.trainer.tracking.state import read_state

    try:
        if config.tracking.uri == "disabled":
            reason = "tracking.uri is disabled"
        elif "run_id" not in read_state(folder):
            reason = f"the run is not there yet: alpha-maml sync --run_dir {folder}, then run the same command again"
        else:
            return log()
    except Exception as error:  # the store may be away: the files are written
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}; run the same command again to put it there"
    say(f"not in MLflow ({reason})")
    return None
