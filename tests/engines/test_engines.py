"""DeepSpeed at every stage against the torch engine, and checkpoints across engines and world sizes."""
from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from conftest import apart, newest_state
from processes import ROOT, succeed, wrong

STAGES = (0, 1, 2, 3)


def deepspeed(stage: int) -> tuple[object, ...]:
    return ("--engine.name", "deepspeed", "--engine.zero_stage", stage)


def agree(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys()
    for names in ("theta.", "outer.", "rates.alpha", "rates.beta"):
        assert apart(a, b, names) <= tolerance, names


def test_every_stage_trains_as_the_torch_engine_does(tmp_path: Path, omniglot_root: str):
    """Omniglot 20-way, two processes, 20 iterations of a smooth model: the engines' steps round differently, and a ReLU at its
    kink turns a last bit into a difference of 1e-4 within ten iterations."""
    arguments = ("train", "--data.name", "omniglot", "--data.root", omniglot_root, "--model.name", "own:Smooth",
                 "--task.ways", 20, "--task.shots", 1, "--task.queries", 1, "--task.batch", 5, "--outer.weight_decay", 1e-3,
                 "--rates.alpha", 0.1, "--iterations", 20, "--evaluation.tasks", 8, "--tracking.uri", "disabled", "--run_dir")
    tests = {"PYTHONPATH": str(ROOT / "tests")}
    succeed(*arguments, tmp_path / "torch", ranks=2, **tests)
    for stage in STAGES:
        succeed(*arguments, tmp_path / str(stage), *deepspeed(stage), ranks=2, **tests)
        agree(newest_state(tmp_path / str(stage)), newest_state(tmp_path / "torch"), 1e-5)


COMMON = ("train", "--task.batch", 7, "--outer.optimizer", "adam", "--evaluation.tasks", 8, "--tracking.uri", "disabled")


def test_checkpoints_move_between_engines_and_world_sizes(tmp_path: Path):
    """Adam, so that moments move too: ZeRO-2 at four ranks to the torch engine at one, two and three, and back."""
    four, other = (*deepspeed(2),), ("--iterations", 20, "--run_dir")
    succeed(*COMMON, "--iterations", 20, "--run_dir", tmp_path / "whole", ranks=2)
    succeed(*COMMON, *four, "--iterations", 10, "--run_dir", tmp_path / "half", ranks=4)
    for ranks in (1, 2, 3):
        shutil.copytree(tmp_path / "half", tmp_path / f"on_{ranks}")
        succeed(*COMMON, *other, tmp_path / f"on_{ranks}", ranks=ranks)
        agree(newest_state(tmp_path / f"on_{ranks}"), newest_state(tmp_path / "whole"), 1e-6)
    succeed(*COMMON, "--iterations", 10, "--run_dir", tmp_path / "back", ranks=3)
    succeed(*COMMON, *four, *other, tmp_path / "back", ranks=4)
    agree(newest_state(tmp_path / "back"), newest_state(tmp_path / "whole"), 1e-6)


def test_one_process_without_a_launcher(tmp_path: Path):
    succeed(*COMMON, *deepspeed(1), "--iterations", 5, "--run_dir", tmp_path / "zero")
    succeed(*COMMON, "--iterations", 5, "--run_dir", tmp_path / "torch")
    agree(newest_state(tmp_path / "zero"), newest_state(tmp_path / "torch"), 1e-6)


@pytest.mark.parametrize(("arguments", "words"), (
    (("--engine.zero_stage", 4), "engine.zero_stage: '4' must be 0, 1, 2 or 3"),
    (("--engine.name", "deepspeed", "--precision", "float64"), "precision: float64 is not for engine.name deepspeed"),
))
def test_what_deepspeed_cannot_do_is_one_line(arguments: tuple, words: str):
    assert words in wrong("train", *arguments)
