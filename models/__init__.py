"""Models by name. A model is a torch.nn.Module built as Model(input_shape, outputs, **arguments); it maps inputs
[n, *input_shape] to outputs [n, outputs] and keeps no state but its parameters. One that also has `forward_tasks`, as
models.mlp shows it, runs many tasks at once, faster; its second derivatives must be right without vmap."""
from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from data.errors import InputError


def build(name: str, input_shape: tuple[int, ...], outputs: int, seed: int, channels: int | None = None,
          args: dict[str, Any] | None = None) -> nn.Module:
    """The model `name` (mlp, conv4, conv4_pooled, or package.module:Class), initialised from `seed` alone.

    Raises InputError where it cannot be found, built or adapted.
    """
    arguments = dict(args or {})
    if channels is not None:
        arguments["channels"] = channels
    if name == "conv4_pooled":
        name, arguments["pooled"] = "conv4", True
    path = {"mlp": "models.mlp:MLP", "conv4": "models.conv4:Conv4"}.get(name, name)
    module, _, attribute = path.partition(":")
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"model.name: {name!r} cannot be imported ({error}); it must be package.module:Class and on "
                         "PYTHONPATH") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = factory(input_shape, outputs, **arguments)
        except (TypeError, ValueError) as error:
            raise InputError(f"model.args: {name} cannot be built from input_shape={input_shape}, outputs={outputs}, "
                             f"{arguments} ({error}); correct model.args") from None
    if not isinstance(model, nn.Module) or not any(True for _ in model.parameters()):
        raise InputError(f"model.name: {name} has no parameters to adapt; return a torch.nn.Module with some")
    if any(True for _ in model.buffers()):
        buffer = next(name for name, _ in model.named_buffers())
        raise InputError(f"model.name: {name} keeps state beside its parameters ({buffer}), which would leak between "
                         "tasks; use batch statistics (track_running_stats=False) or register no buffer")
    return model
