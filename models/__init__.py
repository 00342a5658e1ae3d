"""Models by name. A model is a torch.nn.Module built as Model(input_shape, outputs, **arguments); it maps inputs
[n, *input_shape] to outputs [n, outputs] and keeps no state but its parameters (buffers are constants). One that also has
`forward_tasks`, as models.mlp shows it, runs many tasks at once, faster; its second derivatives must be right without vmap.
What users need to know is in docs/models.md."""
from __future__ import annotations

from typing import Any

import torch
from torch import nn

from data.errors import InputError
from data.imported import imported, reason
from models.checks import check
from models.functional import compiled, for_each_step, function, skeleton
from models.native import enabled as natively
from models.norm import calibrate

__all__ = ["build", "calibrate", "check", "compiled", "for_each_step", "function", "natively", "skeleton"]

SHIPPED = {"mlp": "models.mlp:MLP", "conv4": "models.conv4:Conv4", "resnet12": "models.resnet12:ResNet12"}


def build(name: str, input_shape: tuple[int, ...], outputs: int, seed: int, channels: int | None = None,
          args: dict[str, Any] | None = None) -> nn.Module:
    """The model `name` (mlp, conv4, conv4_pooled, resnet12, or package.module:Class), initialised from `seed` alone.

    Raises InputError where it cannot be found or built, or has parameters that cannot be adapted.
    """
    arguments = dict(args or {})
    if channels is not None:
        arguments["channels"] = channels
    if name == "conv4_pooled":
        name, arguments["pooled"] = "conv4", True
    factory = imported("model.name", SHIPPED.get(name, name))
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
