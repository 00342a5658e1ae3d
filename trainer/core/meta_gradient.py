"""The meta-gradient over a shard of tasks: which tasks are differentiated together, and how. Pure: tensors in, tensors out."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, vmap

from alpha_maml.data.tasks import Loss, TaskBatch
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
        def objective(phi: Params) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            value, accuracy = loss(apply(params_of_step(phi, loop, k), task.query_x), task.query_y)
            return value, (value, accuracy)

        adjoint, (value, accuracy) = grad(objective, has_aux=True)(phi)
        return adjoint, value, accuracy

    support = support_of_task(apply, loss, task.support_x, task.support_y, loop.adapted or tuple(theta), loop)
    return sweep(support, query, 0, theta, alpha, loop)


def tasks_meta_gradient(forward_tasks: Apply, loss: Loss, theta: Params, alpha: Tensor, tasks: TaskBatch,
                        loop: InnerLoop) -> MetaGradient:
    """`task_meta_gradient` of T tasks at once; every field with the axis T in front. `forward_tasks` takes parameters and
    inputs with that axis."""

    @torch.enable_grad()
    def query(phi: Params, k: int) -> tuple:
        phi = {name: p.detach().requires_grad_() for name, p in phi.items()}
        value, accuracy = loss(forward_tasks(params_of_step(phi, loop, k, 1), tasks.query_x), tasks.query_y)
        adjoint = torch.autograd.grad(value.sum(), tuple(phi.values()), materialize_grads=True)
        return dict(zip(phi, adjoint)), value.detach(), accuracy

    names = loop.adapted or tuple(theta)
    support = support_of_tasks(forward_tasks, loss, tasks.support_x, tasks.support_y, names, loop)
    return sweep(support, query, 1, shared(theta, len(tasks.support_x)), alpha, loop)


def each_task(apply: Apply, loss: Loss, theta: Params, alpha: Tensor, tasks: TaskBatch, loop: InnerLoop) -> MetaGradient:
    """`task_meta_gradient` of T tasks of any model; every field with the axis T in front."""
    return vmap(lambda a, b, c, d: task_meta_gradient(apply, loss, theta, alpha, TaskBatch(a, b, c, d), loop),
                randomness=loop.randomness)(*tasks)


def one_task(apply: Apply) -> Apply:
    """`forward_tasks` of a single task, of any model: plain autograd without vmap, for chunks of one task."""

    def forward_tasks(params: Params, x: Tensor) -> Tensor:
        return apply({name: p[0] for name, p in params.items()}, x[0])[None]

    return forward_tasks


def meta_gradient(apply: Apply, loss: Loss, theta: Params, alpha: Tensor, tasks: TaskBatch, loop: InnerLoop, chunk: int = 0,
                  forward_tasks: Apply | None = None, each_task: Callable[..., MetaGradient] = each_task) -> MetaGradient:
    """The sums over a shard of T tasks, `chunk` of them at a time, which bounds the memory (0: all at once on a GPU, on a CPU
    as many as CHUNK_INPUTS says, and one for each thread). `loop.recompute` computes inner steps anew in the backward sweep
    instead of keeping their graphs: the same numbers, memory that hardly grows with the steps, for more time.

    Without `forward_tasks` each task is differentiated inside vmap, by `each_task` or that function compiled: differentiating
    through vmap gives wrong second derivatives with normalisation layers on current torch. `alpha` is of theta's dtype and of
    shape `alpha_sizes(loop, theta)`.
    Where `loop.randomness` allows `apply` to draw from torch's generator, `loop.recompute` must be False: computing anew would
    draw anew.
    """
    def each(part: TaskBatch) -> MetaGradient:
        if forward_tasks is not None:
            return tasks_meta_gradient(forward_tasks, loss, theta, alpha, part, loop)
        return each_task(apply, loss, theta, alpha, part, loop._replace(seed=0))  # a graph is compiled for one seed

    size = len(tasks.support_x)
    if chunk == 0:
        inputs = (tasks.support_x.numel() + tasks.query_x.numel()) // size
        chunk = max(torch.get_num_threads(), CHUNK_INPUTS // inputs) if tasks.support_x.device.type == "cpu" else size
    total: MetaGradient | None = None
    for start in range(0, size, chunk):
        if loop.randomness != "error":
            torch.manual_seed(loop.seed + start if loop.randomness == "different" else loop.seed)
        part = each(TaskBatch(*(x[start : start + chunk] for x in tasks)))
        part = MetaGradient({name: g.sum(0) for name, g in part.gradient.items()}, *(x.sum(0) for x in part[1:]))
        total = part if total is None else _sum(total, part)
    assert total is not None, "a shard has at least one task"
    return total


def _sum(a: MetaGradient, b: MetaGradient) -> MetaGradient:
    gradient = {name: a.gradient[name] + b.gradient[name] for name in a.gradient}
    return MetaGradient(gradient, *(x + y for x, y in zip(a[1:], b[1:])))
