"""Runs trained as one program against the same runs trained one by one."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import newest_state
from pictures import class_folders

from alpha_maml.trainer import loop
from alpha_maml.trainer.config import build
from alpha_maml.trainer.engines.collective import World
from alpha_maml.trainer.runs.folder import read_json
from alpha_maml.trainer.runs.metrics import read_metrics
from alpha_maml.trainer.studies import sweep, vectorised

SIZES = {"task.batch": "4", "iterations": "60", "evaluation.tasks": "8", "checkpoint.every": "0", "precision": "float64",
         "tracking.uri": "disabled"}


def never() -> bool:
    return False


def both_ways(folder: Path, base: dict[str, str], grids: list[str], seeds: int = 1) -> list[tuple[sweep.Cell, sweep.Cell]]:
    """The cells of a grid trained in turn, and beside each the same cell trained as part of one program."""
    config = build(None, SIZES | base)
    ways = [sweep.cells(config, grids, seeds, folder / way) for way in ("alone", "together")]
    assert sweep.work(ways[0], World(), never) and sweep.work(ways[1], World(), never, at_once=True)
    return list(zip(*ways))


def agree(alone: sweep.Cell, together: sweep.Cell, tolerance: float) -> None:
    a, b = newest_state(alone.folder), newest_state(together.folder)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=tolerance, atol=tolerance), name
    rows = [read_metrics(cell.folder) for cell in (alone, together)]
    assert len(rows[0]) == len(rows[1]) == alone.config.iterations
    for x, y in zip(*rows):
        for name in x.keys() - {"timestamp", "perf/step_ms", "perf/tasks_per_s"}:
            assert x[name] == pytest.approx(y[name], rel=tolerance, abs=tolerance), (x["step"], name)
    one, other = (read_json(cell.folder / "summary.json") for cell in (alone, together))
    for name in ("status", "iterations_to_threshold", "iterations", "rule"):
        assert one[name] == other[name]
    assert one["val_loss"] == pytest.approx(other["val_loss"], rel=tolerance)


@pytest.mark.parametrize(("base", "grids"), (
    ({}, ["rates.alpha=1e-3,1e-1", "rates.beta=1e-2,1", "rates.kappa=0.5,1"]),
    ({"outer.optimizer": "adam", "evaluation.every": "20"}, ["rates.beta=1e-4,1e-3"]),
    ({"rates.rule": "paper", "task.reduction": "sum", "rates.beta": "1e-4"},
     ["rates.alpha=1e-3,1e-2", "rates.alpha_hyperlr=0,1e-5", "rates.beta_hyperlr=1e-8,1e-10"]),
    ({"rates.alpha_shape": "layer_step", "inner.steps": "2", "inner.adapts": "body", "inner.multi_step_iterations": "30"},
     ["rates.alpha=1e-3,1e-1"]),
    ({"rates.rule": "fixed", "inner.steps": "3"}, ["rates.alpha=1e-3,1e-2", "rates.beta=1e-3,1e-2"]),
))
def test_a_run_among_many_is_the_run_alone(base: dict[str, str], grids: list[str], tmp_path: Path):
    for alone, together in both_ways(tmp_path, base, grids):
        agree(alone, together, 1e-5)


def test_several_seeds_and_rules_are_several_programs(tmp_path: Path):
    grids = ["rates.rule=fixed,adaptive", "rates.alpha=1e-3,1e-2"]
    cells = sweep.cells(build(None, SIZES), grids, 2, tmp_path)
    assert [len(group) for group in vectorised.together([cell.config for cell in cells])] == [2, 2, 2, 2]
    for alone, together in both_ways(tmp_path, {}, grids, seeds=2):
        agree(alone, together, 1e-5)


def test_images_in_single_precision(tmp_path: Path, omniglot_root: str):
    base = {"data.name": "omniglot", "data.root": omniglot_root, "model.name": "conv4", "model.channels": "8",
            "iterations": "8", "task.ways": "5", "task.shots": "1", "task.queries": "1", "precision": "float32",
            "outer.trust": "0.02", "outer.optimizer": "sgd"}  # Muon takes roundings up by hundreds
    for alone, together in both_ways(tmp_path, base, ["rates.alpha=1e-2,1e-1,1"]):
        agree(alone, together, 1e-5)


def test_chunks_that_fit_the_memory_change_nothing(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(vectorised, "at_once", lambda problem, state, wanted: 2)
    for alone, together in both_ways(tmp_path, {"iterations": "10"}, ["rates.alpha=1e-3,1e-2,1e-1"]):
        agree(alone, together, 1e-5)


def test_what_fits_follows_from_one_run(monkeypatch):
    config = build(None, SIZES)
    problem, state = loop.set_up(config, World())
    assert vectorised.at_once(problem, state, 40) == 40
    monkeypatch.setattr(vectorised, "SHARE", 1e-9)
    assert vectorised.at_once(problem, state, 40) == 1


def test_a_run_that_diverges_ends_where_it_would_alone(tmp_path: Path):
    pairs = both_ways(tmp_path, {"rates.rule": "fixed", "iterations": "300"}, ["rates.beta=1e-3,1e30"])
    agree(*pairs[0], 1e-5)
    lengths = [len(read_metrics(cell.folder)) for cell in pairs[1]]
    assert lengths[0] == lengths[1] < 300
    assert all(read_json(cell.folder / "summary.json")["diverged"] for cell in pairs[1])
    assert all(sweep.finished(cell) for pair in pairs for cell in pair)


def test_tasks_of_mixed_sizes_from_a_folder(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = {"data.name": "folder", "data.root": str(class_folders(tmp_path / "root", 25, 6)), "data.size": "32",
            "model.name": "conv4", "model.channels": "4", "task.ways": "4", "task.shots": "3", "task.queries": "2",
            "task.min_ways": "2", "task.min_shots": "1", "iterations": "10"}
    for alone, together in both_ways(tmp_path, base, ["rates.alpha=1e-2,1e-1"]):
        agree(alone, together, 1e-5)


def test_a_sweep_that_was_stopped_goes_on(tmp_path: Path):
    cells = sweep.cells(build(None, SIZES | {"iterations": "120"}), ["rates.alpha=1e-3,1e-2"], 1, tmp_path / "stopped")
    assert not sweep.work(cells, World(), lambda: True, at_once=True)
    assert {read_json(cell.folder / "status.json")["status"] for cell in cells} == {"KILLED"}
    assert not any(sweep.finished(cell) for cell in cells)
    assert sweep.work(cells, World(), never, at_once=True)
    alone = sweep.cells(cells[0].config, ["rates.alpha=1e-3,1e-2"], 1, tmp_path / "alone")
    assert sweep.work(alone, World(), never)
    for a, b in zip(alone, cells):
        agree(a, b, 1e-5)
