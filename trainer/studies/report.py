"""Figures over runs that have been trained: what to read, what to call each run, and where the figure goes."""
from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from alpha_maml.errors import InputError
from alpha_maml.trainer import config as configuration
from alpha_maml.trainer.config.keys import UNNAMED, Config, table
from alpha_maml.trainer.runs import figures
from alpha_maml.trainer.runs.metrics import read_metrics
from alpha_maml.trainer.tracking import client
from alpha_maml.trainer.tracking.state import read_state

METHODS = {"fixed": "MAML", "paper": "Alpha MAML, paper's rule", "adaptive": "Alpha MAML, adaptive"}


class Recorded(NamedTuple):
    config: Config
    lines: list[dict]  # of metrics.jsonl


def read(folder: Path, needed: tuple[str, ...]) -> Recorded:
    """A run's configuration and metrics; raises InputError where it has none, or none of a `needed` one."""
    config, lines = configuration.of_run(folder, {}), read_metrics(folder)
    if not lines:
        raise InputError(f"run_dir: {folder} has recorded no iteration yet; train it first")
    for name in needed:
        if not any(name in line for line in lines):
            raise InputError(f"run_dir: {folder} has recorded no {name}, which the figure shows; give a run that has")
    return Recorded(config, lines)


def labels(runs: list[Recorded]) -> list[str]:
    """What to call each run beside the others: its method, and the keys in which they differ."""
    values = [configuration.flat_values(run.config) for run in runs]
    differing = [name for name in values[0] if UNNAMED not in table()[name].facts and len({str(v[name]) for v in values}) > 1]
    names = []
    for run, v in zip(runs, values):
        rule = run.config.rates.rule
        words = [f"{name.split('.')[-1]} {_spelled(v[name])}" for name in differing if table()[name].owner in (None, rule)]
        names.append(", ".join([METHODS.get(rule, rule), *words]))
    return names


def _spelled(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def curves(folders: list[Path], target: Path) -> list[Path]:
    """Losses and rates of the runs side by side."""
    runs = [read(folder, figures.NEEDED) for folder in folders]
    thresholds = {run.config.loss_threshold for run in runs}
    named = [(label, run.lines) for label, run in zip(labels(runs), runs)]
    return figures.draw_curves(named, target, thresholds.pop() if len(thresholds) == 1 else None)


def columns(groups: list[list[str]], target: Path) -> list[Path]:
    """The paper's first figure: rates and losses in rows, a column for each [title, folder, ...]."""
    drawn = []
    for title, *folders in groups:
        if not folders:
            raise InputError(f"--column: {title!r} has no runs; write --column TITLE DIR DIR ...")
        runs = [read(Path(folder), figures.NEEDED) for folder in folders]
        drawn.append((title, [(label, run.lines) for label, run in zip(labels(runs), runs)]))
    return figures.draw_columns(drawn, target)


def maps(folder: Path, target: Path) -> list[Path]:
    """Iterations to the threshold over the grid of a sweep."""
    from alpha_maml.trainer.studies import sweep  # imports torch

    rows = sweep.read_table(folder)
    keys = [key for key in rows[0] if key not in sweep.RESULTS and key != "seed"]
    if len(keys) < 2:
        raise InputError(f"--sweep: {folder} varies only {', '.join(keys) or 'the seed'}; a map needs two keys")
    return figures.draw_maps(rows, keys, target)


def log(paths: list[Path], folder: Path) -> str | None:
    """Puts the figure into the MLflow experiment of the run in `folder`, as a run of its own named after the file; a line
    that says why not, or None."""
    try:
        if "experiment_id" not in read_state(folder):
            return None  # a run that is not tracked
        client.log_figure(configuration.build(folder / "config.yaml", {}), folder, paths)
    except Exception as error:  # the store may be away: the files are written
        return f"not in MLflow ({type(error).__name__}); run the same command again to put it there"
    return None
