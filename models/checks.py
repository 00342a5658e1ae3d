"""Whether a model can be adapted, tried before training on the first real task: what would end in torch's words within the
first iteration, or in nothing being learned, is said in one line."""
from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap
from torch.utils._pytree import tree_map

from alpha_maml.errors import InputError
from alpha_maml.models.functional import call_inputs, differentiable_attention, function, in_mode, learned, skeleton
from alpha_maml.registry import place, reason

AGREEMENT = 0.01  # largest relative difference of forward_tasks from forward; what a GPU's short floats make is less
Loss = Callable[[Any, Any], tuple[Tensor, dict[str, Tensor]]]


class Trial(NamedTuple):
    """What a trial found out."""

    metrics: tuple[str, ...]  # the names of the loss's own
    alone: str | None  # why each task must be differentiated by itself, in a line; None: vmap takes the model
    notes: list[str]  # further lines for the user


def out_of_memory(error: Exception) -> bool:
    """Whether that is what torch says, of a GPU or of this machine."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


@contextmanager
def _refusing(line: Callable[[Exception], str]) -> Iterator[None]:
    """What goes wrong inside is an InputError with that line; want of memory is not the model's fault."""
    try:
        yield
    except Exception as error:
        if out_of_memory(error) or isinstance(error, InputError):
            raise
        raise InputError(line(error)) from None


def check(name: str, model: nn.Module, batch: Any, loss: Loss, outputs: int | None = None, randomness: str = "error",
          second_order: bool = True, query: Any = None) -> Trial:
    """Tries the model `name` and the loss on one task's support set, `batch`, and whether they take its query.

    Raises InputError where it cannot be adapted: what its forward returns, parameters none of which a gradient reaches, state
    that it keeps, random numbers that `randomness` (vmap's words) does not allow, and what the derivatives refuse. `outputs`:
    how many numbers it must return for an example. The model and torch's generator stay as they are.
    """
    params = {parameter: p.detach() for parameter, p in learned(model).items()}
    like = next(iter(params.values()))
    devices = [like.device] if like.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _no_checkpoints(name), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as of operations that vmap does one by one
        y, metrics, notes = _check_forward(name, model, params, batch, loss, outputs)
        if query is not None:
            _check_query(name, model, params, query, loss)
        if second_order:
            _check_second_derivative(name, model, params, batch, loss)
        _check_state(name, model, params, batch)
        alone = _check_vmap(name, model, params, batch, loss, randomness, second_order)
        if getattr(model, "forward_tasks", None) is not None:
            _check_forward_tasks(name, model, params, batch, y)
    return Trial(metrics, alone, notes)


@contextmanager
def _no_checkpoints(name: str) -> Iterator[None]:
    """Refuses torch.utils.checkpoint inside the model: called with given parameters, it computes anew with the module's own,
    and every derivative is wrong without a word."""
    def refuse(*_: Any, **__: Any) -> Any:
        raise InputError(f"model.name: {name} uses torch.utils.checkpoint, whose recomputation takes other parameters than a "
                         "task's adapted ones; switch it off (gradient_checkpointing_disable() of Hugging Face models), and "
                         "set inner.recompute to true for less memory")

    module = torch.utils.checkpoint
    with (mock.patch.object(module, "_checkpoint_without_reentrant_generator", refuse),
          mock.patch.object(module.CheckpointFunction, "apply", refuse)):
        yield


def _check_forward(name: str, model: nn.Module, params: dict[str, Tensor], batch: Any, loss: Loss,
                   outputs: int | None) -> tuple[Any, tuple[str, ...], list[str]]:
    """The outputs in evaluation mode, the names of the loss's metrics, and notes."""
    x = batch if isinstance(batch, dict) else batch[0]
    shape = list(x.shape) if isinstance(x, Tensor) else tree_map(lambda t: list(t.shape), x)
    wanted = f"its forward must map {shape} to [{len(x)}, {outputs}], in the same dtype" if outputs else "correct its forward"
    params = {parameter: p.detach().requires_grad_() for parameter, p in params.items()}
    with _refusing(lambda e: f"model.name: {name} fails on inputs of shape {shape} ({reason(e)}); {wanted}"):
        y = function(model, training=False)(params, batch)
    like = next(iter(params.values()))
    if outputs and (not isinstance(y, Tensor) or y.shape != (len(x), outputs) or y.dtype != like.dtype):
        got = f"{list(y.shape)} of {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
        raise InputError(f"model.name: {name} returns {got}; {wanted}")
    value, metrics = measured(name, y, batch, loss)
    gradients = [None] * len(params)
    if value.requires_grad:
        with _refusing(lambda e: f"model.name: {name} cannot be differentiated ({reason(e)}); correct its forward"):
            gradients = torch.autograd.grad(value, tuple(params.values()), allow_unused=True)
    unused, notes = [parameter for parameter, g in zip(params, gradients) if g is None], []
    shown = ", ".join(unused[:3]) + (f" and {len(unused) - 3} more" if len(unused) > 3 else "")
    if len(unused) == len(params):
        raise InputError(f"model.name: {name} has parameters that no gradient reaches ({shown}); use them in forward without "
                         "detach or no_grad")
    if unused:
        notes.append(f"model.name: no gradient reaches some parameters of {name} ({shown}); they stay as they are")
    return tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, y), tuple(metrics), notes


def _check_query(name: str, model: nn.Module, params: dict[str, Tensor], query: Any, loss: Loss) -> None:
    with (torch.no_grad(), _refusing(lambda e: f"model.name: {name} takes a task's support but not its query ({reason(e)}); "
                                     "make the two alike in all but their number of examples")):
        y = function(model, training=False)(params, query)
    measured(name, y, query, loss, "query")


def measured(name: str, y: Any, batch: Any, loss: Loss, part: str = "support") -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a model's outputs and its metrics. Raises InputError where they are not scalars, or cannot be had."""
    with _refusing(lambda e: f"task.loss: the loss fails on the outputs of {name} for a task's {part} ({reason(e)}); "
                   "name another task.loss, or correct it"):
        value, metrics = loss(y, batch)
        getattr(loss, "trial", lambda y, batch: None)(y, batch)
    if not isinstance(value, Tensor) or value.dim() > 0 or not value.is_floating_point():
        got = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"task.loss: it returns {got}, it must return a scalar of the task's mean loss; correct it")
    if any(t.dim() > 0 for t in metrics.values()):
        raise InputError(f"task.loss: its metrics {sorted(metrics)} must be scalars; correct it")
    return value, metrics


def _check_second_derivative(name: str, model: nn.Module, params: dict[str, Tensor], batch: Any, loss: Loss) -> None:
    """By plain autograd's backward: torch.func, and grad with respect to given tensors, take an autograd.Function that is
    once_differentiable as constant without a word."""
    params = {parameter: p.detach().requires_grad_() for parameter, p in params.items()}
    with _refusing(lambda e: f"model.name: {name} has no second derivative ({reason(e)}); replace that operation, or set "
                   "inner.order to first"):
        value = loss(function(model, training=False)(params, batch), batch)[0]
        gradients = torch.autograd.grad(value, tuple(params.values()), create_graph=True, materialize_grads=True)
        squares = torch.stack([g.square().sum() for g in gradients]).sum()
        if squares.requires_grad:  # a model that is linear in its parameters may have none
            squares.backward()


def _check_state(name: str, model: nn.Module, params: dict[str, Tensor], batch: Any) -> None:
    trial = in_mode(skeleton(model), True)
    places, names = call_inputs(trial, batch)
    with (_refusing(lambda e: f"model.name: {name} fails in training mode ({reason(e)}); correct its forward"),
          differentiable_attention()):
        functional_call(trial, params, places, names)
    after = dict(trial.named_buffers())
    for buffer, before in model.named_buffers():
        if not torch.equal(before, after[buffer]):
            raise InputError(f"model.name: {name} changes a buffer in its forward ({buffer}), which would leak between tasks; "
                             "keep the buffer constant")


def _check_vmap(name: str, model: nn.Module, params: dict[str, Tensor], batch: Any, loss: Loss, randomness: str,
                second_order: bool) -> str | None:
    """One task inside vmap, with parameters of its own as every inner step but the first has them: why it cannot be."""
    train = function(model, training=True)

    def derivatives(params: dict[str, Tensor], batch: Any) -> dict[str, Tensor]:
        gradient = grad(lambda params: loss(train(params, batch), batch)[0])
        if not second_order:
            return gradient(params)
        first, pullback = vjp(gradient, params)[:2]
        return pullback(first)[0]

    one_task = {parameter: p[None] for parameter, p in params.items()}, tree_map(lambda x: x[None], batch)
    test = function(model, training=False)
    for run, line in (
            (derivatives, f"model.randomness: error does not allow the random numbers that {name} draws in its forward, such "
             "as dropout's; set different (each task draws for itself) or same (all tasks share), or draw none"),
            (lambda params, batch: loss(test(params, batch), batch)[0],
             f"model.name: {name} draws random numbers in evaluation mode too; draw them only where self.training is true")):
        try:
            vmap(run, randomness=randomness if run is derivatives else "error")(*one_task)
        except Exception as error:
            if out_of_memory(error):
                raise
            if "randomness error mode" in str(error):
                raise InputError(line) from None
            return (f"model.name: {name} runs task by task, which is slower: vmap cannot run many of its tasks at once "
                    f"({_cause(error)})")
    return None


def _cause(error: Exception) -> str:
    said = str(error)
    if "data-dependent control flow" in said or ".item()" in said:
        return f"it decides by the values of its inputs or parameters{place(error)}"
    return reason(error)


def _check_forward_tasks(name: str, model: nn.Module, params: dict[str, Tensor], batch: Any, y: Tensor) -> None:
    remedy = "it must return what forward does for each task; correct or remove it"
    with _refusing(lambda e: f"model.name: {name} has a forward_tasks that fails ({reason(e)}); {remedy}"):
        forward_tasks: Any = skeleton(model).eval().forward_tasks
        found = forward_tasks({parameter: p[None] for parameter, p in params.items()}, batch[0][None])
    if found.shape != (1, *y.shape) or not float((found[0] - y).norm()) <= AGREEMENT * float(y.norm()):
        raise InputError(f"model.name: {name} has a forward_tasks that differs from its forward; {remedy}")
