"""Dropout under model.randomness: draws are a function of seed, iteration and task, and the derivatives are exact for them."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Small, newest_state
from exactness import dot, relative
from processes import ROOT, succeed, wrong
from test_vectorised import agree, both_ways

from alpha_maml import load
from alpha_maml.data.tasks import TaskBatch
from alpha_maml.trainer.config import build
from alpha_maml.trainer.core.inner import InnerLoop
from alpha_maml.trainer.core.meta_gradient import meta_gradient
from alpha_maml.trainer.core.sweep import MetaGradient
from alpha_maml.trainer.objective import inner_loop
from alpha_maml.trainer.runs.metrics import read_metrics

OWN = {"PYTHONPATH": str(ROOT / "tests")}
COMMON = ("--model.name", "own:Dropout", "--task.batch", 7, "--inner.steps", 2, "--iterations", 12, "--evaluation.tasks", 20,
          "--tracking.uri", "disabled", "--precision", "float64")


def gradient(problem: Small, randomness: str, seed: int, tasks: TaskBatch | None = None, theta: dict | None = None,
             **how) -> MetaGradient:
    return meta_gradient(problem.apply, problem.loss, theta or problem.theta, problem.alpha, tasks or problem.tasks,
                         InnerLoop(2, recompute=False, randomness=randomness, seed=seed), **how)


@pytest.mark.parametrize("randomness", ("different", "same"))
def test_gradients_are_exact_for_what_is_drawn(randomness: str):
    problem, h = Small("own:Dropout"), 1e-6
    total = gradient(problem, randomness, 5)
    v = total.gradient
    ahead, behind = (gradient(problem, randomness, 5, theta={n: p + s * v[n] for n, p in problem.theta.items()}).loss
                     for s in (h, -h))
    assert float(ahead - behind) / (2 * h) == pytest.approx(float(dot(v, v)), rel=1e-6)


def test_the_seed_decides_and_tasks_draw_for_themselves_or_share():
    problem = Small("own:Dropout", tasks=1)
    one, four = problem.tasks, problem.tasks.map(lambda x: x.expand(4, *x.shape[1:]))
    for randomness in ("different", "same"):
        first = gradient(problem, randomness, 5).gradient
        torch.rand(3)
        assert relative(gradient(problem, randomness, 5).gradient, first) == 0
        assert relative(gradient(problem, randomness, 6).gradient, first) > 1e-3
    times = {name: 4 * g for name, g in gradient(problem, "same", 5, one).gradient.items()}
    for chunk in (0, 1, 3):
        assert relative(gradient(problem, "same", 5, four, chunk=chunk).gradient, times) < 1e-12
        assert relative(gradient(problem, "different", 5, four, chunk=chunk).gradient, times) > 1e-3
    each = [gradient(problem, "different", 5 + b, one).gradient for b in range(4)]
    each = {name: sum(e[name] for e in each) for name in times}
    assert relative(gradient(problem, "different", 5, four, chunk=1).gradient, each) < 1e-12


def train(folder: Path, ranks: int, *arguments: object) -> dict[str, torch.Tensor]:
    succeed("train", *COMMON, "--run_dir", folder, *arguments, ranks=ranks, **OWN)
    return newest_state(folder)


def test_a_resumed_run_draws_the_same_and_evaluation_draws_nothing(tmp_path: Path):
    arguments = ("--model.randomness", "different")
    whole = train(tmp_path / "a", 2, *arguments)
    train(tmp_path / "b", 2, *arguments, "--iterations", 5)
    resumed = train(tmp_path / "b", 2, *arguments)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(not torch.equal(t, whole[name]) for name, t in train(tmp_path / "c", 2, "--model.randomness", "same").items())
    first, second = (succeed("evaluate", "--run_dir", tmp_path / "a", **OWN).stdout for _ in range(2))
    assert first == second
    x = np.linspace(-5, 5, 10)[:, None]
    learner = load(tmp_path / "a").fit(x, np.sin(x))
    once = learner.predict(x)
    assert np.array_equal(once, learner.predict(x)) and np.array_equal(once, learner.fit(x, np.sin(x)).predict(x))


@pytest.mark.parametrize("arguments", (("same",), ("different", "--task.chunk", 1)))
def test_world_sizes_agree(arguments: tuple, tmp_path: Path):
    states = [train(tmp_path / str(ranks), ranks, "--model.randomness", *arguments) for ranks in (0, 2, 3)]
    for state in states[1:]:
        for name, t in states[0].items():
            assert torch.allclose(state[name], t, rtol=1e-10, atol=1e-14), name
    assert read_metrics(tmp_path / "2")[-1]["loss/train"] < read_metrics(tmp_path / "2")[0]["loss/train"]


@pytest.mark.parametrize("randomness", ("different", "same"))
def test_a_run_among_many_draws_as_alone(randomness: str, tmp_path: Path):
    base = {"model.name": "own:Dropout", "model.randomness": randomness, "iterations": "10"}
    for alone, together in both_ways(tmp_path, base, ["rates.alpha=1e-3,1e-1"]):
        agree(alone, together, 1e-5)


def test_computing_anew_would_draw_anew(tmp_path: Path):
    line = wrong("train", *COMMON, "--model.randomness", "same", "--inner.recompute", "true", "--run_dir", tmp_path, **OWN)
    assert "inner.recompute: true would draw" in line
    for steps in (8, 9):
        for randomness, expected in (("error", None), ("same", False)):
            config = build(None, {"inner.steps": str(steps), "model.randomness": randomness})
            assert inner_loop(config, ["weight"]).recompute is expected
