"""A model from its name."""
from __future__ import annotations

from typing import Any

import torch
from torch import nn

from alpha_maml.errors import InputError
from alpha_maml.models import MODELS
from alpha_maml.registry import reason


def build(name: str, input_shape: tuple[int, ...], outputs: int, seed: int, channels: int | None = None,
          args: dict[str, Any] | None = None) -> nn.Module:
    """The model `name` (one of MODELS, or package.module:Class), initialised from `seed` alone.

    Raises InputError where it cannot be found or built, or has parameters that cannot be adapted.
    """
    arguments = dict(args or {})
    if channels is not None:
        arguments["channels"] = channels
    factory = MODELS.find(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = factory(input_shape, outputs, **arguments)
        except Exception as error:
            raise InputError(f"model.args: {name} cannot be built from input_shape={input_shape}, outputs={outputs}, "
                             f"{arguments} ({reason(error)}); correct model.args") from None
    if not isinstance(model, nn.Module) or not any(True for _ in model.parameters()):
        raise InputError(f"model.name: {name} has no parameters to adapt; return a torch.nn.Module with some")
    for parameter, value in model.named_parameters():
        if isinstance(value, nn.UninitializedParameter):
            raise InputError(f"model.name: {name} has a parameter without a shape ({parameter}); use no lazy module")
        if not value.is_floating_point():
            raise InputError(f"model.name: {name} has a parameter of {value.dtype} ({parameter}), which no gradient step can "
                             "move; make it real, or register a constant as a buffer")
        if not value.requires_grad:
            raise InputError(f"model.name: {name} has a parameter that requires no gradient ({parameter}), but all parameters "
                             "are learned; register a constant as a buffer")
    return model
