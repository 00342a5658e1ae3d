"""Sweeps: every cell an ordinary run, done once, in one table, one store and one figure."""
from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from conftest import same_bits, started
from processes import succeed, wrong

from alpha_maml.errors import InputError
from alpha_maml.trainer.config import build
from alpha_maml.trainer.runs.folder import read_json
from alpha_maml.trainer.studies import sweep

SMALL = ("--task.batch", 4, "--iterations", 12, "--evaluation.tasks", 8, "--checkpoint.every", 0)
GRID = ("--grid", "rates.alpha=1e-3,1e-1", "--grid", "rates.beta=1e-2,1")


def test_a_sweep_is_done_once_in_one_store_one_table_and_one_figure(tmp_path: Path):
    folder = tmp_path / "first"
    arguments = ("sweep", *SMALL, *GRID, "--seeds", 2, "--loss_threshold", 1000, "--run_dir", folder)
    printed = succeed(*arguments, "--jobs", 2).stdout
    assert "2 of 2" in printed and str(folder / "sweep.csv") in printed
    rows = sweep.read_table(folder)
    assert len(rows) == 8 and {row["status"] for row in rows} == {"FINISHED"}
    assert {(row["rates.alpha"], row["rates.beta"], row["seed"]) for row in rows} == {
        (a, b, s) for a in ("0.001", "0.1") for b in ("0.01", "1.0") for s in "01"}
    with sqlite3.connect(folder / "mlflow.db") as store:
        assert store.execute("select count(*) from tags where key = 'sweep' and value = 'first'").fetchone() == (8,)
        found = {value for (value,) in store.execute("select distinct value from params where key = 'log10_alpha'")}
        assert found == {"-3", "-1"}
        assert store.execute("select count(distinct run_uuid) from metrics where key = 'final/iterations_to_threshold'"
                             ).fetchone() == (8,)

    again = succeed(*arguments).stdout
    assert "[1/" not in again, "a cell that was done was done again"
    victim = next(folder.glob("rates.alpha=0.1,rates.beta=1.0,seed=1"))
    (victim / "summary.json").unlink()
    assert "[1/1] rates.alpha=0.1,rates.beta=1.0,seed=1" in succeed(*arguments).stdout

    succeed("train", *SMALL, "--rates.alpha", 0.1, "--rates.beta", 1, "--seed", 1, "--loss_threshold", 1000,
            "--tracking.uri", "disabled", "--run_dir", tmp_path / "alone")
    assert same_bits(victim, tmp_path / "alone"), "a cell is not the run of its configuration"

    for _ in range(2):  # the second takes the first one's place in MLflow
        succeed("report", "--sweep", folder, "--out", tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 5000 and (tmp_path / "map.svg").is_file()
    assert len(list(folder.glob("mlartifacts/*/artifacts/figures/map.png"))) == 1


def test_a_second_sweep_of_the_same_folder_is_one_line(tmp_path: Path, background):
    arguments = ("sweep", *SMALL, *GRID, "--iterations", 100_000, "--tracking.uri", "disabled", "--run_dir", tmp_path / "s")
    first = background(*arguments)
    started(first, tmp_path / "s/rates.alpha=0.001,rates.beta=0.01,seed=0", 5)
    for more in ((), ("--jobs", 2)):
        assert "is in use by a running job" in wrong(*arguments, *more)
    first.terminate()
    assert first.wait(60) == 143


def test_two_sweeps_of_one_name_at_once_share_a_store(tmp_path: Path, background):
    store = f"sqlite:///{tmp_path}/mlflow.db"
    both = [background("sweep", *SMALL, "--grid", "rates.alpha=1e-3,1e-1", "--seed", seed, "--tracking.uri", store,
                       "--run_dir", tmp_path / place / "name") for seed, place in enumerate("ab")]
    assert [sweeping.wait(240) for sweeping in both] == [0, 0], (tmp_path / "output.0").read_text()
    for place in "ab":
        assert {row["status"] for row in sweep.read_table(tmp_path / place / "name")} == {"FINISHED"}
    with sqlite3.connect(tmp_path / "mlflow.db") as found:
        assert found.execute("select count(*) from tags where key = 'sweep' and value = 'name'").fetchone() == (4,)
        assert found.execute("select count(*) from runs where status = 'FINISHED'").fetchone() == (4,)


def test_a_cell_that_diverges_is_a_result(tmp_path: Path):
    arguments = ("sweep", *SMALL, "--iterations", 300, "--rates.rule", "fixed", "--tracking.uri", "disabled",
                 "--run_dir", tmp_path, "--grid", "rates.beta=1e-3,1e30")
    succeed(*arguments)
    assert [row["status"] for row in sweep.read_table(tmp_path)] == ["FINISHED", "diverged"]
    assert "[1/" not in succeed(*arguments).stdout


def test_parts_divide_the_cells(tmp_path: Path):
    arguments = ("sweep", *SMALL, *GRID, "--tracking.uri", "disabled", "--run_dir", tmp_path)
    succeed(*arguments, "--part", "1/2")
    done = {path.parent.name for path in tmp_path.glob("*/summary.json")}
    succeed(*arguments, "--part", "2/2")
    assert len(done) == 2 and len(list(tmp_path.glob("*/summary.json"))) == 4
    assert all(read_json(path)["status"] == "FINISHED" for path in tmp_path.glob("*/summary.json"))


def test_vectorised_is_for_the_torch_engine_alone(tmp_path: Path):
    line = wrong("sweep", "--vectorised", "--engine.name", "deepspeed", "--run_dir", tmp_path, *GRID)
    assert "--vectorised: engine.name deepspeed" in line


def test_cells_are_the_product_of_all_values(tmp_path: Path):
    found = sweep.cells(build(None, {"seed": "5"}), ["rates.alpha=1e-3,1e-2", "rates.rule=fixed,adaptive"], 3, tmp_path)
    assert len(found) == 12 == len({cell.folder for cell in found})
    assert {cell.config.seed for cell in found} == {5, 6, 7}
    assert {(cell.config.rates.alpha, cell.config.rates.rule) for cell in found} == {
        (a, r) for a in (1e-3, 1e-2) for r in ("fixed", "adaptive")}


@pytest.mark.parametrize(("grids", "seeds", "message"), (
    (["rates.alpa=1,2"], 1, "rates.alpa: no such key"),
    (["rates.alpha="], 1, "'rates.alpha=' has no values"),
    (["rates.alpha"], 1, "has no values; write key=value,value"),
    (["rates.alpha=1,-2"], 1, "in --grid rates.alpha"),
    (["rates.alpha=1,"], 1, "in --grid rates.alpha"),
    (["rates.alpha=1,1.0"], 1, "holds a value twice"),
    (["rates.alpha=1", "rates.alpha=2"], 1, "given twice"),
    (["seed=1,2"], 2, "drop one of the two"),
    (["data.name=sinusoid,nosuch"], 1, "data.name"),
))
def test_wrong_grids_are_refused(grids: list[str], seeds: int, message: str, tmp_path: Path):
    with pytest.raises(InputError) as error:
        sweep.cells(build(None, {}), grids, seeds, tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_wrong_input_is_one_line(tmp_path: Path):
    assert "run_dir: is needed" in wrong("sweep", *GRID)
    assert "--seeds: 0 must be 1 or more" in wrong("sweep", *GRID, "--run_dir", tmp_path, "--seeds", 0)
    assert "--part: '3/2' must be I/N" in wrong("sweep", *GRID, "--run_dir", tmp_path, "--part", "3/2")
    assert "drop one of the two" in wrong("sweep", *GRID, "--run_dir", tmp_path, "--part", "1/2", "--jobs", 2)
    assert "--grid" in wrong("sweep", "--run_dir", tmp_path)
    assert not list(tmp_path.iterdir())
    report = ("report", "--sweep", tmp_path, "--out", tmp_path / "x.png")
    assert "is no sweep's folder" in wrong(*report)
    (tmp_path / "sweep.csv").write_text("rates.alpha,rates.beta,seed,status\n1,1,0,FINISHED\n")
    assert "has no column iterations_to_threshold" in wrong(*report)
    rest = ",".join(sweep.RESULTS)
    (tmp_path / "sweep.csv").write_text(f"rates.alpha,seed,{rest}\n1,0,FINISHED,3,1,1,1,1,1,1\n")
    assert "varies only rates.alpha" in wrong(*report)
