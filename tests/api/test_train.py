"""alpha_maml from Python: a training, one's own loop, what goes wrong, and the ten kinds of task."""
from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import apart, newest_state
from processes import ROOT
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import generator, halves

import alpha_maml
from alpha_maml import InputError
from alpha_maml.trainer.config import from_keys, with_key
from alpha_maml.trainer.core.meta_gradient import meta_gradient
from alpha_maml.trainer.core.rules.adaptive import Adaptive
from alpha_maml.trainer.engines.collective import World
from alpha_maml.trainer.runs import checkpoint
from alpha_maml.trainer.setup import Parts, set_up
from alpha_maml.trainer.step import train_step

SMALL = {"iterations": 4, "task.batch": 4, "evaluation.tasks": 4}


def waves(split: str, number: int) -> tuple:
    x = 4 * torch.rand(10, 1, generator=generator(split, number)) - 2
    return halves((x, torch.sin(2 * x + number)), 5)


def net(outputs: int = 1, inputs: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))


def test_a_module_and_a_function_train_plot_evaluate_and_predict(tmp_path: Path):
    model, seen = net(), []
    before = copy.deepcopy(model.state_dict())
    run = alpha_maml.train(model, waves, config=SMALL, run_dir=tmp_path / "run", callbacks=[lambda i, m: seen.append(i)])
    assert run.folder == tmp_path / "run" and run.status == "FINISHED" and seen == [1, 2, 3, 4]
    assert [row["step"] for row in run.history] == [1, 2, 3, 4] and run.history[-1]["loss/val"] > 0
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items()), "the module itself changed"
    assert all(path.is_file() for path in run.plot())
    x, y = waves("test", 0)[0]
    assert run.learner.fit(x.numpy(), y.numpy()).predict([[0.0], [1.0]]).shape == (2, 1)
    found = run.evaluate(tasks=6)
    assert found["tasks"] == 6 and found["accuracy"] is None and len(found["curve"]["loss"]) == 2
    again = alpha_maml.train(model, waves, config=SMALL, run_dir=tmp_path / "run")
    assert [row["timestamp"] for row in again.history] == [row["timestamp"] for row in run.history], "the same call trains anew"


def test_a_callback_ends_the_training_and_the_same_call_goes_on(tmp_path: Path):
    settings = SMALL | {"iterations": 6}
    run = alpha_maml.train(net(), waves, config=settings, run_dir=tmp_path / "run", callbacks=[lambda i, m: i == 3])
    assert run.status == "KILLED" and 3 <= len(run.history) < 6
    run = alpha_maml.train(net(), waves, config=settings, run_dir=tmp_path / "run")
    whole = alpha_maml.train(net(), waves, config=settings, run_dir=tmp_path / "whole")
    a, b = (checkpoint.read(checkpoint.saved(r.folder / "checkpoints")[-1]) for r in (run, whole))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_under_torchrun_it_is_the_same_call(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text("import sys, torch, alpha_maml\nfrom test_train import SMALL, net, waves\n"
                      "run = alpha_maml.train(net(), waves, config=SMALL, run_dir=sys.argv[1])\n"
                      "assert len(run.history) == 4\n")
    here = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT / "tests", ROOT / "tests/api"))), "OMP_NUM_THREADS": "1"}
    for name, command in (("one", [sys.executable]), ("two", [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                              "--nproc-per-node", "2"])):
        result = subprocess.run([*command, script, tmp_path / name], env=os.environ | here, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    one, two = (checkpoint.read(checkpoint.saved(tmp_path / name / "checkpoints")[-1]) for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-6) for name in one)


@pytest.mark.parametrize("rule", ("fixed", "adaptive"))
def test_a_loop_of_ones_own_with_adamw_is_the_trainer_with_adamw(rule: str):
    keys = {"rates.rule": rule, "rates.alpha": 0.05, "rates.beta": 0.01, "rates.alpha_shape": "layer_step", "task.batch": 3,
            "inner.steps": 2}
    outer = {"outer.optimizer": "adamw", "outer.weight_decay": 0.1, "outer.trust": 0, "outer.average": False}
    config = from_keys(keys | outer | {"precision": "float64", "model.name": "python:net", "data.name": "python:waves"}, "", {})
    problem, state = set_up(config, World(), parts=Parts(net(), waves))
    model = net().double()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    wrapped = alpha_maml.wrap(model, optimizer=optimizer, config=keys)
    for t in range(8):
        state, _ = train_step(problem, state, False)
        optimizer.zero_grad()
        wrapped.backward([waves("train", 3 * t + b) for b in range(3)])
        optimizer.step()
    for name, p in model.named_parameters():
        assert torch.allclose(p.detach(), state.engine.theta()[name], rtol=1e-6, atol=1e-8), name
    assert wrapped.beta == pytest.approx(float(state.rates.beta), rel=1e-6)
    assert torch.allclose(wrapped.alpha, state.rates.alpha, rtol=1e-6) and (rule == "fixed") == (wrapped.beta == 0.01)


def test_a_wrapped_module_adapts():
    wrapped = alpha_maml.wrap(net(), config={"rates.alpha": 0.1, "inner.steps": 5})
    support, query = waves("test", 3)
    answers, start = wrapped.adapt(support)(support), wrapped.model(support[0]).detach()
    assert float(F.mse_loss(answers, support[1])) < float(F.mse_loss(start, support[1]))
    assert wrapped.adapt(support, steps=0)(query).shape == query[1].shape


def test_the_meta_gradient_by_itself_is_that_of_the_unrolled_loop():
    model = net().double()
    tasks = [tuple(tuple(t.double() for t in part) for part in waves("train", b)) for b in range(3)]
    found = alpha_maml.meta_gradient(model, tasks, 0.1, steps=2)
    start, alpha = dict(model.named_parameters()), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    total = torch.zeros((), dtype=torch.float64)
    for support, query in tasks:
        phi = start
        for _ in range(2):
            loss = F.mse_loss(torch.func.functional_call(model, phi, (support[0],)), support[1])
            phi = {n: p - alpha * g for (n, p), g in zip(phi.items(), torch.autograd.grad(loss, list(phi.values()),
                                                                                         create_graph=True))}
        total = total + F.mse_loss(torch.func.functional_call(model, phi, (query[0],)), query[1])
    *expected, on_alpha = torch.autograd.grad(total, [*start.values(), alpha])
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(found.gradient.values(), expected))
    assert float(found.alpha_gradient) == pytest.approx(float(on_alpha), rel=1e-10)


def test_rules_have_init_and_update():
    theta, one = {"w": torch.zeros(2)}, torch.ones((), dtype=torch.float64)
    signals = alpha_maml.rules.Signals(2 * one, 3 * one, -0.5 * one, one, 0 * one, one, 0.5 * one, one)
    for rule in (alpha_maml.rules.adaptive, alpha_maml.rules.paper, alpha_maml.rules.fixed):
        state, rates = rule.update(rule.init(theta, alpha=0.01, beta=0.001), signals)
        assert state.alpha.dtype is rates.beta.dtype is torch.float64
    assert alpha_maml.rules.adaptive(kappa=0.1).rule == Adaptive(kappa=0.1)
    paper = alpha_maml.rules.paper(beta_hyperlr=0.1)
    assert float(paper.update(paper.init(theta), signals)[1].beta) == pytest.approx(0.051)
    with pytest.raises(InputError, match="settings are those of Fixed"):
        alpha_maml.rules.fixed(kappa=1.0)


@pytest.mark.parametrize(("tasks", "words"), (
    ([], "tasks: the batch is empty"), ([3], "tasks: number 0 is int, it must be (support, query)"),
))
@pytest.mark.parametrize("first", (True, False))
def test_a_wrapped_module_refuses_what_is_no_batch_of_tasks(tasks: list, words: str, first: bool):
    wrapped = alpha_maml.wrap(net())
    if not first:
        wrapped.backward(waves("train", number) for number in range(2))
    with pytest.raises(InputError) as caught:
        wrapped.backward(tasks)
    assert words in str(caught.value)


def test_a_task_of_nan_is_skipped_and_not_called_random(tmp_path: Path):
    def tasks(split: str, number: int) -> tuple:
        return halves((torch.ones(4, 1), torch.full((4, 1), torch.nan)), 2)

    assert torch.isnan(alpha_maml.meta_gradient(net(), [tasks("train", 0)]).loss)
    run = alpha_maml.train(net(), tasks, config=SMALL, run_dir=tmp_path / "run")
    assert [row["guards/skipped"] for row in run.history] == [1] * 4


@pytest.mark.parametrize("shape", ((), (1,), (1, 2, 3)))
def test_mean_squared_error_of_targets_of_any_shape(shape: tuple[int, ...]):
    """Of targets [n] too, which would otherwise be held, broadcast, against every output."""
    x, y = torch.randn(5, 1, dtype=torch.float64), torch.randn(5, *shape, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(1, max(1, y[0].numel())), nn.Unflatten(1, shape or (1,))).double()
    wanted = F.mse_loss(model(x), y.reshape(5, *(shape or (1,))))
    wanted.backward()
    found = alpha_maml.meta_gradient(model, 2 * [((x, y), (x, y))], alpha=0.0)
    assert float(found.loss) == pytest.approx(2 * float(wanted.detach()), rel=1e-12)
    for name, p in model.named_parameters():
        assert torch.allclose(found.gradient[name], 2 * p.grad, rtol=1e-10), name


def random_tasks(split: str, number: int) -> tuple:
    return halves((torch.rand(4, 1), torch.rand(4, 1)), 2)


@pytest.mark.parametrize(("arguments", "words"), (
    ({"model": 3}, "model: int is neither a torch.nn.Module nor a name"),
    ({"tasks": 3}, "tasks: int is neither a function (split, number) -> (support, query)"),
    ({"tasks": lambda split, number: 3}, "is int, it must be (support, query)"),
    ({"tasks": lambda split, number: (("a", "b"), ("c", "d"))}, "where numbers belong"),
    ({"tasks": lambda split, number: 1 / 0}, "fails (ZeroDivisionError: division by zero, at test_train.py"),
    ({"tasks": lambda split, number: halves((torch.ones(6, 1), torch.ones(6, 2)), 3)}, "for a task's support (ValueError: the "
     "outputs are for targets of shape [3, 1], the targets have [3, 2])"),
    ({"tasks": lambda split, number: halves((torch.ones(6, 1), torch.arange(6)), 3), "model": nn.Linear(1, 4)},
     "for a task's query (ValueError: label 5 is none of the 4 classes that the model has outputs for, which count from 0)"),
    ({"tasks": lambda split, number: ((torch.ones(3, 1), torch.ones(3, 1)), (torch.ones(3, 2), torch.ones(3, 1)))},
     "takes a task's support but not its query (RuntimeError"),
    ({"tasks": random_tasks}, "returns another task each time"),
    ({"loss": "nothing"}, "task.loss: 'nothing' must be cross_entropy, mean_squared_error"),
    ({"config": {"iteration": 3}}, "iteration: no such key (in config); did you mean iterations?"),
    ({"config": 7}, "config: int is neither a YAML file nor a dict"), ({"callbacks": [7]}, "callbacks: 7 cannot be called"),
    ({"config": "none.yaml"}, "none.yaml is not a file"),
    ({"model": nn.Linear(3, 1)}, "fails on inputs of shape [5, 1]"),
    ({"model": nn.Linear(1, 1).requires_grad_(False)}, "has no parameter that requires a gradient"),
))
def test_what_is_wrong_is_an_exception_in_one_line(arguments: dict, words: str, tmp_path: Path):
    given = {"model": net(), "tasks": waves, "config": SMALL, "run_dir": tmp_path / "run"} | arguments
    with pytest.raises(InputError) as caught:
        alpha_maml.train(given.pop("model"), given.pop("tasks"), **given)
    assert words in str(caught.value) and "\n" not in str(caught.value)


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = net(8), nn.Linear(8, 1)
        self.backbone.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def test_frozen_parameters_are_in_no_checkpoint_and_stay(tmp_path: Path):
    model = Frozen()
    run = alpha_maml.train(model, waves, config=SMALL, run_dir=tmp_path / "run")
    held = checkpoint.read(checkpoint.saved(run.folder / "checkpoints")[-1])
    assert {name.removeprefix("theta.") for name in held if name.startswith("theta.")} == {"head.weight", "head.bias"}
    assert set(run.learner.theta) == {"head.weight", "head.bias"}
    named = alpha_maml.train(net(), waves, config=SMALL | {"model.learns": "2.*"}, run_dir=tmp_path / "named")
    assert set(named.learner.theta) == {"2.weight", "2.bias"}
    with pytest.raises(InputError, match="model.learns: 'head' matches none"):
        alpha_maml.train(net(), waves, config=SMALL | {"model.learns": "head"}, run_dir=tmp_path / "none")


class Pair(nn.Module):
    """Scores, of two inputs."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 4), nn.Linear(3, 4)

    def forward(self, user: Tensor, item: Tensor) -> dict[str, Tensor]:
        return {"logits": (torch.tanh(self.a(user)) * torch.tanh(self.b(item))).sum(-1)}


class Words(nn.Module):
    def __init__(self, outputs: int = 5):
        super().__init__()
        self.embed, self.head = nn.Embedding(12, 6), nn.Linear(6, outputs)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids)))


def rand(split: str, number: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator(split, number))


def ragged(split: str, number: int) -> tuple:
    shots = 3 + number % 2
    x = rand(split, number, 8, 2)
    return (x[:shots], x[:shots, :1] + number), (x[4:], x[4:, :1] + number)


def imbalanced(split: str, number: int) -> tuple:
    y = torch.tensor([0, 0, 0, 0, 1, 0, 1, 1])
    return halves((rand(split, number, 8, 2) + y[:, None], y), 5)


def simulated(split: str, number: int) -> tuple:
    """A pendulum of its own length, by numpy."""
    t = np.linspace(0, 1, 9)[:, None]
    y = np.cos(t * (1 + number % 7))
    return (t[:5], y[:5]), (t[4:], y[4:])


def residual(outputs: Tensor, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """u' = -k u at collocation points, by differences between neighbours, and u(0) = 1."""
    slope = (outputs[1:] - outputs[:-1]) / (batch["x"][1:] - batch["x"][:-1])
    wrong = slope + batch["k"][1:] * outputs[1:]
    return wrong.square().mean() + (outputs[0] - 1).square().sum(), {"residual": wrong.abs().mean()}


class Solution(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def equations(split: str, number: int) -> tuple:
    x = torch.linspace(0, 1, 6)[:, None]
    part = {"x": x, "k": torch.full_like(x, 1 + number % 3)}
    return part, part


def labels(split: str, number: int, *shape: int) -> Tensor:
    return torch.randint(5, shape, generator=generator(split, number))


def padded(split: str, number: int) -> tuple:
    ids = labels(split, number, 4, 6)
    return halves((ids, ids.where(torch.arange(6) < 5, torch.tensor(-100))), 2)


KINDS: dict[str, tuple[Callable, Callable, Any, tuple[str, ...]]] = {
    "multi-output regression": (lambda: net(3, 2), lambda s, i: halves((rand(s, i, 8, 2), rand(s, i, 8, 3)), 4), None, ()),
    "multi-label": (lambda: net(3, 2), lambda s, i: halves((rand(s, i, 8, 2), (rand(s, i, 8, 3) > 0.5).float()), 4),
                    "binary_cross_entropy", ("accuracy",)),
    "next token with padding": (lambda: Words(12), padded, "next_token", ("accuracy",)),
    "token classification": (Words, lambda s, i: halves((labels(s, i, 4, 6), labels(s, i + 1, 4, 6)), 2), "dense_cross_entropy",
                             ("accuracy",)),
    "segmentation": (lambda: nn.Conv2d(1, 5, 3, padding=1), lambda s, i: halves(
        (rand(s, i, 4, 1, 5, 5), labels(s, i, 4, 5, 5)), 2), "dense_cross_entropy", ("accuracy",)),
    "ranking": (Pair, lambda s, i: halves({"user": rand(s, i, 8, 2), "item": rand(s, i + 1, 8, 3), "labels": rand(s, i, 8)}, 4),
                "pairwise_ranking", ("order",)),
    "physics residual": (Solution, equations, residual, ("residual",)),
    "imbalanced shots": (lambda: net(2, 2), imbalanced, None, ("accuracy",)),
    "variable length": (lambda: net(1, 2), ragged, None, ()),
    "a simulator": (net, simulated, None, ()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_task(kind: str, tmp_path: Path):
    """It trains, is evaluated, and its metrics have their own names; its meta-gradient is that of a plain loop in float64."""
    model, tasks, loss, metrics = KINDS[kind]
    run = alpha_maml.train(model(), tasks, loss=loss, config=SMALL, run_dir=tmp_path / "run")
    assert {f"{name}/{part}" for name in metrics for part in ("train", "val")} <= set(run.history[-1])
    assert set(metrics) <= set(run.evaluate(tasks=5))
    built = run.config
    problem, state = set_up(with_key(built, "precision", "float64"), World(), parts=run.parts)
    batch = problem.source.batch("train", 0, torch.arange(3))
    parts, theta = batch if isinstance(batch, list) else [batch], state.engine.theta()
    alpha = torch.tensor(0.05, dtype=torch.float64)
    found = meta_gradient(problem.train_apply, problem.loss, theta, alpha, batch, problem.loop._replace(alpha_shape="scalar"),
                          problem.chunk, problem.forward_tasks)
    start, total = {n: p.clone().requires_grad_() for n, p in theta.items()}, torch.zeros((), dtype=torch.float64)
    for part in parts:
        for b in range(len(part.tensors()[0])):
            task = part.map(lambda t: t[b])  # noqa: B023  called at once
            inner = problem.loss(problem.train_apply(start, task.support), task.support)[0]
            gradients = torch.autograd.grad(inner, list(start.values()), create_graph=True)
            phi = {n: p - alpha * g for (n, p), g in zip(start.items(), gradients)}
            total = total + problem.loss(problem.train_apply(phi, task.query), task.query)[0]
    for a, b in zip(found.gradient.values(), torch.autograd.grad(total, list(start.values()))):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_every_kind_of_task_at_world_sizes_1_2_and_3(tmp_path: Path):
    """One launcher trains all kinds in turn; theta agrees to 1e-12 in float64."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch, alpha_maml\nfrom test_train import KINDS, SMALL\n"
        "config = SMALL | {'precision': 'float64', 'rates.rule': 'fixed', 'rates.alpha': 0.05, 'rates.beta': 0.05}\n"
        "for kind, (model, tasks, loss, _) in KINDS.items():\n"
        "    torch.manual_seed(0)\n"
        "    run = alpha_maml.train(model(), tasks, loss=loss, config=config, run_dir=f'{sys.argv[1]}/{kind}')\n"
        "    assert len(run.history) == 4\n")
    here = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT / "tests", ROOT / "tests/api"))), "OMP_NUM_THREADS": "1"}
    for ranks in (1, 2, 3):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), script,
                   tmp_path / str(ranks)]
        result = subprocess.run(command, env=os.environ | here, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        for kind in KINDS:
            assert json.loads((tmp_path / str(ranks) / kind / "summary.json").read_text())["world_size"] == ranks
            assert apart(newest_state(tmp_path / str(ranks) / kind), newest_state(tmp_path / "1" / kind), "theta.") < 1e-12


def test_an_inner_loss_may_be_another(tmp_path: Path):
    settings = SMALL | {"task.inner_loss": "test_train:robust"}
    inner, plain = (alpha_maml.train(net(), waves, config=keys, run_dir=tmp_path / str(i))
                    for i, keys in enumerate((settings, SMALL)))
    assert inner.history[0]["loss/support"] != plain.history[0]["loss/support"]


def robust(outputs: Tensor, batch: Any) -> Tensor:
    return F.huber_loss(outputs, batch[1])
