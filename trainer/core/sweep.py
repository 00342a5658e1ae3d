"""The backward sweep: the meta-gradient and alpha's hypergradient of a task, written out. Pure: tensors in, tensors out.

Notation of the paper (Behl, Baydin, Torr 2019, arXiv 1905.07435) and of MAML (Finn et al. 2017, arXiv 1703.03400):
    phi_0 = theta, phi_{k+1} = phi_k - alpha g_k with g_k = grad L_tr(phi_k), theta' = phi_K
    lambda_K = grad L_te(theta'), lambda_k = lambda_{k+1} - H_k (alpha lambda_{k+1}) with H_k the Hessian of L_tr at phi_k
    meta-gradient of one task  G = lambda_0
    alpha's hypergradient      A = dL_te(theta') / d alpha = - sum_k <lambda_{k+1}, g_k>   (K = 1: equation 3)
The backward sweep is written out instead of differentiating through the inner loop: A falls out of it for K dot
products, what each inner step keeps in memory is in plain sight, and may be computed a second time instead.

Where only some tensors adapt, g_k, alpha and the products of A range over those, lambda and H_k's rows over all of theta.
Where the query loss after every step counts (InnerLoop.weights w), w_K stands before lambda_K, and w_k grad L_te(phi_k) joins
lambda_k.

The sweep is written once and runs in two ways. Any model: torch.func on one task, inside vmap. A model that can run many tasks
at once, each with parameters of its own (`forward_tasks`): torch.autograd on all of them, since the gradient of a sum over
independent tasks is every task's gradient.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from alpha_maml.trainer.core.adaptation import Support, direction_of
from alpha_maml.trainer.core.algebra import Params, descended, plus, products, scaled, times
from alpha_maml.trainer.core.inner import InnerLoop, rates_of_step
from alpha_maml.trainer.core.recompute import first_held, recomputed

Query = Callable[[Params, int], tuple[Params, Tensor, dict]]  # (phi, k of the step before) -> grad L_te, L_te, metrics

RECOMPUTE_ABOVE = 8  # inner steps
HELD = 3  # phi_k that a sweep which recomputes has at a time, beside theta


class MetaGradient(NamedTuple):
    """Sums over a shard's tasks. `gradient` has theta's shapes, the next two alpha's; everything else is a scalar."""

    gradient: Params  # S = sum of G_b
    alpha_gradient: Tensor  # sum of A_b
    alignment_norm: Tensor  # sum of |grad L_te| |sum_k g_k|, over what shares a rate: what normalises A into a cosine
    loss: Tensor  # query loss after adaptation
    support_loss: Tensor  # support loss before adaptation
    metrics: dict[str, Tensor]  # of the queries after adaptation, by name


class Step(NamedTuple):
    """An inner step at phi_k."""

    direction: Params  # what alpha multiplies: g_k, clipped where that is wanted
    support_loss: Tensor
    pullback: Callable[[Params], Params] | None  # v -> (d direction / d phi_k)^T v
    query: Params | None  # w_k grad L_te(phi_k)


def sweep(support: Support, query: Query, axes: int, theta: Params, alpha: Tensor, loop: InnerLoop) -> MetaGradient:
    """G, A and the rest, of one task (axes 0) or of each of many (axes 1, in front of every tensor)."""
    names, shape, second = loop.adapted or tuple(theta), loop.alpha_shape, loop.order == "second"
    recompute = loop.steps > RECOMPUTE_ABOVE if loop.recompute is None else loop.recompute
    whole = {name: p[0] for name, p in theta.items()} if axes else theta  # without the tasks' axis
    rates = [rates_of_step(alpha, loop, whole, k) for k in range(loop.steps)]

    def visit(phi: Params, k: int, backward: bool) -> Step:
        """Step k at phi_k; `backward`: with what the backward sweep needs of it."""
        g, value, hessian = support(phi, k, backward and second)
        direction, pullback = direction_of(g, phi, hessian, loop, axes)
        if loop.weights is None or not backward or k == 0:
            return Step(direction, value, pullback, None)
        return Step(direction, value, pullback, scaled(loop.weights[k - 1], query(phi, k - 1)[0]))

    phi, kept, lengths, losses = theta, [], [], []
    moved: Params = {}  # the sum of the directions
    held = dict.fromkeys(first_held(loop.steps, HELD) if recompute else ())  # phi_k
    for k in range(loop.steps):
        if k in held:
            held[k] = phi
        step = visit(phi, k, not recompute)
        losses.append(step.support_loss)
        if shape == "layer_step":
            lengths.append(products(step.direction, step.direction, axes, names, "layer").sqrt())
        if shape != "layer_step" or loop.order == "reptile":
            moved = plus(moved, step.direction, axes=axes) if moved else step.direction
        if not recompute:
            kept.append(step)
        phi = descended(phi, rates[k], step.direction)
    adjoint, loss, metrics = query(phi, loop.steps - 1)  # lambda_K
    if loop.weights is not None:
        adjoint = scaled(loop.weights[-1], adjoint)
    per_rate = "layer" if shape == "layer_step" else shape
    steepness = products(adjoint, adjoint, axes, names, per_rate).sqrt()
    length = torch.stack(lengths, -2) if lengths else products(moved, moved, axes, names, per_rate).sqrt()
    phi, moved = theta, moved if loop.order == "reptile" else {}  # let go: torch.compile knows no del here

    alpha_gradient, rows = torch.zeros_like(steepness), []
    again = recomputed(visit, rates, theta, 0, loop.steps, HELD, held) if recompute else None
    for k in reversed(range(loop.steps)):
        step = None  # its graph goes before the next is made
        step = kept.pop() if again is None else next(again)
        product = products(adjoint, step.direction, axes, names, per_rate)
        alpha_gradient = alpha_gradient - product
        if shape == "layer_step":
            rows.append(-product)
        if step.pullback is not None:
            adjoint = plus(adjoint, step.pullback(times(rates[k], adjoint)), -1, axes)
        if step.query is not None:
            steepness = steepness + products(step.query, step.query, axes, names, per_rate).sqrt()
            adjoint = plus(adjoint, step.query, axes=axes)
    if shape == "layer_step":
        alpha_gradient, steepness = torch.stack(rows[::-1], -2), steepness[..., None, :]
    if loop.order == "reptile":  # Nichol, Achiam, Schulman 2018: (theta - theta') / alpha
        adjoint = {name: moved[name] if name in moved else torch.zeros_like(p) for name, p in theta.items()}
    return MetaGradient(adjoint, alpha_gradient, length * steepness, loss, losses[0], metrics)
