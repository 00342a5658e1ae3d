"""The meta-gradient over a shard of tasks: which tasks are differentiated together, and how. Pure: tensors in, tensors out."""
from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.utils._pytree import tree_leaves, tree_map

from alpha_maml.data.losses.contract import each_of_tasks
from alpha_maml.data.tasks import Loss, TaskBatch, Tree
from alpha_maml.trainer.core.adaptation import Apply, support_of_task, support_of_tasks
from alpha_maml.trainer.core.algebra import Params, shared
from alpha_maml.trainer.core.inner import InnerLoop, params_of_step
from alpha_maml.trainer.core.sweep import MetaGradient, sweep

VMAP_INPUTS = 2**14  # numbers that the inputs of one task hold: above, vmap is slower on a CPU than one task after the other
CHUNK_INPUTS = 2**19  # numbers that the inputs of a chunk of tasks hold, by default, on a CPU: more no longer gains time


def task_meta_gradient(apply: Apply, loss: Loss, theta: Params, alpha: Tensor, task: TaskBatch,
                       loop: InnerLoop) -> MetaGradient:
    """One task's G and A, exactly as `loop` defines them. `task` without its leading axis."""

    def query(phi: Params, k: int) -> tuple:
        def objective(phi: Params) -> tuple[Tensor, tuple]:
            value, metrics = loss(apply(params_of_step(phi, loop, k), task.query), task.query)
            return value, (value, metrics)

        adjoint, (value, metrics) = grad(objective, has_aux=True)(phi)
        return adjoint, value, metrics

    support = support_of_task(apply, loss, task.support, loop.adapted or tuple(theta), loop)
    return sweep(support, query, 0, theta, alpha, loop)


def tasks_meta_gradient(forward_tasks: Apply, loss: Loss, theta: Params, alpha: Tensor, tasks: TaskBatch,
                        loop: InnerLoop) -> MetaGradient:
    """`task_meta_gradient` of T tasks at once; every field with the axis T in front. `forward_tasks` takes parameters and
    inputs with that axis."""

    @torch.enable_grad()
    def query(phi: Params, k: int) -> tuple:
        phi = {name: p.detach().requires_grad_() for name, p in phi.items()}
        value, metrics = each_of_tasks(loss)(forward_tasks(params_of_step(phi, loop, k, 1), tasks.query), tasks.query)
        adjoint = torch.autograd.grad(value.sum(), tuple(phi.values()), materialize_grads=True)
        return dict(zip(phi, adjoint)), value.detach(), metrics

    names = loop.adapted or tuple(theta)
    support = support_of_tasks(forward_tasks, loss, tasks.support, names, loop)
    return sweep(support, query, 1, shared(theta, len(tasks.tensors()[0])), alpha, loop)


def each_task(apply: Apply, loss: Loss, theta: Params, alpha: Tensor, tasks: TaskBatch, loop: InnerLoop) -> MetaGradient:
    """`task_meta_gradient` of T tasks of any model; every field with the axis T in front."""
    return vmap(lambda support, query: task_meta_gradient(apply, loss, theta, alpha, TaskBatch(support, query), loop),
                randomness=loop.randomness)(*tasks)


def one_task(apply: Apply) -> Apply:
    """`forward_tasks` of a single task, of any model: plain autograd without vmap, for chunks of one task."""

    def forward_tasks(params: Params, batch: Tree) -> Any:
        outputs = apply({name: p[0] for name, p in params.items()}, tree_map(lambda x: x[0], batch))
        return tree_map(lambda x: x[None] if isinstance(x, Tensor) else x, outputs)

    return forward_tasks


def meta_gradient(apply: Apply, loss: Loss, theta: Params, alpha: Tensor, tasks: TaskBatch | list[TaskBatch], loop: InnerLoop,
                  chunk: int = 0, forward_tasks: Apply | None = None,
                  each_task: Callable[..., MetaGradient] = each_task) -> MetaGradient:
    """The sums over a shard of T tasks, or over several batches of them, `chunk` at a time, which bounds the memory (0: all at
    once on a GPU, on a CPU as many as CHUNK_INPUTS says, and one for each thread). `loop.recompute` computes inner steps anew
    in the backward sweep instead of keeping their graphs: the same numbers, memory that hardly grows with the steps, for more
    time.

    Without `forward_tasks` each task is differentiated inside vmap, by `each_task` or that function compiled: differentiating
    through vmap gives wrong second derivatives with normalisation layers on current torch. `alpha` is of theta's dtype and of
    shape `alpha_sizes(loop, theta)`.
    Where `loop.randomness` allows `apply` to draw from torch's generator, `loop.recompute` must be False: computing anew would
    draw anew.
    """
    if isinstance(tasks, list):
        each_of = [meta_gradient(apply, loss, theta, alpha, part, loop, chunk, forward_tasks, each_task) for part in tasks]
        return reduce(lambda a, b: tree_map(torch.add, a, b), each_of)

    def each(part: TaskBatch) -> MetaGradient:
        if forward_tasks is not None:
            return tasks_meta_gradient(forward_tasks, loss, theta, alpha, part, loop)
        return each_task(apply, loss, theta, alpha, part, loop._replace(seed=0))  # a graph is compiled for one seed

    tensors = tasks.tensors()
    size = len(tensors[0])
    if chunk == 0:
        chunk = size if tensors[0].is_cuda else max(torch.get_num_threads(), CHUNK_INPUTS // inputs_of_task(tasks))
    total: MetaGradient | None = None
    for start in range(0, size, chunk):
        if loop.randomness != "error":
            torch.manual_seed(loop.seed + start if loop.randomness == "different" else loop.seed)
        at_once = tasks if chunk >= size else tasks.map(lambda x: x[start : start + chunk])  # noqa: B023  called at once
        part = _summed(each(at_once))
        total = part if total is None else tree_map(torch.add, total, part)
    assert total is not None, "a shard has at least one task"
    return total


def _summed(found: MetaGradient) -> MetaGradient:
    """The sums over the axis of tasks."""
    return MetaGradient({name: g.sum(0) for name, g in found.gradient.items()}, found.alpha_gradient.sum(0),
                        found.alignment_norm.sum(0), found.loss.sum(0), found.support_loss.sum(0),
                        {name: x.sum(0) for name, x in found.metrics.items()})


def inputs_of_task(tasks: TaskBatch) -> int:
    """How many numbers the inputs of one of the tasks hold."""
    inputs = [batch[0] if isinstance(batch, tuple | list) else batch for batch in tasks]
    return max(1, sum(x[0].numel() for x in tree_leaves(inputs)))
