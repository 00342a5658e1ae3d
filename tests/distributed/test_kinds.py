"""Every new kind of model at world sizes 1, 2 and 3 and on every engine: the same theta; and resumed: the same bits."""
from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from conftest import apart, newest_state, same_bits
from processes import ROOT, succeed
from zoo import ZOO

# Token inputs in vmap, task by task, frozen parts, adapters, tied weights, inputs of two tensors.
KINDS = ("HF Llama", "HF BERT", "LSTM", "frozen backbone with a head", "LoRA on HF GPT-2", "tied weights", "graph convolution")
TESTS = {"PYTHONPATH": str(ROOT / "tests")}


def configured(name: str, folder: Path) -> Path:
    entry = ZOO[name]
    (folder / "c.yaml").write_text(yaml.safe_dump({
        "model": {"name": entry.model, "args": entry.args}, "data": {"name": entry.tasks},
        "task": {"batch": 6, "loss": entry.loss}, "rates": {"rule": "fixed", "alpha": 0.05, "beta": 0.05},
        "tracking": {"uri": "disabled"}, "evaluation": {"tasks": 2}}))
    return folder / "c.yaml"


@pytest.mark.parametrize("name", KINDS)
def test_world_sizes_and_engines_agree_and_a_resumed_run_has_the_same_bits(name: str, tmp_path: Path):
    config = configured(name, tmp_path)
    for ranks in (1, 2, 3):
        succeed("train", "--config", config, "--iterations", 3, "--precision", "float64", "--run_dir", tmp_path / f"r{ranks}",
                ranks=ranks if ranks > 1 else 0, **TESTS)
        assert apart(newest_state(tmp_path / f"r{ranks}"), newest_state(tmp_path / "r1"), "theta.") < 1e-12
    succeed("train", "--config", config, "--iterations", 2, "--precision", "float64", "--run_dir", tmp_path / "half", ranks=2,
            **TESTS)
    succeed("train", "--config", config, "--iterations", 3, "--precision", "float64", "--run_dir", tmp_path / "half", ranks=2,
            **TESTS)
    assert same_bits(tmp_path / "half", tmp_path / "r2")
    single = ("train", "--config", config, "--iterations", 2, "--run_dir")
    succeed(*single, tmp_path / "single", ranks=2, **TESTS)
    for stage in (1, 3):
        succeed(*single, tmp_path / "zero", "--engine.name", "deepspeed", "--engine.zero_stage", stage, ranks=2, **TESTS)
        assert apart(newest_state(tmp_path / "zero"), newest_state(tmp_path / "single"), "theta.") < 1e-5
        shutil.rmtree(tmp_path / "zero")
