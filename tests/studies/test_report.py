"""Figures over runs: what is read, what a run is called, what is refused."""
from __future__ import annotations

from pathlib import Path

import pytest
from processes import succeed, wrong

from alpha_maml.trainer.runs.figures import NEEDED
from alpha_maml.trainer.studies import report

SMALL = ("train", "--task.batch", 4, "--iterations", 12, "--evaluation.tasks", 8, "--evaluation.every", 4,
         "--tracking.uri", "disabled", "--checkpoint.every", 0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    for name, more in (("maml", ("--rates.rule", "fixed")), ("paper", ("--rates.rule", "paper", "--rates.beta_hyperlr", 1e-6)),
                       ("other", ("--rates.rule", "paper", "--rates.beta_hyperlr", 1e-5))):
        succeed(*SMALL, *more, "--run_dir", folder / name)
    return [folder / name for name in ("maml", "paper", "other")]


def test_runs_are_called_by_method_and_by_what_differs(runs: list[Path]):
    assert report.labels([report.read(folder, NEEDED) for folder in runs[1:]]) == [
        "Alpha MAML, paper's rule, beta_hyperlr 1e-06", "Alpha MAML, paper's rule, beta_hyperlr 1e-05"]
    assert report.labels([report.read(runs[0], NEEDED)]) == ["MAML"]
    assert report.labels([report.read(folder, NEEDED) for folder in runs[:2]]) == [
        "MAML", "Alpha MAML, paper's rule, beta_hyperlr 1e-06"], "plain MAML has no hyper-rate"


def test_columns_are_drawn_with_every_row(runs: list[Path], tmp_path: Path):
    two = ("--column", "tuned", runs[0], runs[1], "--column", "untuned", *runs[1:])
    succeed("report", *two, "--out", tmp_path / "a" / "b.png")
    drawn = (tmp_path / "a" / "b.svg").read_text()
    assert (tmp_path / "a" / "b.png").stat().st_size > 20_000
    for words in ("inner rate alpha", "meta rate beta", "training loss", "validation loss", "untuned", "MAML"):
        assert f"<!-- {words}" in drawn, words


def test_curves_are_drawn(runs: list[Path], tmp_path: Path):
    succeed("report", "--runs", *runs, "--out", tmp_path / "curves.svg")
    assert (tmp_path / "curves.png").stat().st_size > 20_000


@pytest.mark.parametrize(("arguments", "words"), (
    (("--runs", "none"), "none is not a run's folder"),
    (("--runs", "x" * 300), "cannot be read (File name too long)"),
    (("--sweep", "x" * 300), "cannot be read (File name too long)"),
    (("--column", "alone"), "'alone' has no runs; write --column TITLE DIR DIR"),
    ((), "one of the arguments --runs --sweep --column is required"),
))
def test_wrong_input_is_one_line(arguments: tuple, words: str, tmp_path: Path):
    assert words in wrong("report", *arguments, "--out", tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_runs_without_the_metrics_are_refused(runs: list[Path], tmp_path: Path):
    (tmp_path / "config.yaml").write_text((runs[0] / "config.yaml").read_text())
    for content, words in (("", "has recorded no iteration yet"), ('{"step": 1, "timestamp": 1, "x": 2}\n', "no loss/train")):
        (tmp_path / "metrics.jsonl").write_text(content)
        assert words in wrong("report", "--runs", tmp_path, "--out", tmp_path / "x.png")
