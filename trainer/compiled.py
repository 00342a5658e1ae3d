"""A function as one graph of torch.compile."""
from __future__ import annotations

from collections.abc import Callable

import torch

from alpha_maml.data.tasks import TaskBatch
from alpha_maml.errors import InputError
from alpha_maml.models.functional import differentiable_attention

GRAPHS = 8  # of one size: of the first order and the second, with and without a multi-step loss, of a last chunk


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
    tasks = tasks.map(lambda x: x.clone(memory_format=torch.contiguous_format))
    for x in tasks.tensors():
        torch._dynamo.maybe_mark_dynamic(x, 1)
    return tasks
