"""Several real processes under torchrun: the number of ranks changes nothing that anyone can measure."""
from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from conftest import apart, newest_state, same_bits
from processes import ROOT, command, free_port, run, succeed

from alpha_maml.trainer.runs.folder import read_json
from alpha_maml.trainer.runs.metrics import read_metrics

# Seven tasks: every world size but one and seven shards them unevenly.
COMMON = ("--task.batch", 7, "--task.shots", 5, "--task.queries", 5, "--inner.steps", 2, "--iterations", 20,
          "--evaluation.tasks", 20, "--tracking.uri", "disabled")


def train(folder: Path, ranks: int, *arguments: object) -> dict[str, torch.Tensor]:
    succeed("train", *COMMON, "--run_dir", folder, *arguments, ranks=ranks)
    return newest_state(folder)


@pytest.mark.parametrize(("rule", "precision", "tolerance"), (
    ("adaptive", "float64", 1e-12), ("adaptive", "float32", 3e-4), ("paper", "float64", 1e-12)))
def test_world_sizes_agree(rule: str, precision: str, tolerance: float, tmp_path: Path):
    arguments = ("--rates.rule", rule, "--precision", precision, "--rates.alpha_hyperlr", 1e-6, "--rates.beta_hyperlr", 1e-8)
    states = {size: train(tmp_path / str(size), size, *arguments) for size in (1, 2, 3, 4)}
    plain = tmp_path / "plain"
    succeed("train", *COMMON, "--run_dir", plain, *arguments)
    for size, state in states.items():
        for names in ("theta.", "rates.alpha", "rates.beta", "outer.previous."):
            # Orthogonalising takes the rounding of a direction's least singular values up, by hundreds.
            allowed = 10 * tolerance if names == "outer.previous." and precision == "float32" else tolerance
            assert apart(state, newest_state(plain), names) <= allowed, (size, names)
    assert apart(states[1], newest_state(plain), "theta.") == 0, "torchrun with one process is the plain command"
    losses = [read_json(tmp_path / str(size) / "summary.json")["val_loss"] for size in states]
    assert losses == pytest.approx([losses[0]] * 4, rel=100 * tolerance)
    skipped = [line["guards/skipped"] for line in read_metrics(plain)]
    moved = (states[4]["rates.alpha"] != 0.01).any() and states[4]["rates.beta"] != 0.001
    assert sum(skipped) == 0 and moved, "nothing happened"


@pytest.mark.parametrize("options", (
    ("--rates.alpha_shape", "layer_step", "--inner.multi_step_iterations", 15, "--inner.first_order_iterations", 5),
    ("--rates.alpha_shape", "parameter", "--rates.rule", "paper", "--rates.alpha_hyperlr", 1e-6, "--rates.beta_hyperlr", 1e-8),
    ("--rates.alpha_shape", "layer", "--inner.adapts", "head", "--inner.clip", 0.5, "--inner.weight_decay", 0.1),
    ("--inner.order", "reptile", "--inner.adapts", "layers.1.*,layers.5.*", "--outer.weight_decay", 0.01)), ids=lambda o: o[1])
def test_world_sizes_agree_whatever_adapts_and_however(options: tuple, tmp_path: Path):
    states = {size: train(tmp_path / str(size), size, "--precision", "float64", *options) for size in (1, 2, 3)}
    for size in (2, 3):
        for names in ("theta.", "rates.alpha", "rates.beta"):
            assert apart(states[size], states[1], names) <= 1e-12, (size, names)
    start = torch.full_like(states[1]["rates.alpha"], 0.01)
    assert float((states[1]["rates.alpha"] != start).double().mean()) > 0.5, "rates never moved"  # a dead unit has none


@pytest.mark.parametrize("norm", ("batch", "frozen"))
def test_world_sizes_agree_on_norms_of_each_step(norm: str, tmp_path: Path, omniglot_root: str):
    arguments = ("--data.name", "omniglot", "--data.root", omniglot_root, "--model.name", "conv4", "--model.channels", 8,
                 "--task.ways", 5, "--task.shots", 1, "--task.queries", 2, "--model.args", f"{{norm: {norm}}}",
                 "--inner.per_step", "*norm*", "--precision", "float64", "--iterations", 8)
    one, two = (train(tmp_path / str(size), size, *arguments) for size in (1, 2))
    for names in ("theta.", "rates.alpha", "rates.beta"):
        assert apart(two, one, names) <= 1e-12, names
    first, second = one["theta.blocks.0.norm.weight"]
    assert first.shape == (8,) and not torch.allclose(first, second), "the steps' own have stayed alike"


def test_the_same_world_size_twice_gives_the_same_bits_and_so_does_a_resumed_run(tmp_path: Path):
    arguments = ("--outer.optimizer", "adam", "--checkpoint.every", 4)
    first, second = (train(tmp_path / name, 2, *arguments) for name in ("a", "b"))
    half = train(tmp_path / "c", 2, *arguments, "--iterations", 10)
    resumed = train(tmp_path / "c", 2, *arguments)
    assert first.keys() == second.keys() == resumed.keys()
    for name in first:
        assert torch.equal(first[name], second[name]) and torch.equal(first[name], resumed[name]), name
    assert any(not torch.equal(half[name], resumed[name]) for name in half if name.startswith("rates."))
    steps = [line["step"] for line in read_metrics(tmp_path / "c")]
    assert steps == list(range(1, 21)), "each iteration stands once"


def test_evaluation_gives_the_same_numbers_at_any_world_size(tmp_path: Path, omniglot_root: str):
    folder = tmp_path / "run"
    succeed("train", "--data.name", "omniglot", "--data.root", omniglot_root, "--model.name", "conv4", "--model.channels", 8,
            "--task.ways", 5, "--task.shots", 1, "--task.queries", 2, "--task.batch", 4, "--iterations", 3,
            "--tracking.uri", "disabled", "--run_dir", folder, ranks=2)
    outputs = [succeed("evaluate", "--run_dir", folder, "--evaluation.tasks", 50, "--inner.steps", 3, ranks=size).stdout
               for size in (0, 2, 3)]
    assert outputs[0] == outputs[1] == outputs[2]
    assert '"tasks": 50' in outputs[0] and '"steps": 3' in outputs[0] and '"split": "test"' in outputs[0]


def test_ranks_beyond_the_tasks_are_refused(tmp_path: Path):
    result = run("train", "--task.batch", 1, "--tracking.uri", "disabled", "--run_dir", tmp_path / "r", ranks=2)
    assert result.returncode == 2
    assert result.stderr.startswith("alpha-maml: task.batch: 1 tasks cannot be shared by 2 ranks")


def test_torchrun_starts_the_same_training(tmp_path: Path):
    """The launcher that users have, against the processes of the tests above."""
    arguments = ("train", *COMMON, "--run_dir")
    subprocess.run(command(*arguments, tmp_path / "torchrun", ranks=2), cwd=ROOT, check=True, capture_output=True)
    succeed(*arguments, tmp_path / "here", ranks=2)
    assert same_bits(tmp_path / "torchrun", tmp_path / "here")


def test_a_master_that_cannot_be_reached_is_one_line(tmp_path: Path):
    result = run("train", *COMMON, "--run_dir", tmp_path / "r", "--engine.timeout", 2, WORLD_SIZE="2", RANK="1",
                 LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    assert result.returncode == 2 and "alpha-maml: MASTER_ADDR: 127.0.0.1" in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("alpha-maml:")]) == 1
    assert "Traceback" not in result.stderr
