"""Every architecture of tests/zoo.py: its meta-gradient and hypergradient against a plain unrolled loop in float64, and a
training with two processes."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from processes import ROOT, succeed
from torch.func import functional_call
from zoo import ZOO, Entry

from alpha_maml.models.functional import call_inputs, differentiable_attention, in_mode
from alpha_maml.models.functional import learned as learned_of
from alpha_maml.models.prepare import prepare
from alpha_maml.trainer.config import from_keys
from alpha_maml.trainer.core.algebra import Params
from alpha_maml.trainer.core.meta_gradient import meta_gradient
from alpha_maml.trainer.engines.collective import World
from alpha_maml.trainer.setup import build_model, set_up

ALPHA = 1e-3
pytestmark = pytest.mark.filterwarnings("ignore")  # of the other libraries' own


def keys(entry: Entry) -> dict:
    settings = {"model.name": entry.model, "model.args": entry.args, "data.name": entry.tasks, "task.batch": 2,
                "evaluation.tasks": 2, "iterations": 2, "tracking.uri": "disabled", "compile": False}
    return settings | ({"task.loss": entry.loss} if entry.loss else {})


@pytest.mark.parametrize("name", ZOO)
def test_is_exact(name: str):
    """Two tasks, one inner step."""
    config = from_keys(keys(ZOO[name]) | {"precision": "float64", "rates.rule": "fixed"}, "", {})
    problem, state = set_up(config, World())
    tasks, theta = problem.source.batch("train", 0, torch.arange(2)), state.engine.theta()
    assert not isinstance(tasks, list)
    alpha = torch.tensor(ALPHA, dtype=torch.float64)
    found = meta_gradient(problem.train_apply, problem.loss, theta, alpha, tasks, problem.loop, problem.chunk,
                          problem.forward_tasks)
    source, entry = problem.source, ZOO[name]
    model = build_model(entry.model, source.input_shape, source.outputs, config.seed, None, entry.args).double()
    prepare(name, model)
    in_mode(model, True)
    assert set(learned_of(model)) == set(theta)

    def loss(params: Params, batch: object) -> torch.Tensor:
        places, given = call_inputs(model, batch)
        with differentiable_attention():
            return problem.loss(functional_call(model, params, places, given), batch)[0]

    start = {n: p.detach().clone().requires_grad_() for n, p in theta.items()}
    rate, total = alpha.clone().requires_grad_(), torch.zeros((), dtype=torch.float64)
    for b in range(2):
        task = tasks.map(lambda t: t[b])  # noqa: B023  called at once
        gradients = torch.autograd.grad(loss(start, task.support), list(start.values()), create_graph=True, allow_unused=True)
        phi = {n: p if g is None else p - rate * g for (n, p), g in zip(start.items(), gradients)}
        total = total + loss(phi, task.query)
    *expected, on_alpha = torch.autograd.grad(total, [*start.values(), rate], materialize_grads=True)
    scale = torch.stack([g.norm() for g in expected]).norm()
    apart = torch.stack([(g - e).norm() for g, e in zip(found.gradient.values(), expected)]).norm()
    assert float(apart / scale) < 1e-10
    assert float(found.alpha_gradient) == pytest.approx(float(on_alpha), rel=1e-10)
    assert (problem.chunk == 1 and problem.evaluated == 1) == entry.alone


@pytest.mark.parametrize("name", ZOO)
def test_trains_with_two_processes(name: str, tmp_path: Path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(
        {"model": {"name": ZOO[name].model, "args": ZOO[name].args}, "data": {"name": ZOO[name].tasks},
         "task": {"batch": 2, "loss": ZOO[name].loss}, "compile": False}))
    succeed("train", "--config", tmp_path / "c.yaml", "--iterations", 2, "--evaluation.tasks", 2, "--tracking.uri", "disabled",
            "--run_dir", tmp_path / "run", ranks=2, PYTHONPATH=str(ROOT / "tests"))
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["iterations"] == 2 and summary["world_size"] == 2 and summary["val_loss"] > 0
