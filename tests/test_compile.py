"""The meta-gradient as one graph of torch.compile, against the same without."""
from __future__ import annotations

import os
import subprocess
from pathlib import Path

import torch
from conftest import newest_state
from processes import ROOT, command, run, succeed

COMMON = ("train", "--task.batch", 4, "--inner.steps", 2, "--iterations", 6, "--evaluation.tasks", 8, "--precision", "float64",
          "--rates.alpha_shape", "layer", "--tracking.uri", "disabled")


def test_two_compiled_ranks_train_as_one_without(tmp_path: Path):
    """A model of the user's own."""
    own = {"PYTHONPATH": str(ROOT / "tests")}
    arguments = (*COMMON, "--model.name", "smooth:Smooth", "--run_dir")
    succeed(*arguments, tmp_path / "plain", **own)
    succeed(*arguments, tmp_path / "compiled", "--compile", "true", ranks=2, **own)
    plain, compiled = (newest_state(tmp_path / name) for name in ("plain", "compiled"))
    for name in plain:
        assert torch.allclose(compiled[name], plain[name], rtol=1e-9, atol=1e-12), name


def test_no_compiler_is_one_line(tmp_path: Path):
    environment = os.environ | {"CXX": "/no/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    result = subprocess.run(command(*COMMON, "--compile", "true", "--run_dir", tmp_path / "r"), cwd=ROOT, env=environment,
                            capture_output=True, text=True)
    assert result.returncode == 2 and "alpha-maml: compile: true needs a C++ compiler" in result.stderr
    assert "Traceback" not in result.stderr


def test_compiled_draws_are_refused():
    result = run("train", "--compile", "true", "--model.randomness", "same")
    assert result.returncode == 2 and "alpha-maml: compile: true would draw" in result.stderr
