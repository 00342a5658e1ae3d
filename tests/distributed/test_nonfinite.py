"""One rank's task gives nan: both ranks do the same about it, at once, and nothing of it stays."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import newest_state
from faulty import Curves
from processes import ROOT, run, succeed

from alpha_maml.data.own import Own
from alpha_maml.data.tasks import TaskSizes
from alpha_maml.trainer.runs import checkpoint
from alpha_maml.trainer.runs.folder import read_json
from alpha_maml.trainer.runs.metrics import read_metrics

TASKS, ITERATIONS, SICK = 4, 40, 7
TESTS = {"PYTHONPATH": str(ROOT / "tests")}
COMMON = ("train", "--data.name", "faulty:Curves", "--data.args", f"{{sick: {SICK}}}", "--task.batch", TASKS, "--iterations",
          ITERATIONS, "--evaluation.tasks", 8, "--checkpoint.every", 1, "--checkpoint.keep", ITERATIONS, "--tracking.uri",
          "disabled", "--run_dir")


def sick_tasks() -> list[torch.Tensor]:
    """The indices of the tasks that are not numbers, iteration by iteration."""
    own = Own("faulty:Curves", {"sick": SICK}, TaskSizes(1, 10, 10, None, None), 0, torch.float64, torch.device("cpu"), print)
    assert Curves.outputs == own.outputs
    return [own.batch("train", i, torch.arange(TASKS)).query_y.isnan().flatten(1).any(1).nonzero().flatten()
            for i in range(ITERATIONS)]


SICK_TASKS = sick_tasks()
BAD = [i + 1 for i, tasks in enumerate(SICK_TASKS) if len(tasks)]


def test_the_problem_has_bad_tasks_on_either_rank():
    ranks = {int(t) // (TASKS // 2) for tasks in SICK_TASKS for t in tasks}
    assert ranks == {0, 1} and 2 < len(BAD) < ITERATIONS / 2


@pytest.mark.parametrize(("action", "rule", "engine"), (
    ("skip", "adaptive", "torch"), ("halve", "adaptive", "torch"), ("halve", "paper", "torch"), ("skip", "fixed", "deepspeed")))
def test_both_ranks_skip_the_iteration(action: str, rule: str, engine: str, tmp_path: Path):
    options = ("--on_nonfinite", action, "--rates.rule", rule, "--rates.alpha_hyperlr", 1e-6, "--rates.beta_hyperlr", 1e-8)
    options += ("--precision", "float64") if engine == "torch" else ("--engine.name", engine)
    succeed(*COMMON, tmp_path / "two", *options, ranks=2, **TESTS)
    lines = read_metrics(tmp_path / "two")
    assert [line["step"] for line in lines if line["guards/nonfinite"]] == BAD
    assert {line["step"] for line in lines if "loss/train" not in line} == set(BAD)
    states = {int(path.name): checkpoint.read(path) for path in checkpoint.saved(tmp_path / "two/checkpoints")}
    assert all(bool(torch.isfinite(t).all()) for state in states.values() for t in state.values())
    assert states.keys() & set(BAD) <= {ITERATIONS}, "saved while nothing was finite"
    for before, after in ((i - 1, i + 1) for i in BAD if {i - 1, i + 1} <= states.keys()):
        assert int(states[after]["outer.count"]) == int(states[before]["outer.count"]) + 1, "theta moved in a bad iteration"
    if engine == "torch":
        succeed(*COMMON, tmp_path / "one", *options, **TESTS)
        expected = newest_state(tmp_path / "one")
        for name, found in newest_state(tmp_path / "two").items():
            assert torch.allclose(found, expected[name], rtol=1e-9, atol=1e-13), name
    rates = [line["rates/alpha"] for line in lines]
    if rule != "adaptive" and action == "halve":
        assert rates[BAD[0]] == pytest.approx(rates[BAD[0] - 1] / 2)  # the line after the bad one holds the halved rate


def test_stop_ends_the_run_in_that_iteration_and_the_last_checkpoint_is_from_before(tmp_path: Path):
    result = run(*COMMON, tmp_path / "run", "--on_nonfinite", "stop", ranks=2, **TESTS)
    (line,) = result.stderr.splitlines()
    assert result.returncode == 1 and line.startswith(f"alpha-maml: training diverged at iteration {BAD[0]}")
    assert "alpha 0" in line and "beta 0" in line and "lower rates.alpha" in line
    assert read_metrics(tmp_path / "run")[-1]["step"] == BAD[0]
    assert int(checkpoint.saved(tmp_path / "run/checkpoints")[-1].name) == BAD[0] - 1
    assert read_json(tmp_path / "run/summary.json")["diverged"] is True


def test_good_checkpoints_are_not_pushed_out_by_a_run_that_diverges(tmp_path: Path):
    result = run("train", "--iterations", 1000, "--checkpoint.every", 5, "--task.batch", 4, "--tracking.uri", "disabled",
                 "--rates.rule", "paper", "--rates.beta_hyperlr", 1e-4, "--run_dir", tmp_path / "run", ranks=2)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1, result.stderr
    skipped = [line["step"] for line in read_metrics(tmp_path / "run") if line["guards/skipped"]]
    last = checkpoint.saved(tmp_path / "run/checkpoints")[-1]
    assert len(skipped) >= 50 and int(last.name) < skipped[-50]
    assert all(bool(torch.isfinite(t).all()) for t in checkpoint.read(last).values())
