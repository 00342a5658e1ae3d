"""Networks: those that ship, what a user's own must be, and the fast operations behind them.

Belongs here: modules, and what turns a module into a function of its parameters. A model is a torch.nn.Module built as
Model(input_shape, outputs, **arguments) that maps inputs [n, *input_shape] to outputs [n, outputs] and keeps no state but its
parameters (buffers are constants). One that also has `forward_tasks`, as models.mlp shows it, runs many tasks at once, faster;
its second derivatives must be right without vmap. docs/models.md says what users need to know.
May import: `alpha_maml.errors`, `alpha_maml.registry`.
Offers: MODELS (here, without torch), `build.build`, `checks.check`, `functional.function`, `ops`.
"""
from __future__ import annotations

from alpha_maml.registry import Registry

MODELS = Registry("model.name")
MODELS.register("mlp", "alpha_maml.models.mlp:MLP")
MODELS.register("conv4", "alpha_maml.models.conv4:Conv4", "images")
MODELS.register("conv4_pooled", "alpha_maml.models.conv4:conv4_pooled", "images")
MODELS.register("resnet12", "alpha_maml.models.resnet12:ResNet12", "images")
