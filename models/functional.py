"""A module as a function of its parameters, in forms that have second derivatives inside vmap."""
from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of the model without its parameters' values (they are on the device meta, tied ones stay tied); buffers are
    copied."""
    hollow = {id(p): nn.Parameter(p.detach().to("meta")) for p in model.parameters()}
    return copy.deepcopy(model, hollow)


def function(model: nn.Module, training: bool) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    """(parameters by name, x [n, *input_shape]) -> outputs [n, outputs], of the model in training or in evaluation mode."""
    model = skeleton(model).train(training)

    def apply(params: dict[str, Tensor], x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # a graph holds no settings: who compiles sets them around the call
            return functional_call(model, params, (x,))
        with differentiable_attention():
            return functional_call(model, params, (x,))

    return apply


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
