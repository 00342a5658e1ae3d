"""Evaluation as papers report it: means and intervals, the curve over inner steps, calibration, and what it leaves behind."""
from __future__ import annotations

import csv
import json
import math
import shutil
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import ROOT, command, free_port, succeed, wrong

from alpha_maml import load
from alpha_maml.data.losses.cross_entropy import cross_entropy
from alpha_maml.data.tasks import TaskBatch, labelled
from alpha_maml.trainer import config as configuration
from alpha_maml.trainer import loop
from alpha_maml.trainer.core.inner import InnerLoop
from alpha_maml.trainer.engines.collective import World
from alpha_maml.trainer.evaluate import BINS, evaluate
from alpha_maml.trainer.tracking.state import read_state

WAYS, TASKS, STEPS = 3, 20, 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, omniglot_root: str) -> Path:
    """A tracked run of Omniglot."""
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    succeed("train", "--data.name", "omniglot", "--data.root", omniglot_root, "--model.name", "conv4", "--model.channels", 8,
            "--task.ways", WAYS, "--task.shots", 1, "--task.queries", 3, "--task.batch", 4, "--iterations", 60,
            "--evaluation.tasks", 8, "--run_dir", folder)
    return folder


def measured(folder: Path, *arguments: object, ranks: int = 0) -> dict:
    return json.loads(succeed("evaluate", "--run_dir", folder, "--evaluation.tasks", TASKS, *arguments, ranks=ranks).stdout)


def by_hand(folder: Path, shots: int, steps: int, ways: int = WAYS) -> list[tuple[np.ndarray, np.ndarray]]:
    """(probabilities [n, ways], labels [n]) of each test task, by the learner that users have, a task at a time."""
    config = configuration.build(folder / "config.yaml", {"task.shots": str(shots), "task.ways": str(ways)})
    tasks, learner = loop.set_up(config, World())[0].source.batch("test", 0, torch.arange(TASKS)), load(folder)
    each = zip(*(t.numpy() for t in tasks.tensors()))
    return [(learner.fit(x, y, steps).predict_proba(q), labels) for x, y, q, labels in each]


def test_numbers_are_those_of_the_learner_task_by_task(trained: Path, tmp_path: Path):
    found = measured(trained, "--inner.steps", STEPS, "--task.shots", 2, "--out", tmp_path / "out")
    curve, rows = found["curve"], list(csv.DictReader((tmp_path / "out/tasks.csv").read_text().splitlines()))
    assert curve["steps"] == [0, 1, 2] and [row["task"] for row in rows] == [str(i) for i in range(TASKS)]
    for steps in curve["steps"]:
        answers = by_hand(trained, 2, steps)
        right = np.array([(p.argmax(1) == y).mean() for p, y in answers])
        losses = np.array([-np.log(p[range(len(y)), y]).mean() for p, y in answers])
        for name, values in (("loss", losses), ("accuracy", right)):
            # A rounding of float32 grows over the steps, and one query of a task may stand at a tie.
            near = {"rel": 1e-3} if name == "loss" else {"abs": 0.01}
            assert curve[name][steps] == pytest.approx(values.mean(), **near)
            assert curve[f"{name}_ci95"][steps] == pytest.approx(1.96 * values.std(ddof=1) / TASKS**0.5, rel=0.05)
            assert np.mean([float(row[f"{name}_{steps}"]) for row in rows]) == pytest.approx(curve[name][steps], rel=1e-12)
    assert found["loss"] == curve["loss"][-1] and found["accuracy_ci95"] == curve["accuracy_ci95"][-1]
    assert curve["loss"][2] < curve["loss"][0], "adaptation does nothing"
    confidence, correct = (np.concatenate(values) for values in zip(*((p.max(1), p.argmax(1) == y) for p, y in answers)))
    ece = sum(abs(correct[mine].mean() - confidence[mine].mean()) * mine.mean() for m in range(BINS)
              if (mine := (confidence > m / BINS) & (confidence <= (m + 1) / BINS)).any())
    assert found["ece"] == pytest.approx(ece, abs=0.01) and ece > 0.02


def test_fewer_ways_take_the_models_first_outputs(trained: Path):
    found = measured(trained, "--task.ways", 2)
    answers = by_hand(trained, 1, 1, 2)
    assert all(p.shape == (6, 2) for p, _ in answers) and found["ways"] == 2
    assert found["accuracy"] == pytest.approx(np.mean([(p.argmax(1) == y).mean() for p, y in answers]), abs=0.01)
    assert found["loss"] == pytest.approx(np.mean([-np.log(p[range(6), y]).mean() for p, y in answers]), rel=1e-3)
    assert found["out"] == str(trained / "evaluation-test-ways2")


@pytest.mark.parametrize(("logits", "expected"), (
    ([[0.0, 0], [0, 0]], 0.0),  # confidence 1/2 and half of them right
    ([[50.0, 0], [50, 0]], 0.5),  # sure, and half of them right
    ([[math.log(3), 0], [0, math.log(3)]], 0.25),  # 3/4, and all right
))
def test_calibration_of_known_answers(logits: list, expected: float):
    class Known:
        loss = staticmethod(cross_entropy)

        def batch(self, split: str, iteration: int, indices: torch.Tensor) -> TaskBatch:
            x = torch.tensor(logits).expand(len(indices), 2, 2)
            y = torch.tensor([0, 1]).expand(len(indices), 2)
            return labelled(x, y, x, y)

    result = evaluate(lambda params, batch: batch[0] + 0 * params["w"], Known(), cross_entropy, {"w": torch.zeros(())},
                      torch.tensor(0.1), "test", 11, InnerLoop(1), World())
    assert result.ece == pytest.approx(expected, abs=1e-6) and float(result.reliability[:, 0].sum()) == 22


def test_the_number_of_ranks_changes_no_digit_and_no_file(trained: Path, tmp_path: Path):
    arguments = ("--inner.steps", STEPS, "--tracking.uri", "disabled", "--out")
    for ranks in (0, 5):  # 5: more than tasks in an iteration of the training
        measured(trained, *arguments, tmp_path / str(ranks), ranks=ranks)
    words = command("evaluate", "--run_dir", trained, "--evaluation.tasks", TASKS, *arguments, tmp_path / "2", ranks=2)
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (table,) = {(tmp_path / str(ranks) / "tasks.csv").read_text() for ranks in (0, 2, 5)}
    summaries = [json.loads((tmp_path / str(ranks) / "evaluation.json").read_text()) for ranks in (0, 2, 5)]
    assert len({json.dumps(summary | {"out": None}) for summary in summaries}) == 1 and len(table.splitlines()) == TASKS + 1


def test_it_is_kept_in_the_folder_and_in_the_mlflow_run(trained: Path):
    plain, other = measured(trained), measured(trained, "--task.shots", 4, "--inner.steps", 3)
    assert plain["out"] == str(trained / "evaluation-test") and other["out"] == str(trained / "evaluation-test-shots4-steps3")
    assert other["accuracy"] > plain["accuracy"] and (other["shots"], other["steps"], other["ways"]) == (4, 3, WAYS)
    run_id = read_state(trained)["run_id"]
    with closing(sqlite3.connect(trained.parent / "mlflow.db")) as store:
        metrics = dict(store.execute("select key, value from latest_metrics where run_uuid = ?", [run_id]))
        assert store.execute("select status from runs").fetchall() == [("FINISHED",)]
    for name, found in (("test", plain), ("test-shots4-steps3", other)):
        for key in ("loss", "loss_ci95", "accuracy", "accuracy_ci95", "ece"):
            assert metrics[f"{name}/{key}"] == found[key]
        kept = {p.name for p in (trained.parent / "mlartifacts" / run_id / "artifacts/evaluation" / name).iterdir()}
        assert kept == {p.name for p in Path(found["out"]).iterdir()} == {
            "evaluation.json", "tasks.csv", "evaluation.png", "evaluation.svg"}
    drawn = (trained / "evaluation-test/evaluation.svg").read_text()
    for words in ("query accuracy", "query loss", "expected calibration error", "share of the queries"):
        assert f"<!-- {words}" in drawn, words


def test_a_regression_has_neither_accuracy_nor_calibration(tmp_path: Path):
    folder = tmp_path / "run"
    succeed("train", "--iterations", 5, "--task.batch", 2, "--evaluation.tasks", 4, "--tracking.uri", "disabled", "--run_dir",
            folder)
    found = measured(folder, "--evaluation.tasks", 1)
    assert found["loss"] > 0 and found["loss_ci95"] is None and found["accuracy"] is None and found["ece"] is None
    assert set(found["curve"]) == {"steps", "loss", "loss_ci95"}
    assert (folder / "evaluation-test/tasks.csv").read_text().splitlines()[0] == "task,loss_0,loss_1"


def test_why_it_is_not_in_mlflow_is_one_line(trained: Path, tmp_path: Path):
    nowhere = f"http://127.0.0.1:{free_port()}"
    untold = tmp_path / "untold"
    shutil.copytree(trained, untold)
    (untold / "tracking.json").unlink()
    for folder, uri, words in ((trained, "disabled", "tracking.uri is disabled"),
                               (trained, nowhere, "run the same command again to put it there"),
                               (untold, nowhere, f"the run is not there yet: alpha-maml sync --run_dir {untold}")):
        result = succeed("evaluate", "--run_dir", folder, "--evaluation.tasks", 2, "--tracking.uri", uri, "--out",
                         tmp_path / "out")
        (line,) = result.stderr.splitlines()
        assert line.startswith("alpha-maml: not in MLflow (") and words in line and json.loads(result.stdout)["tasks"] == 2


@pytest.mark.parametrize(("arguments", "words"), (
    (("--task.ways", 5), f"task.ways: 5 is more than the {WAYS} that the model has outputs for"),
    (("--task.ways", 1), "task.ways: 1 must be 2 or more"),
    (("--model.channels", 4), "model.channels: 4 is not what the run was trained with, 8"),
    (("--rates.alpha", 1), "rates.alpha: 1.0 is not what the run was trained with"),
    (("--task.shots", 18), "task.shots + task.queries: 18 + 3 is more than the 20 drawings"),
    (("--inner.steps", 0), "inner.steps: '0' must be 1 or more"),
    (("--out", "/proc/none"), "--out: /proc/none cannot be written"),
))
def test_what_cannot_be_evaluated_is_one_line(arguments: tuple, words: str, trained: Path):
    assert words in wrong("evaluate", "--run_dir", trained, "--evaluation.tasks", 2, *arguments)


def test_a_run_with_a_rate_for_each_step_is_evaluated_with_more_steps(tmp_path: Path):
    succeed("train", "--task.batch", 4, "--inner.steps", 2, "--rates.alpha_shape", "layer_step", "--inner.adapts", "body",
            "--iterations", 3, "--evaluation.tasks", 8, "--tracking.uri", "disabled", "--run_dir", tmp_path)
    found = measured(tmp_path, "--inner.steps", 4, "--tracking.uri", "disabled")
    assert found["curve"]["steps"] == [0, 1, 2, 3, 4] and len(set(found["curve"]["loss"])) == 5


def test_a_run_of_mixed_sizes_is_evaluated_with_full_tasks_of_any(tmp_path: Path, omniglot_root: str):
    succeed("train", "--data.name", "omniglot", "--data.root", omniglot_root, "--task.ways", 4, "--task.min_ways", 3,
            "--task.shots", 3, "--task.min_shots", 2, "--task.queries", 2, "--task.batch", 4, "--iterations", 3,
            "--evaluation.tasks", 8, "--tracking.uri", "disabled", "--run_dir", tmp_path)
    common = ("--tracking.uri", "disabled")
    assert measured(tmp_path, *common)["out"] == str(tmp_path / "evaluation-test")
    found = measured(tmp_path, *common, "--task.ways", 2, "--task.shots", 1)
    assert found["out"] == str(tmp_path / "evaluation-test-ways2-shots1")
    assert found["loss"] == pytest.approx(math.log(2), abs=0.1), "not chance among two"
