"""Whether a model can be adapted, tried once before training on two random inputs: what would end in torch's words within the
first iteration, or in nothing being learned, is said in one line."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap

from alpha_maml.errors import InputError
from alpha_maml.models.functional import differentiable_attention, function, skeleton
from alpha_maml.registry import place, reason

AGREEMENT = 0.01  # largest relative difference of forward_tasks from forward; what a GPU's short floats make is less


def out_of_memory(error: Exception) -> bool:
    """Whether that is what torch says, of a GPU or of this machine."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


@contextmanager
def _refusing(line: Callable[[Exception], str]) -> Iterator[None]:
    """What goes wrong inside is an InputError with that line; want of memory is not the model's fault."""
    try:
        yield
    except Exception as error:
        if out_of_memory(error):
            raise
        raise InputError(line(error)) from None


def check(name: str, model: nn.Module, input_shape: tuple[int, ...], outputs: int, randomness: str = "error",
          second_order: bool = True) -> None:
    """Raises InputError where the model `name` cannot be adapted on inputs [n, *input_shape]: what its forward returns,
    parameters that it does not use, state that it keeps, random numbers that `randomness` (vmap's words) does not allow, and
    what vmap or the derivatives refuse. The model and torch's generator stay as they are."""
    params = {parameter: p.detach() for parameter, p in model.named_parameters()}
    like = next(iter(params.values()))
    x = torch.rand(2, *input_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(like)
    with torch.random.fork_rng(devices=[like.device] if like.device.type == "cuda" else []):
        y = _check_forward(name, model, params, x, outputs)
        if second_order:
            _check_second_derivative(name, model, params, x)
        _check_state(name, model, params, x)
        _check_vmap(name, model, params, x, randomness, second_order)
        if getattr(model, "forward_tasks", None) is not None:
            _check_forward_tasks(name, model, params, x, y)


def _check_forward(name: str, model: nn.Module, params: dict[str, Tensor], x: Tensor, outputs: int) -> Tensor:
    """The outputs for x, in evaluation mode."""
    wanted = f"its forward must map {list(x.shape)} to [{len(x)}, {outputs}], in the same dtype"
    params = {parameter: p.detach().requires_grad_() for parameter, p in params.items()}
    with _refusing(lambda e: f"model.name: {name} fails on inputs of shape {list(x.shape)} ({reason(e)}); {wanted}"):
        y = function(model, training=False)(params, x)
    if not isinstance(y, Tensor) or y.shape != (len(x), outputs) or y.dtype != x.dtype:
        got = f"{list(y.shape)} of {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
        raise InputError(f"model.name: {name} returns {got}; {wanted}")
    gradients = [None] * len(params)
    if y.requires_grad:
        with _refusing(lambda e: f"model.name: {name} cannot be differentiated ({reason(e)}); correct its forward"):
            gradients = torch.autograd.grad(_square(y), tuple(params.values()), allow_unused=True)
    unused = [parameter for parameter, g in zip(params, gradients) if g is None]
    if unused:
        shown = ", ".join(unused[:3]) + (f" and {len(unused) - 3} more" if len(unused) > 3 else "")
        raise InputError(f"model.name: {name} has parameters that no gradient reaches ({shown}); use them in forward without "
                         "detach or no_grad, or remove them")
    return y.detach()


def _check_second_derivative(name: str, model: nn.Module, params: dict[str, Tensor], x: Tensor) -> None:
    """By plain autograd's backward: torch.func, and grad with respect to given tensors, take an autograd.Function that is
    once_differentiable as constant without a word."""
    params = {parameter: p.detach().requires_grad_() for parameter, p in params.items()}
    with _refusing(lambda e: f"model.name: {name} has no second derivative ({reason(e)}); replace that operation, or set "
                   "inner.order to first"):
        y = function(model, training=False)(params, x)
        gradients = torch.autograd.grad(_square(y), tuple(params.values()), create_graph=True)
        torch.stack([g.square().sum() for g in gradients]).sum().backward()


def _square(y: Tensor) -> Tensor:
    """A loss with a second derivative."""
    return y.square().mean()


def _check_state(name: str, model: nn.Module, params: dict[str, Tensor], x: Tensor) -> None:
    trial = skeleton(model).train()
    with (_refusing(lambda e: f"model.name: {name} fails in training mode ({reason(e)}); correct its forward"),
          differentiable_attention()):
        functional_call(trial, params, (x,))
    after = dict(trial.named_buffers())
    for buffer, before in model.named_buffers():
        if not torch.equal(before, after[buffer]):
            raise InputError(f"model.name: {name} changes a buffer in its forward ({buffer}), which would leak between tasks; "
                             "use batch statistics (track_running_stats=False), or keep the buffer constant")


def _check_vmap(name: str, model: nn.Module, params: dict[str, Tensor], x: Tensor, randomness: str, second_order: bool) -> None:
    """One task inside vmap, with parameters of its own as every inner step but the first has them."""
    train = function(model, training=True)

    def derivatives(params: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        gradient = grad(lambda params: _square(train(params, x)))
        if not second_order:
            return gradient(params)
        first, pullback = vjp(gradient, params)[:2]
        return pullback(first)[0]

    def line(error: Exception, of_randomness: str) -> str:
        said = str(error)
        if "randomness error mode" in said:
            return of_randomness
        if "data-dependent control flow" in said or ".item()" in said:
            return (f"model.name: {name} decides by the values of its inputs or parameters{place(error)}, which vmap cannot "
                    "do for many tasks at once; use torch.where")
        return (f"model.name: {name} cannot be differentiated inside vmap ({reason(error)}); replace that operation by one "
                "that works without change in place")

    one_task = {parameter: p[None] for parameter, p in params.items()}, x[None]
    with _refusing(lambda e: line(
            e, f"model.randomness: error does not allow the random numbers that {name} draws in its forward, such as "
            "dropout's; set different (each task draws for itself) or same (all tasks share), or draw none")):
        vmap(derivatives, randomness=randomness)(*one_task)
    with _refusing(lambda e: line(e, f"model.name: {name} draws random numbers in evaluation mode too; draw them only where "
                                  "self.training is true")):
        vmap(function(model, training=False))(*one_task)


def _check_forward_tasks(name: str, model: nn.Module, params: dict[str, Tensor], x: Tensor, y: Tensor) -> None:
    remedy = "it must return what forward does for each task; correct or remove it"
    with _refusing(lambda e: f"model.name: {name} has a forward_tasks that fails ({reason(e)}); {remedy}"):
        forward_tasks: Any = skeleton(model).eval().forward_tasks
        found = forward_tasks({parameter: p[None] for parameter, p in params.items()}, x[None])
    if found.shape != (1, *y.shape) or not float((found[0] - y).norm()) <= AGREEMENT * float(y.norm()):
        raise InputError(f"model.name: {name} has a forward_tasks that differs from its forward; {remedy}")
