"""The meta-gradient as one graph of torch.compile, against the same without."""
from __future__ import annotations

import os
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import Small, newest_state
from processes import ROOT, command, succeed, wrong
from torch._dynamo.utils import counters

from alpha_maml.data.tasks import TaskSizes, classification_batch
from alpha_maml.trainer.compiled import compiled
from alpha_maml.trainer.core.inner import InnerLoop
from alpha_maml.trainer.core.meta_gradient import each_task

COMMON = ("train", "--task.batch", 4, "--inner.steps", 2, "--iterations", 6, "--evaluation.tasks", 8, "--precision", "float64",
          "--rates.alpha_shape", "layer", "--task.min_shots", 3, "--tracking.uri", "disabled")


def test_two_compiled_ranks_train_as_one_without(tmp_path: Path):
    """A model of the user's own, tasks of mixed sizes: one graph for all."""
    own = {"PYTHONPATH": str(ROOT / "tests"), "TORCH_LOGS": "recompiles"}
    arguments = (*COMMON, "--model.name", "own:Smooth", "--run_dir")
    succeed(*arguments, tmp_path / "plain", **own)
    result = succeed(*arguments, tmp_path / "compiled", "--compile", "true", ranks=2, **own)
    sizes = TaskSizes(1, 10, 10, min_shots=3)
    assert sizes.variety() == 8 and len({sizes.at(0, "train", i) for i in range(6)}) > 2
    assert "Recompiling" not in result.stderr
    plain, compiled = (newest_state(tmp_path / name) for name in ("plain", "compiled"))
    for name in plain:
        assert torch.allclose(compiled[name], plain[name], rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize(("name", "graphs"), (("mlp", 1), ("conv4_pooled", 2)))
def test_one_graph_is_for_all_sizes_where_torch_can(name: str, graphs: int, monkeypatch: pytest.MonkeyPatch):
    """Not of convolutions, whose second derivative inside vmap needs sizes: each size has its own. Traced, not generated."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    problem = Small(name, channels=2)
    sizes, generator = TaskSizes(5, 2, 2, 2, 1), torch.Generator().manual_seed(0)
    run, loss = compiled(each_task, sizes.variety()), sizes.cross_entropy()
    for ways, shots in ((5, 2), (4, 1)):
        images = torch.rand(3, ways, shots + 3, *problem.tasks.support_x.shape[2:], generator=generator, dtype=torch.float64)
        arguments = problem.apply, loss, problem.theta, problem.alpha, classification_batch(images, shots), InnerLoop(1)
        expected, found = each_task(*arguments), run(*arguments)
        assert all(torch.allclose(found.gradient[name], g, rtol=1e-10) for name, g in expected.gradient.items())
    assert counters["stats"]["unique_graphs"] == graphs


def test_no_compiler_is_one_line(tmp_path: Path):
    environment = os.environ | {"CXX": "/no/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    result = subprocess.run(command(*COMMON, "--compile", "true", "--run_dir", tmp_path / "r"), cwd=ROOT, env=environment,
                            capture_output=True, text=True)
    assert result.returncode == 2 and "alpha-maml: compile: true needs a C++ compiler" in result.stderr
    assert "Traceback" not in result.stderr


def test_compiled_draws_are_refused():
    assert "compile: true would draw" in wrong("train", "--compile", "true", "--model.randomness", "same")
