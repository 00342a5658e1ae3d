"""A model from its name, or from an object."""
from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from alpha_maml.errors import InputError
from alpha_maml.models import MODELS
from alpha_maml.models.kinds import KINDS
from alpha_maml.registry import reason


def build(name: str, input_shape: tuple[int, ...], outputs: int, seed: int, channels: int | None = None,
          args: dict[str, Any] | None = None) -> nn.Module:
    """The model `name` (one of MODELS, of another library as in models.kinds, or package.module:Class), initialised from `seed`
    alone. Raises InputError where it cannot be found or built, or has parameters that cannot be adapted."""
    arguments = dict(args or {})
    if channels is not None:
        arguments["channels"] = channels
    kind, _, rest = name.partition(":")
    factory = KINDS[kind](rest) if kind in KINDS and rest else MODELS.find(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = factory(input_shape, outputs, **arguments)
        except Exception as error:
            raise InputError(f"model.args: {name} cannot be built from input_shape={input_shape}, outputs={outputs}, "
                             f"{arguments} ({reason(error)}); correct model.args") from None
    return usable(name, model)


def copied(model: nn.Module, learns: str | None) -> nn.Module:
    """A module of the user's own to train, with the very tensors of what is frozen: nothing writes to those."""
    frozen = {} if learns else {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, frozen)


def usable(name: str, model: Any) -> nn.Module:
    """The model itself. Raises InputError where it is no module, or has parameters that no gradient step can move."""
    if not isinstance(model, nn.Module) or not any(True for _ in model.parameters()):
        raise InputError(f"model.name: {name} has no parameters to adapt; return a torch.nn.Module with some")
    for parameter, value in model.named_parameters():
        if isinstance(value, nn.UninitializedParameter):
            raise InputError(f"model.name: {name} has a parameter without a shape ({parameter}); use no lazy module, or call "
                             "it once before")
        if value.requires_grad and not value.is_floating_point():
            raise InputError(f"model.name: {name} has a parameter of {value.dtype} ({parameter}), which no gradient step can "
                             "move; make it real, freeze it, or register a constant as a buffer")
    return model
