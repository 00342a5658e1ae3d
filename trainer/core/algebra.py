"""Arithmetic over named tensors, of one task or of many at once."""
from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from alpha_maml.models import ops

Params = dict[str, Tensor]


def products(a: Params, b: Params, axes: int, names: tuple[str, ...], alpha_shape: str) -> Tensor:
    """a b summed over what shares a rate, in float64; the first `axes` axes, the tasks', stay."""
    if axes and alpha_shape != "parameter":
        fast = ops.products([a[name] for name in names], [b[name] for name in names])
        if fast is not None:
            return fast.sum(-1) if alpha_shape == "scalar" else fast
    each = [(a[name] * b[name]).reshape(*a[name].shape[:axes], -1) for name in names]
    if alpha_shape == "parameter":
        return torch.cat(each, -1).double()
    each = [x.sum(-1, dtype=torch.float64) for x in each]
    return reduce(torch.add, each) if alpha_shape == "scalar" else torch.stack(each, -1)


def scaled(factor: Tensor, x: Params) -> Params:
    """x times a number for each task, or for the one."""
    return {name: factor.to(p.dtype).view(factor.shape + (1,) * (p.dim() - factor.dim())) * p for name, p in x.items()}


def plus(x: Params, y: Params, scale: float = 1.0, axes: int = 0) -> Params:
    """x + scale y, where y may lack tensors. With `axes` they are no tensors of vmap, which knows no sums of lists."""
    if axes and next(iter(x.values())).is_cuda:
        added = torch._foreach_add([x[name] for name in y], list(y.values()), alpha=scale)  # pyright: ignore
        return x | dict(zip(y, added))
    return {name: torch.add(p, y[name], alpha=scale) if name in y else p for name, p in x.items()}


def times(rates: Params, x: Params) -> Params:
    return {name: rate * x[name] for name, rate in rates.items()}


def descended(phi: Params, rates: Params, direction: Params) -> Params:
    """phi - rates direction; what has no rate stays."""
    return {name: torch.addcmul(p, rates[name], direction[name], value=-1) if name in rates else p for name, p in phi.items()}


def shared(theta: Params, tasks: int) -> Params:
    """theta with an axis of tasks in front, without copies: products with it see one matrix."""
    return {name: p.expand(tasks, *p.shape) for name, p in theta.items()}


def flat(params: Params) -> Tensor:
    """All tensors as one vector: what is done to every element alike is one operation then, and not one for each tensor."""
    return torch.cat([p.flatten() for p in params.values()])


def named(vector: Tensor, like: Params) -> Params:
    """The inverse: views of `vector` under the names and in the shapes of `like`."""
    parts = vector.split([p.numel() for p in like.values()])
    return {name: part.view_as(p) for (name, p), part in zip(like.items(), parts)}
