"""What only a GPU can show: the same tasks and the same meta-gradient as on a CPU, and the iteration as a CUDA graph."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import Small, apart, newest_state, same_bits
from processes import succeed, wrong
from torch import Tensor, nn

from alpha_maml.models.functional import function_of_tasks
from alpha_maml.trainer import config as configuration
from alpha_maml.trainer.captured import Captured
from alpha_maml.trainer.core.inner import InnerLoop
from alpha_maml.trainer.core.meta_gradient import meta_gradient
from alpha_maml.trainer.engines.collective import World
from alpha_maml.trainer.loop import validate
from alpha_maml.trainer.setup import set_up
from alpha_maml.trainer.step import Problem, State, snapshot, train_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
OMNIGLOT = {"data.name": "omniglot", "model.name": "conv4", "model.channels": "8", "task.batch": "3", "task.ways": "5",
            "task.shots": "1", "task.queries": "1", "inner.steps": "2", "precision": "float64"}


def problem_of(omniglot_root: str, device: str = "cuda", **keys: str) -> tuple[Problem, State]:
    given = OMNIGLOT | {"data.root": omniglot_root} | {name.replace("__", "."): value for name, value in keys.items()}
    return set_up(configuration.build(None, given), World(device=torch.device(device)))


@pytest.mark.parametrize("sizes", ({}, {"task__min_ways": "2"}), ids=("one size", "mixed sizes"))
def test_draws_the_tasks_of_a_cpu(sizes: dict, omniglot_root: str):
    here, there = (problem_of(omniglot_root, device, **sizes)[0] for device in ("cpu", "cuda"))
    for number in (0, 3):
        for a, b in zip(here.source.batch("train", number, here.indices), there.source.batch("train", number, there.indices)):
            assert torch.allclose(a, b.cpu(), rtol=1e-15)  # a GPU divides pixels by 255 to within one rounding


@pytest.mark.parametrize("steps", (1, 3))
@pytest.mark.parametrize("name", ("mlp", "conv4", "conv4_pooled", "resnet12"))
@pytest.mark.parametrize("shape", ("scalar", "layer_step"))
def test_the_meta_gradient_is_that_of_a_cpu(name: str, steps: int, shape: str):
    problem, found = Small(name), {}
    rates = problem.alpha if shape == "scalar" else problem.alpha.expand(steps, len(problem.theta))
    for device in ("cpu", "cuda"):
        model = problem.model.to(device)
        found[device] = meta_gradient(
            problem.apply, problem.loss, {n: p.to(device) for n, p in problem.theta.items()}, rates.to(device),
            problem.tasks.map(lambda x, to=device: x.to(to)), InnerLoop(steps, alpha_shape=shape),
            forward_tasks=function_of_tasks(model))
    assert apart({n: g.cpu() for n, g in found["cuda"].gradient.items()}, found["cpu"].gradient, "") < 1e-9
    for a, b in zip(found["cuda"][1:], found["cpu"][1:]):
        assert torch.allclose(a.cpu(), b, rtol=1e-9, equal_nan=True)


def test_an_evaluation_is_that_of_a_cpu(omniglot_root: str):
    here, there = (validate(*problem_of(omniglot_root, device)) for device in ("cpu", "cuda"))
    assert here.keys() == there.keys() and all(there[name] == pytest.approx(value, rel=1e-9) for name, value in here.items())


def beside(problem: Problem, state: State, other: State, count: int) -> Captured:
    """Runs both ways of the iteration and holds their states and values against each other."""
    captured, eager = Captured(problem, state), other
    for _ in range(count):
        state, values = captured(state, False)
        eager, expected = train_step(problem, eager, False)
        assert torch.allclose(values, expected, rtol=1e-7, equal_nan=True)
    here, there = ({name: t.cpu() for name, t in snapshot(s).items()} for s in (state, eager))
    assert here.keys() == there.keys() and apart(here, there, "") < 1e-8
    return captured


@pytest.mark.parametrize(("keys", "forms"), (
    ({}, 1), ({"rates.rule": "paper", "task.reduction": "sum", "rates.alpha_hyperlr": "1e-5"}, 1),
    ({"inner.steps": "3", "inner.multi_step_iterations": "4", "inner.first_order_iterations": "2", "outer.optimizer": "adam",
      "rates.alpha_shape": "layer_step"}, 3),
    ({"inner.steps": "10"}, 1), ({"task.min_ways": "3"}, 3), ({"model.args": "{norm: group}"}, 1)),
    ids=("default", "paper", "annealed", "recomputed", "mixed sizes", "any model"))
def test_a_captured_iteration_is_the_iteration(keys: dict, forms: int, omniglot_root: str):
    given = {name.replace(".", "__"): value for name, value in keys.items()}
    (problem, state), (_, other) = (problem_of(omniglot_root, **given) for _ in range(2))
    assert len(beside(problem, state, other, 8).forms) == forms


def test_the_sums_over_ranks_are_in_the_graph(omniglot_root: str):
    """A group of one rank that takes itself for two: NCCL's collectives are there, and change nothing."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda", 0))
    try:
        (problem, state), (_, other) = (problem_of(omniglot_root) for _ in range(2))
        for each in (state, other):
            each.engine.world = replace(problem.world, size=2)
        captured = beside(replace(problem, world=state.engine.world), state, other, 12)
        assert captured.forms
        del captured
    finally:
        dist.destroy_process_group()


def test_nothing_waits_for_the_device(omniglot_root: str):
    problem, state = problem_of(omniglot_root)
    captured = Captured(problem, state)
    state, _ = captured(state, False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            state, _ = captured(state, False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Waiting(nn.Module):
    """Reads a value back, which no graph can."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int):
        super().__init__()
        self.linear = nn.Linear(1, outputs)

    def forward(self, x: Tensor) -> Tensor:
        torch.ones((), device=x.device).item()
        return self.linear(x)


def test_what_cannot_be_captured_runs_operation_by_operation(tmp_path: Path):
    words = ("train", "--model.name", "test_gpu:Waiting", "--iterations", 30, "--evaluation.tasks", 8, "--tracking.uri",
             "disabled")
    here = {"PYTHONPATH": str(Path(__file__).parent)}
    result = succeed(*words, "--run_dir", tmp_path / "a", **here)
    assert "cannot be captured" in result.stderr
    assert "capture: true" in wrong(*words, "--capture", "true", "--run_dir", tmp_path / "b", **here)


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, omniglot_root: str):
    words = [w for name, value in (OMNIGLOT | {"data.root": omniglot_root, "precision": "float32"}).items()
             for w in (f"--{name}", value)]
    words = ("train", *words, "--evaluation.tasks", 8, "--tracking.uri", "disabled")
    succeed(*words, "--iterations", 40, "--run_dir", tmp_path / "whole")
    for iterations in (25, 40):
        succeed(*words, "--iterations", iterations, "--run_dir", tmp_path / "parts")
    assert same_bits(tmp_path / "whole", tmp_path / "parts")
    succeed(*words, "--iterations", 40, "--capture", "false", "--run_dir", tmp_path / "eager")
    assert apart(newest_state(tmp_path / "eager"), newest_state(tmp_path / "whole"), "theta.") < 1e-3
