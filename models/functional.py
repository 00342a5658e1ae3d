"""A module as a function of its parameters, in forms that have second derivatives inside vmap."""
from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from alpha_maml.models.prepare import frozen


def learned(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that training learns, by name: those that require a gradient. The others are frozen, shared by all tasks,
    and in no buffer and no checkpoint."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of the model without the values of learned parameters (they are on the device meta, tied ones stay tied), with the
    very tensors of frozen ones; buffers are copied."""
    hollow = {id(p): nn.Parameter(p.detach().to("meta")) if p.requires_grad else p for p in model.parameters()}
    return copy.deepcopy(model, hollow)


def function(model: nn.Module, training: bool) -> Callable[[dict[str, Tensor], Any], Any]:
    """(learned parameters by name, batch) -> outputs, of the model in training or in evaluation mode."""
    model = in_mode(skeleton(model), training)

    def apply(params: dict[str, Tensor], batch: Any) -> Any:
        places, names = call_inputs(model, batch)
        if torch.compiler.is_compiling():  # a graph holds no settings: who compiles sets them around the call
            return functional_call(model, params, places, names)
        with differentiable_attention():
            return functional_call(model, params, places, names)

    return apply


def in_mode(model: nn.Module, training: bool) -> nn.Module:
    """The model itself, in training or in evaluation mode, but for frozen batch norms, whose statistics are constants."""
    model.train(training)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and frozen(module):
            module.eval()
    return model


def call_inputs(model: nn.Module, batch: Any) -> tuple[tuple, dict[str, Any]]:
    """What the model gets of a batch: of a pair (x, y) x, of a dict the keys that its forward names; x may itself be a tuple,
    or such a dict."""
    x = batch if isinstance(batch, dict | Tensor) else batch[0]
    if not isinstance(x, dict):
        return tuple(x) if isinstance(x, tuple | list) else (x,), {}
    accepted = _accepted(type(model))
    return (), {name: t for name, t in x.items() if accepted is None or name in accepted}


@functools.cache
def _accepted(kind: type[nn.Module]) -> frozenset[str] | None:
    """The names that its forward takes; None: all."""
    parameters = inspect.signature(kind.forward).parameters
    named = [name for name, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    hands_on = len(named) <= 1 and len(parameters) > len(named)  # forward(self, *args, **kwargs)
    return None if hands_on else frozenset(named)


def function_of_tasks(model: nn.Module) -> Callable[[dict[str, Tensor], Any], Any] | None:
    """The model's `forward_tasks`, where it has one, as a function of many tasks' parameters and pairs (x, y)."""
    forward_tasks = getattr(model, "forward_tasks", None)
    return forward_tasks and (lambda params, batch: forward_tasks(params, batch[0]))


def for_each_step(model: nn.Module, names: Iterable[str], steps: int) -> None:
    """Gives these parameters an axis of inner steps in front, equal along it. `function` takes them without."""
    for name in names:
        p = model.get_parameter(name)
        p.data = p.detach().expand(steps, *p.shape).clone()


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Attention as plain products and softmax: torch's fused kernels have no second derivative, and none of them, nor the fast
    path of nn.MultiheadAttention and nn.TransformerEncoderLayer in evaluation, knows vmap."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
