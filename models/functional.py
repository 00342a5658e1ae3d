"""A module as a function of its parameters, in forms that have second derivatives inside vmap."""
from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from data.errors import InputError
from data.tasks import TaskBatch

GRAPHS = 8  # of one size: of the first order and the second, with and without a multi-step loss, of a last chunk


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


def compiled(function: Callable, sizes: int = 1) -> Callable:
    """`function`, which calls an `apply` as above, as one graph of torch.compile; torch keeps what it compiles between runs.
    Where the tasks among its arguments come in so many `sizes` (of their second axis), one graph is for all, or, of a model
    for which torch cannot do that, each has its own. Raises InputError where there is no compiler."""
    graph = torch.compile(function, fullgraph=True, dynamic=False)
    one_for_all = sizes > 1

    def run(*arguments: object) -> object:
        nonlocal one_for_all
        given = [_of_any_size(a) if one_for_all and isinstance(a, TaskBatch) else a for a in arguments]
        try:
            with differentiable_attention(), torch._dynamo.config.patch(recompile_limit=GRAPHS * sizes):
                return graph(*given)
        except Exception as error:
            if "C++ compiler" in str(error):
                raise InputError("compile: true needs a C++ compiler, and torch finds none; install g++, name another in CXX, "
                                 "or leave compile out") from None
            if not one_for_all or "symbolic sizes" not in str(error):
                raise
        one_for_all = False  # torch has no second derivative of a convolution of unknown size inside vmap
        return run(*arguments)

    return run


def _of_any_size(tasks: TaskBatch) -> TaskBatch:
    """A copy whose second axis a graph leaves open: one that were a view would tie the graph to its strides."""
    tasks = TaskBatch(*(x.clone(memory_format=torch.contiguous_format) for x in tasks))
    for x in tasks:
        torch._dynamo.maybe_mark_dynamic(x, 1)
    return tasks


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
