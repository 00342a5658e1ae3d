"""Task distributions, their losses, and what a user brings to a trained run.

Belongs here: where tasks come from and how they are drawn. A distribution is a class with `build` and `describe` as in
`build.Kind`, whose objects are `tasks.TaskSource`; one file and one line below add it. A function, or a class with a method
`task`, makes whole tasks (`function.py`); of any other class, a data set of the user's own, tasks are drawn (`own.py`).
May import: `alpha_maml.errors`, `alpha_maml.registry`, `models.ops`.
Offers: DATASETS, LOSSES (here, without torch), `build.build`, `build.describe`, `tasks.TaskBatch`, `examples.read`.
"""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from alpha_maml.registry import Registry

if TYPE_CHECKING:  # torch takes seconds to import, and `--help` needs none of it
    import numpy as np
    import torch
    from PIL.Image import Image


DATASETS = Registry("data.name")
DATASETS.register("sinusoid", "alpha_maml.data.sinusoid:Sinusoid", "regression")
DATASETS.register("omniglot", "alpha_maml.data.omniglot:Omniglot", "classification")
DATASETS.register("folder", "alpha_maml.data.folder:Folder", "classification", "needs a root")

LOSSES = Registry("task.loss", "function")
LOSSES.register("cross_entropy", "alpha_maml.data.losses.cross_entropy:cross_entropy")
LOSSES.register("mean_squared_error", "alpha_maml.data.losses.mean_squared_error:mean_squared_error")
LOSSES.register("binary_cross_entropy", "alpha_maml.data.losses.binary_cross_entropy:binary_cross_entropy")
LOSSES.register("dense_cross_entropy", "alpha_maml.data.losses.dense_cross_entropy:dense_cross_entropy")
LOSSES.register("next_token", "alpha_maml.data.losses.dense_cross_entropy:next_token")
LOSSES.register("pairwise_ranking", "alpha_maml.data.losses.pairwise_ranking:pairwise_ranking")


class Settings(Protocol):
    """The section `data` of a configuration."""

    @property
    def name(self) -> str: ...  # one of DATASETS, or package.module:Class
    @property
    def root(self) -> str | None: ...
    @property
    def size(self) -> int: ...
    @property
    def colour(self) -> bool: ...
    @property
    def resident(self) -> bool | None: ...
    @property
    def args(self) -> dict[str, Any]: ...


class Context(NamedTuple):
    """Where a run draws its tasks."""

    cache: Path  # folder for decoded files
    seed: int
    dtype: torch.dtype
    device: torch.device
    warn: Callable[[str], None]  # takes lines for the user
    batch: int  # tasks in an iteration, over all ranks


class Description(NamedTuple):
    """What a model of a distribution needs to know, without the distribution's files."""

    input_shape: tuple[int, ...]
    outputs: int
    loss: Callable[[Any, Any], tuple[torch.Tensor, dict[str, torch.Tensor]]]  # tasks.Loss
    regression: bool
    prepare: Callable[[Image], np.ndarray] | None = None  # an image as the model takes it, where it takes images
