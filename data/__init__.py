"""Task distributions by name."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # torch takes seconds to import, and `--help` needs none of it
    import numpy as np
    import torch
    from PIL.Image import Image

    from data.tasks import Loss, TaskSource


class Description(NamedTuple):
    """What a model of a distribution needs to know, without the distribution's files."""

    input_shape: tuple[int, ...]
    outputs: int
    loss: Loss
    regression: bool
    prepare: Callable[[Image], np.ndarray] | None  # an image as the model takes it, where it takes images


def described(name: str, ways: int) -> Description:
    if name == "sinusoid":
        from data.sinusoid import Sinusoid

        return Description(Sinusoid.input_shape, Sinusoid.outputs, Sinusoid.loss, True, None)
    from data.omniglot import Omniglot, prepare

    return Description(Omniglot.input_shape, ways, Omniglot.loss, False, lambda image: prepare(image)[None] / 255.0)


def build(name: str, root: str | None, cache: Path, ways: int, shots: int, queries: int, seed: int, dtype: torch.dtype,
          device: torch.device) -> TaskSource:
    """The distribution `name` (sinusoid or omniglot); decoded files are kept in `cache`.

    Raises InputError where its files or the task's sizes are wrong.
    """
    if name == "sinusoid":
        from data.sinusoid import Sinusoid

        return Sinusoid(shots, queries, seed, dtype)
    from data.omniglot import Omniglot

    return Omniglot(root, cache, ways, shots, queries, seed, dtype, device)
