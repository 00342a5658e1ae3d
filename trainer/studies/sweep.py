"""A grid of runs: its cells, the work on them in turn, and the table of what came out.

Every cell is an ordinary run in a folder of its own under the sweep's folder, so that a sweep which is started again does only
what is left of it, and every verb works on a cell.
"""
from __future__ import annotations

import csv
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from alpha_maml.errors import InputError, reading
from alpha_maml.trainer import config as configuration
from alpha_maml.trainer import loop
from alpha_maml.trainer.config import Config
from alpha_maml.trainer.engines.collective import World
from alpha_maml.trainer.runs.folder import read_json
from alpha_maml.trainer.runs.summary import SUMMARY, shown
from alpha_maml.trainer.studies import vectorised

RESULTS = ("status", "iterations_to_threshold", "loss_last", "val_loss", "val_accuracy", "alpha_last", "beta_last", "seconds")
TABLE = "sweep.csv"


class Cell(NamedTuple):
    values: dict[str, Any]  # of the grid's keys, and the seed
    config: Config

    @property
    def folder(self) -> Path:
        return configuration.run_dir(self.config)


def axes(grids: list[str]) -> dict[str, list[Any]]:
    """Key -> its values, from "key=value,value,..."; raises InputError."""
    found: dict[str, list[Any]] = {}
    for text in grids:
        name, equals, values = text.partition("=")
        if name in found:
            raise InputError(f"--grid: {name} is given twice; give its values at once, separated by commas")
        if not equals or not values.strip(","):
            raise InputError(f"--grid: {text!r} has no values; write key=value,value,... as in rates.alpha=1e-3,1e-2")
        found[name] = [configuration.checked(name, configuration.from_text(name, v), f"in --grid {name}")
                       for v in values.split(",")]
        if len(set(map(str, found[name]))) < len(found[name]):
            raise InputError(f"--grid: {name} holds a value twice in {values}; drop one")
    return found


def cells(base: Config, grids: list[str], seeds: int, folder: Path) -> list[Cell]:
    """The product of the grids with `seeds` seeds, the base's and those after it; raises InputError."""
    if seeds < 1:
        raise InputError(f"--seeds: {seeds} must be 1 or more; correct it")
    found = axes(grids)
    if "seed" in found and seeds > 1:
        raise InputError("--seeds: the grid has values for seed already; drop one of the two")
    found.setdefault("seed", [configuration.checked("seed", base.seed + i, "with --seeds") for i in range(seeds)])
    made = []
    for values in itertools.product(*found.values()):
        config = base
        for name, value in zip(found, values):
            config = configuration.with_key(config, name, value)
        name = ",".join(f"{key}={value}" for key, value in zip(found, values)).replace("/", "_")
        config = replace(config, run_dir=str(folder / name),
                         tracking=replace(config.tracking, uri=config.tracking.uri or f"sqlite:///{folder.resolve()}/mlflow.db",
                                          sweep=folder.name))
        configuration.check_together(config)
        made.append(Cell(dict(zip(found, values)), config))
    return made


def finished(cell: Cell) -> bool:
    """Whether the cell's run came to its end, a good one or divergence; raises InputError where its folder is another's."""
    if not (cell.folder / SUMMARY).is_file():
        return False
    configuration.check_ownership(cell.folder, cell.config)
    summary = read_json(cell.folder / SUMMARY)
    return summary.get("diverged", False) or (summary.get("iterations") or 0) >= cell.config.iterations


def in_turn(left: list[Cell], world: World, stop: Callable[[], bool]) -> Iterator[tuple[int, str]]:
    """Trains one cell after the other; yields (its position, status) as vectorised.train does."""
    for position, cell in enumerate(left):
        try:
            status = loop.train(cell.config, world, stop, lambda folder, finished: None, lambda step, metrics: None)
        except loop.Diverged:
            status = "DIVERGED"
        yield position, status


def work(todo: list[Cell], world: World, stop: Callable[[], bool], at_once: bool = False) -> bool:
    """Trains what is not finished, one cell after the other or `at_once` as one program, and ships each to MLflow; False
    where a stop was requested."""
    begun, left = time.monotonic(), [cell for cell in todo if not finished(cell)]
    trained = vectorised.train([cell.config for cell in left], world, stop) if at_once else in_turn(left, world, stop)
    for number, (position, status) in enumerate(trained, 1):
        cell = left[position]
        summary = read_json(cell.folder / SUMMARY)
        if cell.config.tracking.uri != "disabled":
            from alpha_maml.trainer.tracking import sender

            try:
                sender.sync(cell.folder, cell.config.tracking.timeout)
            except Exception as error:  # the points stay in the folder, and `alpha-maml sync` ships them
                print(f"{cell.folder}: not in MLflow ({type(error).__name__}); ship it with alpha-maml sync", flush=True)
        seconds = (time.monotonic() - begun) / number * (len(left) - number)
        reached = summary.get("iterations_to_threshold")
        print(f"[{number}/{len(left)}] {cell.folder.name}: {status.lower()}, loss {shown(summary.get('loss_last'))}, "
              f"threshold {f'at {reached}' if reached else 'not reached'}; left {seconds:.0f} s", flush=True)
        if status == "KILLED":
            return False
    return True


def table(done: list[Cell], folder: Path) -> list[dict[str, Any]]:
    """One row a cell, also written as sweep.csv; cells without a result have empty fields."""
    rows = []
    for cell in done:
        summary = read_json(cell.folder / SUMMARY)
        status = "diverged" if summary.get("diverged") else summary.get("status")
        rows.append(cell.values | {name: summary.get(name) for name in RESULTS} | {"status": status})
    with (folder / TABLE).open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return rows


def publish(done: list[Cell]) -> str:
    """Leaves the view of the sweep's comparison page in MLflow; the line that says how to open it, or why it is not there."""
    from alpha_maml.trainer.tracking import client, state

    shipped = [cell for cell in done if "experiment_id" in state.read_state(cell.folder)]
    if not shipped:
        return "Compare runs: none is in MLflow yet; ship them with alpha-maml sync"
    try:
        client.share(shipped[0].config, shipped[0].folder, len(shipped))
    except Exception as error:  # the store may be away: the table stands
        return f"Compare runs: MLflow cannot be reached ({type(error).__name__}); start the same command again later"
    return state.link(shipped[0].config, shipped[0].folder)


def read_table(folder: Path) -> list[dict[str, str]]:
    """The rows of a sweep's table, as text; raises InputError where there is none."""
    path = folder / TABLE
    with reading("--sweep"):
        if not path.is_file():
            raise InputError(f"--sweep: {folder} is no sweep's folder, it has no {TABLE}; give one in which alpha-maml sweep "
                             "ended")
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    for name in RESULTS:
        if not rows or name not in rows[0]:
            raise InputError(f"--sweep: {path} has no column {name}; start alpha-maml sweep again, which writes it anew")
    return rows


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """What to print of a table: over seeds, how many cells reached the threshold and when, by the grid's keys."""
    keys = [name for name in rows[0] if name not in RESULTS and name != "seed"]
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    head = [*keys, "reached", "iterations (median)", "loss at the end"]
    body = []
    for values, group in groups.items():
        reached = [row["iterations_to_threshold"] for row in group if row["iterations_to_threshold"]]
        losses = [row["loss_last"] for row in group if row["loss_last"] is not None]
        body.append([*(f"{v:g}" if isinstance(v, float) else str(v) for v in values), f"{len(reached)} of {len(group)}",
                     f"{statistics.median(reached):g}" if reached else "-",
                     shown(statistics.median(losses) if losses else None)])
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    return ["  ".join(text.rjust(width) for text, width in zip(row, widths)) for row in [head, *body]]
