"""Models that cannot be adapted: each is refused in one line that says what to change, before training."""
from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.utils.checkpoint
from processes import ROOT, wrong
from torch import Tensor, nn
from torch.nn import functional as F

from alpha_maml.data.losses.contract import as_loss
from alpha_maml.data.losses.cross_entropy import cross_entropy
from alpha_maml.data.losses.mean_squared_error import mean_squared_error
from alpha_maml.errors import InputError
from alpha_maml.models.build import build as build_model
from alpha_maml.models.checks import Trial, check
from alpha_maml.models.prepare import prepare


class Linear(nn.Module):
    """What the models below break."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int):
        super().__init__()
        self.layer = nn.Linear(input_shape[0], outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Unused(Linear):
    def __init__(self, input_shape: tuple[int, ...], outputs: int):
        super().__init__(input_shape, outputs)
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)


class Running(Linear):
    def __init__(self, input_shape: tuple[int, ...], outputs: int):
        super().__init__(input_shape, outputs)
        self.norm = nn.BatchNorm1d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x))


class Counting(Linear):
    def __init__(self, input_shape: tuple[int, ...], outputs: int):
        super().__init__(input_shape, outputs)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return self.layer(x)


class Detached(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).detach()


class Shape(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[:, 0]


class Pair(Linear):
    def forward(self, x: Tensor) -> tuple:
        return self.layer(x), x


class Precision(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).half()


class Fails(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten())


class TrainingFails(Linear):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise KeyError("no such mode")
        return self.layer(x)


class Branch(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else -self.layer(x)


class InPlace(Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros(len(x), self.layer.out_features)
        y[:] = self.layer(x)
        return y


class Once(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * 3 * ctx.saved_tensors[0] ** 2


class OnceDifferentiable(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(self.layer(x))


class WrongTasks(Linear):
    def forward_tasks(self, params: dict[str, Tensor], x: Tensor) -> Tensor:
        return 2 * torch.baddbmm(params["layer.bias"][:, None], x, params["layer.weight"].mT)


class FailingTasks(Linear):
    def forward_tasks(self, params: dict[str, Tensor], x: Tensor) -> Tensor:
        return params["no such parameter"]


class Recomputing(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=False)


class Dropout(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(F.dropout(x, 0.5, self.training))


class AlwaysDropout(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(F.dropout(x, 0.5))


def tried(name: str, model: nn.Module, shape: tuple, outputs: int, *rest, **how) -> Trial:
    """`check` on two random examples."""
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    y, loss = (torch.arange(2), cross_entropy) if outputs > 1 else (torch.rand(2, outputs), mean_squared_error)
    return check(name, model, (x, y), loss, outputs, *rest, **how)


def refused(name: str, **how) -> str:
    model = build_model(f"test_checks:{name}", (2,), 3, 0)
    with pytest.raises(InputError) as caught:
        tried(f"test_checks:{name}", model, (2,), 3, **how)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("name", "words"), (
    ("Detached", "no gradient reaches (layer.weight, layer.bias); use them in forward without detach"),
    ("Running", "changes a buffer in its forward (norm.running_mean), which would leak between tasks"),
    ("Counting", "changes a buffer in its forward (calls)"),
    ("Shape", "returns [2] of torch.float32; its forward must map [2, 2] to [2, 3], in the same dtype"),
    ("Pair", "returns tuple; its forward must map"),
    ("Precision", "returns [2, 3] of torch.float16"),
    ("Fails", "fails on inputs of shape [2, 2] (RuntimeError: mat1 and mat2 shapes cannot be multiplied (1x4 and 2x3), at"),
    ("TrainingFails", "fails in training mode (KeyError: 'no such mode', at test_checks.py"),
    ("OnceDifferentiable", "has no second derivative (RuntimeError: trying to differentiate twice"),
    ("WrongTasks", "has a forward_tasks that differs from its forward; it must return what forward does"),
    ("FailingTasks", "has a forward_tasks that fails (KeyError: 'no such parameter', at test_checks.py"),
    ("AlwaysDropout", "model.randomness: error does not allow the random numbers that test_checks:AlwaysDropout draws"),
))
def test_is_refused(name: str, words: str):
    assert words in refused(name)


@pytest.mark.parametrize(("name", "words"), (
    ("Branch", "(it decides by the values of its inputs or parameters, at test_checks.py"),
    ("InPlace", "(RuntimeError: vmap: inplace arithmetic")))
def test_what_vmap_cannot_take_runs_task_by_task(name: str, words: str):
    alone = tried(name, build_model(f"test_checks:{name}", (2,), 3, 0), (2,), 3).alone
    assert alone is not None and "runs task by task, which is slower" in alone and words in alone


def test_parameters_of_no_part_are_named():
    (note,) = tried("own", build_model("test_checks:Unused", (2,), 3, 0), (2,), 3).notes
    assert "no gradient reaches some parameters of own (a.weight, a.bias, b.weight and 1 more)" in note


def test_recomputation_inside_the_model_is_refused():
    assert "uses torch.utils.checkpoint, whose recomputation takes other parameters" in refused("Recomputing")


def test_running_statistics_become_those_of_the_batch_and_frozen_ones_stay():
    model = build_model("test_checks:Running", (2,), 3, 0)
    (line,) = prepare("own", model)
    assert "1 batch norms of own take the statistics of each batch" in line and model.norm.running_mean is None
    model = build_model("test_checks:Running", (2,), 3, 0)
    model.norm.requires_grad_(False)
    assert prepare("own", model) == [] and model.norm.running_mean is not None
    tried("own", model, (2,), 3)


@pytest.mark.parametrize(("loss", "words"), (
    (lambda outputs, batch: outputs, "it returns a tensor of shape [2, 3], it must return a scalar"),
    (lambda outputs, batch: 3.0, "it returns float"),
    (lambda outputs, batch: (outputs.sum(), {"each": outputs}), "its metrics ['each'] must be scalars"),
    (lambda outputs, batch: outputs.nothing, "the loss fails on the outputs of own for a task's support (AttributeError")))
def test_a_loss_that_is_none_is_one_line(loss: Callable, words: str):
    model = build_model("test_checks:Linear", (2,), 3, 0)
    with pytest.raises(InputError) as caught:
        check("own", model, (torch.rand(2, 2), torch.arange(2)), as_loss(loss))
    assert words in str(caught.value)


def test_randomness_is_asked_for():
    assert "set different (each task draws for itself) or same" in refused("Dropout")
    assert "draws random numbers in evaluation mode too" in refused("AlwaysDropout", randomness="different")
    for randomness in ("different", "same"):
        tried("own", build_model("test_checks:Dropout", (2,), 3, 0), (2,), 3, randomness)


def test_first_order_needs_no_second_derivative():
    tried("own", build_model("test_checks:OnceDifferentiable", (2,), 3, 0), (2,), 3, second_order=False)


@pytest.mark.parametrize(("name", "shape"), (
    ("mlp", (1,)), ("conv4", (1, 28, 28)), ("conv4_pooled", (1, 28, 28)), ("resnet12", (1, 28, 28)),
    ("test_checks:Linear", (2,))))
def test_a_good_model_passes_and_stays_as_it_is(name: str, shape: tuple):
    model, state = build_model(name, shape, 5, 0), torch.random.get_rng_state()
    before = [p.clone() for p in model.parameters()]
    assert tried(name, model, shape, 5).alone is None
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters()))
    assert model.training and torch.equal(state, torch.random.get_rng_state())


def test_the_command_line_says_it_in_one_line(tmp_path):
    line = wrong("train", "--model.name", "own:Dropout", "--tracking.uri", "disabled", "--run_dir", tmp_path / "r",
                 PYTHONPATH=str(ROOT / "tests"))
    assert line.startswith("alpha-maml: model.randomness: error does not allow the random numbers that own:Dropout draws")
