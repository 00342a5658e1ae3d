"""MAML's meta-gradient and alpha's hypergradient over a shard of tasks. Pure: tensors in, tensors out.

Notation of the paper (Behl, Baydin, Torr 2019, arXiv 1905.07435) and of MAML (Finn et al. 2017, arXiv 1703.03400):
    phi_0 = theta, phi_{k+1} = phi_k - alpha g_k with g_k = grad L_tr(phi_k), theta' = phi_K
    lambda_K = grad L_te(theta'), lambda_k = (I - alpha H_k) lambda_{k+1} with H_k the Hessian of L_tr at phi_k
    meta-gradient of one task  G = lambda_0
    alpha's hypergradient      A = dL_te(theta') / d alpha = - sum_k <lambda_{k+1}, g_k>   (K = 1: equation 3)
The backward sweep is written out instead of differentiating through the inner loop: A falls out of it for K dot
products, what each inner step keeps in memory is in plain sight, and may be computed a second time instead.

The sweep is written once and runs in two ways. Any model: torch.func on one task, inside vmap. A model that can run many tasks
at once, each with parameters of its own (`forward_tasks`): torch.autograd on all of them, since the gradient of a sum over
independent tasks is every task's gradient.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap

from data.tasks import Loss, TaskBatch

Params = dict[str, Tensor]
Apply = Callable[[Params, Tensor], Tensor]  # (parameters, inputs [n, *input]) -> outputs [n, ...]
# (phi, whether H is wanted) -> g_k, L_tr, and v -> H_k v
Support = Callable[[Params, bool], tuple[Params, Tensor, Callable[[Params], Params] | None]]
Query = Callable[[Params], tuple[Params, Tensor, Tensor]]  # phi -> grad L_te, L_te, accuracy

RECOMPUTE_ABOVE = 8  # inner steps
FAN_OUT = 4  # segments into which a sweep that recomputes divides the inner loop, again and again
CHUNK_INPUTS = 2**19  # numbers that the inputs of a chunk of tasks hold, by default, on a CPU: more no longer gains time


class MetaGradient(NamedTuple):
    """Sums over a shard's tasks. `gradient` has theta's shapes; everything else is a scalar."""

    gradient: Params  # S = sum of G_b
    alpha_gradient: Tensor  # sum of A_b
    alignment_norm: Tensor  # sum of |grad L_te| |sum_k g_k|: what normalises A into a cosine
    loss: Tensor  # query loss after adaptation
    accuracy: Tensor  # query accuracy after adaptation (nan for regression)
    support_loss: Tensor  # support loss before adaptation


def dot(a: Params, b: Params) -> Tensor:
    """Inner product over all tensors, accumulated in float64: in float32 these products are ill-conditioned."""
    return sum(torch.sum(a[name] * b[name], dtype=torch.float64) for name in a)


def _dot_each(a: Params, b: Params) -> Tensor:
    """`dot` of every task, [T]."""
    return sum((a[name] * b[name]).flatten(1).sum(1, dtype=torch.float64) for name in a)


def _axpy(scale: Tensor | float, x: Params, y: Params) -> Params:
    return {name: torch.addcmul(y[name], x[name], scale) for name in y}


def adapt(apply: Apply, loss: Loss, theta: Params, alpha: Tensor, x: Tensor, y: Tensor, steps: int) -> Params:
    """theta' after `steps` gradient steps of size alpha on one task's support set x [n, *input], y [n, ...]."""
    support_gradient = grad(lambda phi: loss(apply(phi, x), y)[0])
    phi = theta
    for _ in range(steps):
        phi = _axpy(-alpha, support_gradient(phi), phi)
    return phi


def _sweep(support: Support, query: Query, dot: Callable[[Params, Params], Tensor], theta: Params, alpha: Tensor, steps: int,
           order: str, recompute: bool) -> MetaGradient:
    """G, A and the rest, of one task or of each of many."""
    phi, kept, moved, support_losses = theta, [], None, []
    for _ in range(steps):
        g, value, hessian = support(phi, order == "second" and not recompute)
        support_losses.append(value)
        moved = g if moved is None else {name: m + g[name] for name, m in moved.items()}  # sum_k g_k
        if not recompute:
            kept.append((g, hessian))
        phi = _axpy(-alpha, g, phi)
    adjoint, loss, accuracy = query(phi)  # lambda_K
    alignment_norm = (dot(adjoint, adjoint) * dot(moved, moved)).sqrt()
    alpha_gradient = torch.zeros_like(alignment_norm)
    steps_backward = _again(support, theta, alpha, steps, order == "second") if recompute else _drain(kept)
    for g, hessian in steps_backward:
        alpha_gradient = alpha_gradient - dot(adjoint, g)
        if hessian is not None:
            adjoint = _axpy(-alpha, hessian(adjoint), adjoint)  # H_k lambda_{k+1}
    return MetaGradient(adjoint, alpha_gradient, alignment_norm, loss, accuracy, support_losses[0])


def _drain(kept: list) -> Iterator[tuple]:
    while kept:
        yield kept.pop()


def _again(support: Support, phi: Params, alpha: Tensor, steps: int, hessian: bool) -> Iterator[tuple]:
    """g_k and v -> H_k v of the `steps` inner steps from phi, the last first, computed anew: holds FAN_OUT phi_k for each
    level of FAN_OUT^levels >= steps instead of all of them (checkpointing in the sense of Griewank 1992)."""
    if steps == 1:
        g, _, product = support(phi, hessian)
        yield g, product
        return
    size = -(-steps // FAN_OUT)
    starts = [phi]
    for k in range(size * ((steps - 1) // size)):
        phi = _axpy(-alpha, support(phi, False)[0], phi)
        if (k + 1) % size == 0:
            starts.append(phi)
    last = steps - size * (len(starts) - 1)
    del phi
    while starts:
        yield from _again(support, starts.pop(), alpha, last, hessian)
        last = size


def task_meta_gradient(
    apply: Apply, loss: Loss, theta: Params, alpha: Tensor, task: TaskBatch, steps: int, order: str, recompute: bool = False
) -> MetaGradient:
    """One task's G and A, exactly. `task` without its leading axis; order "second" is exact, "first" takes g_k as
    constants (H_k = 0), as first-order MAML does."""

    def objective(phi: Params) -> tuple[Tensor, Tensor]:
        value = loss(apply(phi, task.support_x), task.support_y)[0]
        return value, value

    def support(phi: Params, hessian: bool) -> tuple:
        if not hessian:
            return *grad(objective, has_aux=True)(phi), None
        g, pullback, value = vjp(grad(objective, has_aux=True), phi, has_aux=True)
        return g, value, lambda v: pullback(v)[0]  # the Hessian is symmetric

    def query(phi: Params) -> tuple:
        def objective(phi: Params) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            value, accuracy = loss(apply(phi, task.query_x), task.query_y)
            return value, (value, accuracy)

        adjoint, (value, accuracy) = grad(objective, has_aux=True)(phi)
        return adjoint, value, accuracy

    return _sweep(support, query, dot, theta, alpha, steps, order, recompute)


def tasks_meta_gradient(
    forward_tasks: Apply, loss: Loss, theta: Params, alpha: Tensor, tasks: TaskBatch, steps: int, order: str,
    recompute: bool = False
) -> MetaGradient:
    """`task_meta_gradient` of T tasks at once; every field with the axis T in front. `forward_tasks` takes parameters and
    inputs with that axis."""

    def gradients(value: Tensor, phi: Params, create_graph: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(value.sum(), tuple(phi.values()), create_graph=create_graph, materialize_grads=True)

    def leaves(phi: Params) -> Params:
        return {name: p.detach().requires_grad_() for name, p in phi.items()}

    def support(phi: Params, hessian: bool) -> tuple:
        phi = leaves(phi)
        value = loss(forward_tasks(phi, tasks.support_x), tasks.support_y)[0]
        graph = gradients(value, phi, create_graph=hessian)

        def times(v: Params) -> Params:
            return dict(zip(phi, torch.autograd.grad(graph, tuple(phi.values()), tuple(v.values()), materialize_grads=True)))

        return {name: g.detach() for name, g in zip(phi, graph)}, value.detach(), times if hessian else None

    def query(phi: Params) -> tuple:
        phi = leaves(phi)
        value, accuracy = loss(forward_tasks(phi, tasks.query_x), tasks.query_y)
        return dict(zip(phi, gradients(value, phi))), value.detach(), accuracy

    size = len(tasks.support_x)
    theta = {name: p.expand(size, *p.shape) for name, p in theta.items()}  # shared: products with theta see one matrix
    with torch.enable_grad():
        return _sweep(support, query, _dot_each, theta, alpha, steps, order, recompute)


def meta_gradient(
    apply: Apply, loss: Loss, theta: Params, alpha: Tensor, tasks: TaskBatch, steps: int, order: str = "second",
    chunk: int = 0, recompute: bool | None = None, forward_tasks: Apply | None = None, randomness: str = "error", seed: int = 0
) -> MetaGradient:
    """The sums over a shard of T tasks, `chunk` of them at a time, which bounds the memory (0: all at once on a GPU, on a CPU
    as many as CHUNK_INPUTS says). `recompute` computes inner steps anew in the backward sweep instead of keeping their
    graphs: the same numbers, memory that hardly grows with `steps`, for more time (None: above RECOMPUTE_ABOVE steps).

    Without `forward_tasks` each task is differentiated inside vmap: differentiating through vmap gives wrong second
    derivatives with normalisation layers on current torch. `alpha` is a scalar tensor of theta's dtype.

    `randomness` says in vmap's words what random numbers `apply` may draw from torch's generator: none ("error"), others for
    each task ("different"), or the same for all tasks ("same"). `seed` decides them: that of the shard's first task, the next
    task's is one more; or that of all. Computing inner steps anew would draw anew, so None is never then.
    """
    recompute = steps > RECOMPUTE_ABOVE and randomness == "error" if recompute is None else recompute
    if forward_tasks is None:
        each = vmap(lambda *task: task_meta_gradient(apply, loss, theta, alpha, TaskBatch(*task), steps, order, recompute),
                    randomness=randomness)
    else:
        def each(*part: Tensor) -> MetaGradient:
            return tasks_meta_gradient(forward_tasks, loss, theta, alpha, TaskBatch(*part), steps, order, recompute)
    size = len(tasks.support_x)
    if chunk == 0:
        inputs = (tasks.support_x.numel() + tasks.query_x.numel()) // size
        chunk = max(1, CHUNK_INPUTS // inputs) if tasks.support_x.device.type == "cpu" else size
    total = None
    for start in range(0, size, chunk):
        if randomness != "error":
            torch.manual_seed(seed + start if randomness == "different" else seed)
        part = each(*(x[start : start + chunk] for x in tasks))
        part = MetaGradient({name: g.sum(0) for name, g in part.gradient.items()}, *(x.sum(0) for x in part[1:]))
        total = part if total is None else _add(total, part)
    return total


def _add(a: MetaGradient, b: MetaGradient) -> MetaGradient:
    gradient = {name: a.gradient[name] + b.gradient[name] for name in a.gradient}
    return MetaGradient(gradient, *(x + y for x, y in zip(a[1:], b[1:])))
