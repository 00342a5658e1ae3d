"""What is done to any module before its tasks are differentiated: usual obstacles that can be removed."""
from __future__ import annotations

from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from alpha_maml.errors import InputError


class HardSigmoid(nn.Module):
    """nn.Hardsigmoid with a second derivative."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(x + 3) / 6


def prepare(name: str, model: nn.Module, learns: str | None = None) -> list[str]:
    """Makes the model one that can be adapted, in place; lines for the user.

    Batch norms that learn take the statistics of their batch, since running ones would leak between tasks; frozen ones keep the
    statistics that they have. Operations in place, which vmap does not take, are not. `learns`: patterns of names, divided by
    commas, of the parameters that are learned; None: those that require a gradient. Raises InputError where none is left.
    """
    if learns is not None:
        _choose(name, model, learns)
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError(f"model.name: {name} has no parameter that requires a gradient; leave some unfrozen, or name them in "
                         "model.learns")
    norms = 0
    for module in list(model.modules()):
        if isinstance(module, _BatchNorm) and module.track_running_stats and not frozen(module):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
            module.num_batches_tracked, norms = None, norms + 1
        for child, inner in module.named_children():
            if isinstance(inner, nn.Hardsigmoid):  # torch's has no second derivative
                setattr(module, child, HardSigmoid())
        if getattr(module, "inplace", None) is True:
            setattr(module, "inplace", False)  # noqa: B010  a module's attribute is a Tensor or a Module for type checkers
    return [f"model.name: {norms} batch norms of {name} take the statistics of each batch, since running ones would leak "
            "between tasks"] if norms else []


def frozen(norm: _BatchNorm) -> bool:
    """Whether a batch norm with running statistics is to keep them: its parameters, if it has some, are not learned."""
    own = list(norm.parameters(recurse=False))
    return norm.track_running_stats and bool(own) and not any(p.requires_grad for p in own)


def _choose(name: str, model: nn.Module, learns: str) -> None:
    patterns, names = [pattern.strip() for pattern in learns.split(",")], [n for n, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(n, pattern) for n in names):
            shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
            raise InputError(f"model.learns: {pattern!r} matches none of the tensors of {name} ({shown}); use patterns of "
                             "these, or null")
    for n, p in model.named_parameters():
        p.requires_grad_(any(fnmatchcase(n, pattern) for pattern in patterns))
