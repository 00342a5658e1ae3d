"""MAML's meta-gradient and alpha's hypergradient over a shard of tasks. Pure: tensors in, tensors out.

Notation of the paper (Behl, Baydin, Torr 2019, arXiv 1905.07435) and of MAML (Finn et al. 2017, arXiv 1703.03400):
    phi_0 = theta, phi_{k+1} = phi_k - alpha g_k with g_k = grad L_tr(phi_k), theta' = phi_K
    lambda_K = grad L_te(theta'), lambda_k = (I - alpha H_k) lambda_{k+1} with H_k the Hessian of L_tr at phi_k
    meta-gradient of one task  G = lambda_0
    alpha's hypergradient      A = dL_te(theta') / d alpha = - sum_k <lambda_{k+1}, g_k>   (K = 1: equation 3)
The backward sweep is written out instead of differentiating through the inner loop: A falls out of it for K dot
products, and what each inner step keeps in memory is in plain sight.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap

from data.tasks import Loss, TaskBatch

Params = dict[str, Tensor]
Apply = Callable[[Params, Tensor], Tensor]  # (parameters, inputs [n, *input]) -> outputs [n, ...]


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
    return sum(torch.sum(a[name].double() * b[name].double()) for name in a)


def _axpy(scale: Tensor | float, x: Params, y: Params) -> Params:
    return {name: y[name] + scale * x[name] for name in y}


def adapt(apply: Apply, loss: Loss, theta: Params, alpha: Tensor, x: Tensor, y: Tensor, steps: int) -> Params:
    """theta' after `steps` gradient steps of size alpha on one task's support set x [n, *input], y [n, ...]."""
    support_gradient = grad(lambda phi: loss(apply(phi, x), y)[0])
    phi = theta
    for _ in range(steps):
        phi = _axpy(-alpha, support_gradient(phi), phi)
    return phi


def task_meta_gradient(
    apply: Apply, loss: Loss, theta: Params, alpha: Tensor, task: TaskBatch, steps: int, order: str
) -> MetaGradient:
    """One task's G and A, exactly. `task` without its leading axis; order "second" is exact, "first" takes g_k as
    constants (H_k = 0), as first-order MAML does."""

    def support_gradient(phi: Params) -> tuple[Params, Tensor]:
        def objective(phi: Params) -> tuple[Tensor, Tensor]:
            value = loss(apply(phi, task.support_x), task.support_y)[0]
            return value, value

        return grad(objective, has_aux=True)(phi)

    phi, gradients, hessian_products = theta, [], []
    for k in range(steps):
        if order == "second":
            g, pullback, value = vjp(support_gradient, phi, has_aux=True)
            hessian_products.append(pullback)
        else:
            g, value = support_gradient(phi)
        if k == 0:
            support_loss = value
        gradients.append(g)
        phi = _axpy(-alpha, g, phi)

    def query(phi: Params) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        value, accuracy = loss(apply(phi, task.query_x), task.query_y)
        return value, (value, accuracy)

    adjoint, (query_loss, accuracy) = grad(query, has_aux=True)(phi)  # lambda_K
    moved = {name: sum(g[name] for g in gradients) for name in theta}  # sum_k g_k
    alignment_norm = (dot(adjoint, adjoint) * dot(moved, moved)).sqrt()
    alpha_gradient = torch.zeros_like(alignment_norm)
    for k in reversed(range(steps)):
        alpha_gradient = alpha_gradient - dot(adjoint, gradients[k])
        if order == "second":
            (product,) = hessian_products.pop()(adjoint)  # H_k lambda_{k+1}: the Hessian is symmetric
            adjoint = _axpy(-alpha, product, adjoint)
    return MetaGradient(adjoint, alpha_gradient, alignment_norm, query_loss, accuracy, support_loss)


def meta_gradient(
    apply: Apply, loss: Loss, theta: Params, alpha: Tensor, tasks: TaskBatch, steps: int, order: str = "second",
    chunk: int = 0,
) -> MetaGradient:
    """The sums over a shard of T tasks, `chunk` of them at a time (0: all at once), which bounds the memory.

    Each task is differentiated inside vmap: differentiating through vmap gives wrong second derivatives with
    normalisation layers on current torch. `alpha` is a scalar tensor of theta's dtype.
    """
    per_task = vmap(
        lambda *task: task_meta_gradient(apply, loss, theta, alpha, TaskBatch(*task), steps, order), randomness="error"
    )
    size = len(tasks.support_x)
    total = None
    for start in range(0, size, chunk or size):
        part = per_task(*(x[start : start + (chunk or size)] for x in tasks))
        part = MetaGradient({name: g.sum(0) for name, g in part.gradient.items()}, *(x.sum(0) for x in part[1:]))
        total = part if total is None else _add(total, part)
    return total


def _add(a: MetaGradient, b: MetaGradient) -> MetaGradient:
    return MetaGradient(_axpy(1.0, a.gradient, b.gradient), *(x + y for x, y in zip(a[1:], b[1:])))
