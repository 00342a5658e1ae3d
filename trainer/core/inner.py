"""What a task's adaptation is: which of theta's tensors move, by which rates, after which objective.

The shapes of alpha, N tensors adapted, K inner steps, P numbers adapted in all:
    scalar      []       MAML (Finn et al. 2017), Alpha MAML (Behl, Baydin, Torr 2019)
    layer       [N]      a rate for each tensor
    layer_step  [K, N]   a rate for each tensor and step: LSLR of MAML++ (Antoniou, Edwards, Storkey 2019, section 4)
    parameter   [P]      a rate for each number: Meta-SGD (Li et al. 2017)
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor

from alpha_maml.errors import InputError

Params = dict[str, Tensor]


class InnerLoop(NamedTuple):
    """One iteration's inner loop."""

    steps: int = 1  # K
    order: str = "second"  # of the meta-gradient: second (exact), first (H = 0), reptile (the displacement itself)
    adapted: tuple[str, ...] | None = None  # names of theta's tensors that move, in theta's order; None: all
    alpha_shape: str = "scalar"
    clip: float = 0.0  # largest norm of a task's inner gradient; 0: none
    weight_decay: float = 0.0  # adds weight_decay / 2 |phi|^2 to the support loss
    weights: Tensor | None = None  # [K], of the query loss after each step; None: the last alone counts
    recompute: bool | None = None  # inner steps anew in the backward sweep; None: above RECOMPUTE_ABOVE steps
    randomness: str = "error"  # in vmap's words: what the model may draw: nothing, "different" for each task, or the "same"
    seed: int = 0  # of that: for the shard's first task, the next task's is one more, or for all
    per_step: tuple[str, ...] = ()  # names of theta's tensors that have an axis of inner steps in front
    loss: Callable | None = None  # of the support set, data.tasks.Loss; None: the queries' own


class Annealing(NamedTuple):
    """MAML++'s two annealings (sections 3 and 4), which start from a cheaper and a smoother objective and end at MAML's own."""

    multi_step: int = 0  # iterations over which the losses after the earlier inner steps fade out
    first_order: int = 0  # iterations at the start that are of first order


def annealed(loop: InnerLoop, annealing: Annealing, iteration: int, device: torch.device) -> InnerLoop:
    """The inner loop of the iteration, counted from 0; `loop` is MAML's own."""
    order = "first" if iteration < annealing.first_order and loop.order == "second" else loop.order
    weights = None
    if iteration < annealing.multi_step and loop.steps > 1:
        early = (1 - iteration / annealing.multi_step) / loop.steps
        weights = torch.full((loop.steps,), early, dtype=torch.float64, device=device)
        weights[-1] = 1 - (loop.steps - 1) * early
    return loop._replace(order=order, weights=weights)


def adapted_names(names: Iterable[str], adapts: str, per_step: tuple[str, ...] = ()) -> tuple[str, ...] | None:
    """The tensors that `inner.adapts` names but for those `per_step`, None for all. The head is the module that holds theta's
    last tensor: head alone is ANIL (Raghu et al. 2020), everything else BOIL (Oh et al. 2021). Raises InputError where nothing
    is left."""
    names = list(names)
    head = names[-1].rpartition(".")[0]
    if adapts == "all":
        found = names
    elif adapts in ("head", "body"):
        found = [name for name in names if (name.rpartition(".")[0] == head) == (adapts == "head")]
    else:
        found = matching(names, adapts, "inner.adapts", "use all, head, body, or patterns of these")
    found = [name for name in found if name not in per_step]
    if not found:
        raise InputError(f"inner.adapts: {adapts} leaves nothing to adapt" + (
            " beside inner.per_step; narrow that" if per_step else " in a model of one module; use all"))
    return None if found == names else tuple(found)


def matching(names: Iterable[str], patterns: str, key: str, remedy: str) -> list[str]:
    """The names that one of the patterns, divided by commas, matches; raises InputError where a pattern matches none."""
    names, wanted = list(names), [pattern.strip() for pattern in patterns.split(",")]
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in names):
            shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
            raise InputError(f"{key}: {pattern!r} matches none of the model's tensors ({shown}); {remedy}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in wanted)]


def per_step_names(names: Iterable[str], per_step: str | None) -> tuple[str, ...]:
    """The tensors that `inner.per_step` names. Raises InputError."""
    return () if per_step is None else tuple(matching(names, per_step, "inner.per_step", "use patterns of these, or null"))


def params_of_step(phi: Params, loop: InnerLoop, k: int, axes: int = 0) -> Params:
    """phi as the model takes it in step k, and for the queries after it: what is per step without the axis of steps, which
    stands behind `axes` others. Steps beyond those trained take the last one's."""
    if not loop.per_step:
        return phi
    return phi | {name: phi[name].select(axes, min(k, phi[name].shape[axes] - 1)) for name in loop.per_step}


def alpha_sizes(loop: InnerLoop, theta: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The shape of alpha's tensor."""
    names = loop.adapted or tuple(theta)
    return {"scalar": (), "layer": (len(names),), "layer_step": (loop.steps, len(names)),
            "parameter": (sum(theta[name].numel() for name in names),)}[loop.alpha_shape]


def rates_of_step(alpha: Tensor, loop: InnerLoop, theta: Params, k: int) -> Params:
    """alpha as it multiplies each adapted tensor in step k: scalars, or tensors of the parameters' shapes. Steps beyond those
    that alpha was trained for take the last one's."""
    names = loop.adapted or tuple(theta)
    if loop.alpha_shape == "scalar":
        return dict.fromkeys(names, alpha)
    if loop.alpha_shape == "parameter":
        return {name: part.view(theta[name].shape)
                for name, part in zip(names, alpha.split([theta[name].numel() for name in names]))}
    row = alpha[min(k, len(alpha) - 1)] if loop.alpha_shape == "layer_step" else alpha
    return dict(zip(names, row.unbind()))


def mean_rates(alpha: Tensor, loop: InnerLoop, theta: Params) -> dict[str, float]:
    """The mean rate of each tensor, as alpha/NAME; nothing where all share one."""
    if loop.alpha_shape == "scalar":
        return {}
    steps = [rates_of_step(alpha, loop, theta, k) for k in range(loop.steps)]
    return {f"alpha/{name}": float(torch.stack([rates[name].mean() for rates in steps]).mean()) for name in steps[0]}
