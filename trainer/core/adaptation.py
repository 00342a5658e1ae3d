"""The inner loop: phi_0 = theta, phi_{k+1} = phi_k - alpha g_k, and its support losses with their derivatives."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vjp

from alpha_maml.data.losses.contract import each_of_tasks
from alpha_maml.data.tasks import Loss, Tree
from alpha_maml.trainer.core.algebra import Params, descended, plus, products, scaled, shared
from alpha_maml.trainer.core.inner import InnerLoop, params_of_step, rates_of_step

Apply = Callable[[Params, Tree], Any]  # (parameters, support or query) -> outputs
Hessian = Callable[[Params], Params]
# (phi, k, whether H is wanted) -> g_k, L_tr, and v -> H_k v: v over the tensors that adapt, H_k v over all
Support = Callable[[Params, int, bool], tuple[Params, Tensor, Hessian | None]]


def adaptation(apply: Apply, loss: Loss, theta: Params, alpha: Tensor, batch: Tree, loop: InnerLoop,
               tasks: int = 0) -> Iterator[Params]:
    """phi_0 = theta, phi_1, ..., phi_K of one task's support set, as the model takes them for queries; of so many `tasks` at
    once where `apply` is a forward_tasks: then all but theta has an axis of tasks in front."""
    support = (support_of_tasks if tasks else support_of_task)(apply, loss, batch, loop.adapted or tuple(theta), loop)
    phi, axes = (shared(theta, tasks), 1) if tasks else (theta, 0)
    yield params_of_step(phi, loop, 0, axes)
    for k in range(loop.steps):
        direction, _ = direction_of(support(phi, k, False)[0], phi, None, loop, axes)
        phi = descended(phi, rates_of_step(alpha, loop, theta, k), direction)
        yield params_of_step(phi, loop, k, axes)


def adapt(apply: Apply, loss: Loss, theta: Params, alpha: Tensor, batch: Tree, loop: InnerLoop) -> Params:
    """theta' = phi_K of one task's support set."""
    phi = theta
    for phi in adaptation(apply, loss, theta, alpha, batch, loop):  # noqa: B007  one phi_k is held at a time
        continue
    return phi


def direction_of(g: Params, phi: Params, hessian: Hessian | None, loop: InnerLoop, axes: int) -> tuple[Params, Hessian | None]:
    """The step's direction from the support loss's gradient, and its pullback: weight decay, then clipping."""
    if loop.weight_decay:
        g = plus(g, {name: phi[name] for name in g}, loop.weight_decay)
    if not loop.clip and not loop.weight_decay:
        return g, hessian
    direction, narrow = g, None
    if loop.clip:
        norm = products(g, g, axes, tuple(g), "scalar").sqrt().clamp(min=torch.finfo(torch.float64).tiny)
        factor = (loop.clip / norm).clamp(max=1)
        direction, unit, along = scaled(factor, g), scaled(1 / norm, g), torch.where(factor < 1, factor, 0)

        def narrowed(v: Params) -> Params:
            """d direction / d g is factor (1 - unit unit^T) where it clips, else 1."""
            return plus(scaled(factor, v), scaled(along * products(unit, v, axes, tuple(g), "scalar"), unit), -1)

        narrow = narrowed
    if hessian is None:
        return direction, None

    def pullback(v: Params) -> Params:
        v = narrow(v) if narrow else v
        return plus(hessian(v), v, loop.weight_decay)

    return direction, pullback


def support_of_task(apply: Apply, loss: Loss, batch: Tree, names: tuple[str, ...], loop: InnerLoop) -> Support:
    """One task's, by torch.func."""
    loss = loop.loss or loss

    def gradient(phi: Params, k: int) -> tuple[Params, Tensor]:
        def objective(part: Params) -> tuple[Tensor, Tensor]:
            value = loss(apply(params_of_step(phi | part, loop, k), batch), batch)[0]
            return value, value

        return grad(objective, has_aux=True)({name: phi[name] for name in names})

    def support(phi: Params, k: int, hessian: bool) -> tuple:
        if not hessian:
            return *gradient(phi, k), None
        found: Any = vjp(partial(gradient, k=k), phi, has_aux=True)
        g, pullback, value = found
        return g, value, lambda v: pullback(v)[0]  # the Hessian is symmetric

    return support


def support_of_tasks(forward_tasks: Apply, loss: Loss, batch: Tree, names: tuple[str, ...], loop: InnerLoop) -> Support:
    """That of T tasks at once, by torch.autograd."""
    loss = each_of_tasks(loop.loss or loss)

    @torch.enable_grad()
    def support(phi: Params, k: int, hessian: bool) -> tuple:
        phi = {name: p.detach().requires_grad_(hessian or name in names) for name, p in phi.items()}
        value = loss(forward_tasks(params_of_step(phi, loop, k, 1), batch), batch)[0]
        graph = torch.autograd.grad(value.sum(), [phi[name] for name in names], create_graph=hessian, materialize_grads=True)

        def times(v: Params) -> Params:
            return dict(zip(phi, torch.autograd.grad(graph, tuple(phi.values()), [v[name] for name in names],
                                                     materialize_grads=True)))

        return {name: g.detach() for name, g in zip(names, graph)}, value.detach(), times if hessian else None

    return support
