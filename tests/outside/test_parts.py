"""A data set, a model, a loss, an outer optimiser and a rule from outside the package: each is one file and one line in a
registry, and does what it says in a run."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alpha_maml.trainer.runs import checkpoint
from alpha_maml.trainer.runs.metrics import read_metrics

MODEL = """
import torch
from torch import nn

class Cubic(nn.Module):
    def __init__(self, input_shape, outputs):
        super().__init__()
        self.coefficients = nn.Parameter(torch.tensor([0.1, 0.2, 0.3]))

    def forward(self, x):
        return (self.coefficients * torch.cat([x, x**2, x**3], -1)).sum(-1, keepdim=True)
"""
DATA = """
import torch
from alpha_maml.data import Description
from alpha_maml.data.losses.mean_squared_error import mean_squared_error
from alpha_maml.data.tasks import draw, labelled

class Lines:
    input_shape, outputs, on_device, loss = (1,), 1, True, staticmethod(mean_squared_error)

    def __init__(self, sizes, context):
        self.sizes, self.context = sizes, context

    @classmethod
    def build(cls, settings, sizes, context):
        return cls(sizes, context)

    @classmethod
    def describe(cls, settings, ways):
        return Description(cls.input_shape, cls.outputs, mean_squared_error, True)

    def batch(self, split, iteration, indices):
        x = draw(self.context.seed, split, iteration, indices, 0, 1 + self.sizes.shots + self.sizes.queries)[..., None]
        slope, x = x[:, :1], x[:, 1:]
        x, y, shots = x.to(self.context.dtype), (slope * x).to(self.context.dtype), self.sizes.shots
        return labelled(x[:, :shots], y[:, :shots], x[:, shots:], y[:, shots:])

    def identity(self):
        return {"name": "lines", "digest": "analytic"}
"""
LOSS = """
def absolute_error(outputs, batch):
    return (outputs - batch[1]).abs().mean(), {"quarter": 0.25}
"""
OPTIMIZER = """
from alpha_maml.trainer.optim.optimizer import Optimizer

class Sign(Optimizer):
    def update(self, gradients, state, params, count):
        return {name: g.sign() for name, g in gradients.items()}, state
"""
RULE = """
from alpha_maml.trainer.core.rules.rule import Rule

class Halving(Rule):
    def update(self, rates, signals):
        return rates._replace(beta=rates.beta / 2)
"""
PLAIN = ("--rates.rule", "fixed", "--rates.beta", "0.01")


def trained(folder: Path, text: str, line: str, *arguments: str) -> Path:
    """A run of three iterations from a folder that holds the file mine.py, after the line."""
    (folder / "mine.py").write_text(text)
    words = ["train", "--iterations", "3", "--task.batch", "3", "--evaluation.tasks", "4", "--tracking.uri", "disabled",
             "--checkpoint.every", "1", "--run_dir", "run", *arguments]
    code = f"{line}\nfrom alpha_maml.launch.cli import main\nmain({words!r})"
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder / "run"


def states(run: Path) -> list[dict[str, torch.Tensor]]:
    return [checkpoint.read(path) for path in checkpoint.saved(run / "checkpoints")]


def test_a_data_set(tmp_path: Path):
    line = "from alpha_maml.data import DATASETS; DATASETS.register('lines', 'mine:Lines', 'regression')"
    run = trained(tmp_path, DATA, line, "--data.name", "lines")
    assert json.loads((run / "summary.json").read_text())["iterations"] == 3
    assert all(line["loss/train"] < 1 for line in read_metrics(run)), "slopes are in [0, 1), as inputs are"


def test_a_model(tmp_path: Path):
    line = "from alpha_maml.models import MODELS; MODELS.register('cubic', 'mine:Cubic')"
    run = trained(tmp_path, MODEL, line, "--model.name", "cubic")
    assert "theta.coefficients" in states(run)[-1]


def test_a_loss(tmp_path: Path):
    run = trained(tmp_path, LOSS, "from alpha_maml.data import LOSSES; LOSSES.register('l1', 'mine:absolute_error')",
                  "--task.loss", "l1")
    assert all(line["quarter/train"] == 0.25 for line in read_metrics(run))


def test_an_outer_optimiser(tmp_path: Path):
    line = "from alpha_maml.trainer.optim import OPTIMIZERS; OPTIMIZERS.register('sign', 'mine:Sign')"
    run = trained(tmp_path, OPTIMIZER, line, "--outer.optimizer", "sign", *PLAIN)
    before, after = states(run)[:2]
    moved = torch.cat([(after[name] - before[name]).abs().flatten() for name in after if name.startswith("theta.")])
    assert bool(((moved - 0.01).abs() < 1e-6).logical_or(moved == 0).all()) and float((moved > 0).double().mean()) > 0.5


def test_a_rule(tmp_path: Path):
    run = trained(tmp_path, RULE, "from alpha_maml.trainer.core.rules import RULES; RULES.register('halving', 'mine:Halving')",
                  "--rates.rule", "halving", *PLAIN[2:])
    assert [line["rates/beta"] for line in read_metrics(run)] == [0.005, 0.0025, 0.00125]


@pytest.mark.parametrize(("key", "text", "place"), (
    ("model.name", MODEL, "mine:Cubic"), ("data.name", DATA, "mine:Lines"), ("task.loss", LOSS, "mine:absolute_error"),
    ("outer.optimizer", OPTIMIZER, "mine:Sign"), ("rates.rule", RULE, "mine:Halving")))
def test_an_import_path_needs_no_line(key: str, text: str, place: str, tmp_path: Path):
    assert trained(tmp_path, text, "", f"--{key}", place, "--rates.beta", "0.01").is_dir()
