"""MAML's meta-gradient and alpha's hypergradient over a shard of tasks. Pure: tensors in, tensors out.

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

from collections.abc import Callable, Iterator
from functools import partial
from math import comb
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap

from data.gpu import runs_kernels
from data.tasks import Loss, TaskBatch
from models import native
from trainer.inner import InnerLoop, Params, params_of_step, rates_of_step

Apply = Callable[[Params, Tensor], Tensor]  # (parameters, inputs [n, *input]) -> outputs [n, ...]
# (phi, k, whether H is wanted) -> g_k, L_tr, and v -> H_k v: v over the tensors that adapt, H_k v over all
Support = Callable[[Params, int, bool], tuple[Params, Tensor, Callable[[Params], Params] | None]]
Query = Callable[[Params, int], tuple[Params, Tensor, Tensor]]  # (phi, k of the step before) -> grad L_te, L_te, accuracy

RECOMPUTE_ABOVE = 8  # inner steps
HELD = 3  # phi_k that a sweep which recomputes has at a time, beside theta
VMAP_INPUTS = 2**14  # numbers that the inputs of one task hold: above, vmap is slower on a CPU than one task after the other
CHUNK_INPUTS = 2**19  # numbers that the inputs of a chunk of tasks hold, by default, on a CPU: more no longer gains time


class MetaGradient(NamedTuple):
    """Sums over a shard's tasks. `gradient` has theta's shapes, the next two alpha's; everything else is a scalar."""

    gradient: Params  # S = sum of G_b
    alpha_gradient: Tensor  # sum of A_b
    alignment_norm: Tensor  # sum of |grad L_te| |sum_k g_k|, over what shares a rate: what normalises A into a cosine
    loss: Tensor  # query loss after adaptation
    accuracy: Tensor  # query accuracy after adaptation (nan for regression)
    support_loss: Tensor  # support loss before adaptation


class _Step(NamedTuple):
    """An inner step at phi_k."""

    direction: Params  # what alpha multiplies: g_k, clipped where that is wanted
    support_loss: Tensor
    pullback: Callable[[Params], Params] | None  # v -> (d direction / d phi_k)^T v
    query: Params | None  # w_k grad L_te(phi_k)


def _products(a: Params, b: Params, axes: int, names: tuple[str, ...], alpha_shape: str) -> Tensor:
    """a b summed over what shares a rate, in float64; the first `axes` axes, the tasks', stay."""
    products = _products_at_once(a[names[0]]) if axes and alpha_shape != "parameter" else None
    if products is not None:
        each = products([a[name] for name in names], [b[name] for name in names])
        return each.sum(-1) if alpha_shape == "scalar" else each
    each = [(a[name] * b[name]).reshape(*a[name].shape[:axes], -1) for name in names]
    if alpha_shape == "parameter":
        return torch.cat(each, -1).double()
    each = [x.sum(-1, dtype=torch.float64) for x in each]
    return sum(each) if alpha_shape == "scalar" else torch.stack(each, -1)


def _products_at_once(x: Tensor) -> Callable[[list[Tensor], list[Tensor]], Tensor] | None:
    """What takes the inner products of many tensors like x, where there is such a thing."""
    if runs_kernels(x):
        from trainer import kernels

        return kernels.products
    return native.products if x.device.type == "cpu" and native.loaded() else None


def _scaled(factor: Tensor, x: Params) -> Params:
    """x times a number for each task, or for the one."""
    return {name: factor.to(p.dtype).view(factor.shape + (1,) * (p.dim() - factor.dim())) * p for name, p in x.items()}


def _plus(x: Params, y: Params, scale: float = 1.0, axes: int = 0) -> Params:
    """x + scale y, where y may lack tensors. With `axes` they are no tensors of vmap, which knows no sums of lists."""
    if axes and next(iter(x.values())).is_cuda:
        return x | dict(zip(y, torch._foreach_add([x[name] for name in y], list(y.values()), alpha=scale)))
    return {name: torch.add(p, y[name], alpha=scale) if name in y else p for name, p in x.items()}


def _times(rates: Params, x: Params) -> Params:
    return {name: rate * x[name] for name, rate in rates.items()}


def _moved(phi: Params, rates: Params, direction: Params) -> Params:
    return {name: torch.addcmul(p, rates[name], direction[name], value=-1) if name in rates else p for name, p in phi.items()}


def _direction(g: Params, phi: Params, hessian: Callable | None, loop: InnerLoop, axes: int) -> tuple[Params, Callable | None]:
    """The step's direction from the support loss's gradient, and its pullback: weight decay, then clipping."""
    if loop.weight_decay:
        g = _plus(g, {name: phi[name] for name in g}, loop.weight_decay)
    if not loop.clip and not loop.weight_decay:
        return g, hessian
    direction, narrowed = g, None
    if loop.clip:
        norm = _products(g, g, axes, tuple(g), "scalar").sqrt().clamp(min=torch.finfo(torch.float64).tiny)
        factor = (loop.clip / norm).clamp(max=1)
        direction, unit, along = _scaled(factor, g), _scaled(1 / norm, g), torch.where(factor < 1, factor, 0)

        def narrowed(v: Params) -> Params:
            """d direction / d g is factor (1 - unit unit^T) where it clips, else 1."""
            return _plus(_scaled(factor, v), _scaled(along * _products(unit, v, axes, tuple(g), "scalar"), unit), -1)

    def pullback(v: Params) -> Params:
        v = narrowed(v) if narrowed else v
        return _plus(hessian(v), v, loop.weight_decay)

    return direction, pullback if hessian else None


def adaptation(apply: Apply, loss: Loss, theta: Params, alpha: Tensor, x: Tensor, y: Tensor, loop: InnerLoop,
               tasks: bool = False) -> Iterator[Params]:
    """phi_0 = theta, phi_1, ..., phi_K of one task's support set x [n, *input], y [n, ...], as the model takes them for
    queries; of T `tasks` at once where `apply` is a forward_tasks: then all but theta has the axis T in front."""
    support = (_support_of_tasks if tasks else _support)(apply, loss, x, y, loop.adapted or tuple(theta), loop)
    phi, axes = (_shared(theta, len(x)), 1) if tasks else (theta, 0)
    yield params_of_step(phi, loop, 0, axes)
    for k in range(loop.steps):
        direction, _ = _direction(support(phi, k, False)[0], phi, None, loop, axes)
        phi = _moved(phi, rates_of_step(alpha, loop, theta, k), direction)
        yield params_of_step(phi, loop, k, axes)


def adapt(apply: Apply, loss: Loss, theta: Params, alpha: Tensor, x: Tensor, y: Tensor, loop: InnerLoop) -> Params:
    """theta' = phi_K of one task's support set."""
    for phi in adaptation(apply, loss, theta, alpha, x, y, loop):  # noqa: B007  one phi_k is held at a time
        continue
    return phi


def _support(apply: Apply, loss: Loss, x: Tensor, y: Tensor, names: tuple[str, ...], loop: InnerLoop) -> Support:
    """One task's, by torch.func."""

    def gradient(phi: Params, k: int) -> tuple[Params, Tensor]:
        def objective(part: Params) -> tuple[Tensor, Tensor]:
            value = loss(apply(params_of_step(phi | part, loop, k), x), y)[0]
            return value, value

        return grad(objective, has_aux=True)({name: phi[name] for name in names})

    def support(phi: Params, k: int, hessian: bool) -> tuple:
        if not hessian:
            return *gradient(phi, k), None
        g, pullback, value = vjp(partial(gradient, k=k), phi, has_aux=True)
        return g, value, lambda v: pullback(v)[0]  # the Hessian is symmetric

    return support


def _shared(theta: Params, tasks: int) -> Params:
    """theta with an axis of tasks in front, without copies: products with it see one matrix."""
    return {name: p.expand(tasks, *p.shape) for name, p in theta.items()}


def _support_of_tasks(forward_tasks: Apply, loss: Loss, x: Tensor, y: Tensor, names: tuple[str, ...],
                      loop: InnerLoop) -> Support:
    """That of T tasks at once, by torch.autograd."""

    @torch.enable_grad()
    def support(phi: Params, k: int, hessian: bool) -> tuple:
        phi = {name: p.detach().requires_grad_(hessian or name in names) for name, p in phi.items()}
        value = loss(forward_tasks(params_of_step(phi, loop, k, 1), x), y)[0]
        graph = torch.autograd.grad(value.sum(), [phi[name] for name in names], create_graph=hessian, materialize_grads=True)

        def times(v: Params) -> Params:
            return dict(zip(phi, torch.autograd.grad(graph, tuple(phi.values()), [v[name] for name in names],
                                                     materialize_grads=True)))

        return {name: g.detach() for name, g in zip(names, graph)}, value.detach(), times if hessian else None

    return support


def _sweep(support: Support, query: Query, axes: int, theta: Params, alpha: Tensor, loop: InnerLoop) -> MetaGradient:
    """G, A and the rest, of one task (axes 0) or of each of many (axes 1, in front of every tensor)."""
    names, shape, second = loop.adapted or tuple(theta), loop.alpha_shape, loop.order == "second"
    recompute = loop.steps > RECOMPUTE_ABOVE if loop.recompute is None else loop.recompute
    whole = {name: p[0] for name, p in theta.items()} if axes else theta  # without the tasks' axis
    rates = [rates_of_step(alpha, loop, whole, k) for k in range(loop.steps)]

    def visit(phi: Params, k: int, backward: bool) -> _Step:
        """Step k at phi_k; `backward`: with what the backward sweep needs of it."""
        g, value, hessian = support(phi, k, backward and second)
        direction, pullback = _direction(g, phi, hessian, loop, axes)
        wanted = backward and k > 0 and loop.weights is not None
        return _Step(direction, value, pullback, _scaled(loop.weights[k - 1], query(phi, k - 1)[0]) if wanted else None)

    phi, kept, moved, lengths = theta, [], None, []
    held = dict.fromkeys(_first_held(loop.steps, HELD) if recompute else ())  # phi_k
    for k in range(loop.steps):
        if k in held:
            held[k] = phi
        step = visit(phi, k, not recompute)
        if k == 0:
            support_loss = step.support_loss
        if shape == "layer_step":
            lengths.append(_products(step.direction, step.direction, axes, names, "layer").sqrt())
        if shape != "layer_step" or loop.order == "reptile":
            moved = step.direction if moved is None else _plus(moved, step.direction, axes=axes)
        if not recompute:
            kept.append(step)
        phi = _moved(phi, rates[k], step.direction)
    adjoint, loss, accuracy = query(phi, loop.steps - 1)  # lambda_K
    if loop.weights is not None:
        adjoint = _scaled(loop.weights[-1], adjoint)
    per_rate = "layer" if shape == "layer_step" else shape
    steepness = _products(adjoint, adjoint, axes, names, per_rate).sqrt()
    length = torch.stack(lengths, -2) if lengths else _products(moved, moved, axes, names, per_rate).sqrt()
    phi, moved = None, moved if loop.order == "reptile" else None  # torch.compile knows no del here

    alpha_gradient, rows = torch.zeros_like(steepness), []
    again = _again(visit, rates, theta, 0, loop.steps, HELD, held) if recompute else None
    for k in reversed(range(loop.steps)):
        step = None  # its graph goes before the next is made
        step = next(again) if recompute else kept.pop()
        product = _products(adjoint, step.direction, axes, names, per_rate)
        alpha_gradient = alpha_gradient - product
        if shape == "layer_step":
            rows.append(-product)
        if step.pullback is not None:
            adjoint = _plus(adjoint, step.pullback(_times(rates[k], adjoint)), -1, axes)
        if step.query is not None:
            steepness = steepness + _products(step.query, step.query, axes, names, per_rate).sqrt()
            adjoint = _plus(adjoint, step.query, axes=axes)
    if shape == "layer_step":
        alpha_gradient, steepness = torch.stack(rows[::-1], -2), steepness[..., None, :]
    if loop.order == "reptile":  # Nichol, Achiam, Schulman 2018: (theta - theta') / alpha
        adjoint = {name: moved[name] if name in moved else torch.zeros_like(p) for name, p in theta.items()}
    return MetaGradient(adjoint, alpha_gradient, length * steepness, loss, accuracy, support_loss)


def _again(visit: Callable[[Params, int, bool], _Step], rates: list[Params], phi: Params, first: int, end: int, slots: int,
           held: dict[int, Params]) -> Iterator[_Step]:
    """The inner steps from phi = phi_first to before `end`, the last first, computed anew with at most `slots` phi_k beside
    phi. `held`: phi_k that the first way forward left."""

    def later(at: int) -> Params:
        moved = phi
        for k in range(first, at):
            moved = _moved(moved, rates[k], visit(moved, k, False).direction)
        return moved

    while end - first > 1:
        at = first + _until_held(end - first, slots)
        yield from _again(visit, rates, held.pop(at, None) or later(at), at, end, slots - 1, held)
        end = at
    yield visit(phi, first, True)


def _until_held(count: int, slots: int) -> int:
    """After how many of `count` steps the first of `slots` phi_k is held, so that as few as possible are computed anew:
    binomial checkpointing (Griewank 1992). Where each is computed anew `repeats` times, (slots + repeats over slots) can be."""
    repeats = next(r for r in range(1, count) if comb(slots + r, slots) >= count)
    return max(1, comb(slots + repeats - 2, slots), count - comb(slots + repeats - 1, slots - 1))


def _first_held(end: int, slots: int) -> Iterator[int]:
    at = 0
    while end - at > 1:
        at, slots = at + _until_held(end - at, slots), slots - 1
        yield at


def task_meta_gradient(apply: Apply, loss: Loss, theta: Params, alpha: Tensor, task: TaskBatch,
                       loop: InnerLoop) -> MetaGradient:
    """One task's G and A, exactly as `loop` defines them. `task` without its leading axis."""

    def query(phi: Params, k: int) -> tuple:
        def objective(phi: Params) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            value, accuracy = loss(apply(params_of_step(phi, loop, k), task.query_x), task.query_y)
            return value, (value, accuracy)

        adjoint, (value, accuracy) = grad(objective, has_aux=True)(phi)
        return adjoint, value, accuracy

    support = _support(apply, loss, task.support_x, task.support_y, loop.adapted or tuple(theta), loop)
    return _sweep(support, query, 0, theta, alpha, loop)


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
    support = _support_of_tasks(forward_tasks, loss, tasks.support_x, tasks.support_y, names, loop)
    return _sweep(support, query, 1, _shared(theta, len(tasks.support_x)), alpha, loop)


def each_task(apply: Apply, loss: Loss, theta: Params, alpha: Tensor, tasks: TaskBatch, loop: InnerLoop) -> MetaGradient:
    """`task_meta_gradient` of T tasks of any model; every field with the axis T in front."""
    return vmap(lambda *task: task_meta_gradient(apply, loss, theta, alpha, TaskBatch(*task), loop),
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
    total = None
    for start in range(0, size, chunk):
        if loop.randomness != "error":
            torch.manual_seed(loop.seed + start if loop.randomness == "different" else loop.seed)
        part = each(TaskBatch(*(x[start : start + chunk] for x in tasks)))
        part = MetaGradient({name: g.sum(0) for name, g in part.gradient.items()}, *(x.sum(0) for x in part[1:]))
        total = part if total is None else _add(total, part)
    return total


def _add(a: MetaGradient, b: MetaGradient) -> MetaGradient:
    gradient = {name: a.gradient[name] + b.gradient[name] for name in a.gradient}
    return MetaGradient(gradient, *(x + y for x, y in zip(a[1:], b[1:])))
