"""Task distributions by name."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:  # torch takes seconds to import, and `--help` needs none of it
    import numpy as np
    import torch
    from PIL.Image import Image

    from data.tasks import Loss, TaskSizes, TaskSource


class Settings(Protocol):
    """The section `data` of a configuration."""

    name: str  # sinusoid, omniglot, folder, or package.module:Class
    root: str | None
    size: int
    colour: bool
    resident: bool | None
    args: dict[str, Any]


class Description(NamedTuple):
    """What a model of a distribution needs to know, without the distribution's files."""

    input_shape: tuple[int, ...]
    outputs: int
    loss: Loss
    regression: bool
    prepare: Callable[[Image], np.ndarray] | None  # an image as the model takes it, where it takes images


def described(settings: Settings, ways: int) -> Description:
    from data.tasks import classification_loss, regression_loss

    if settings.name == "sinusoid":
        from data.sinusoid import Sinusoid

        return Description(Sinusoid.input_shape, Sinusoid.outputs, regression_loss, True, None)
    if settings.name == "omniglot":
        from data.omniglot import Omniglot, prepare

        return Description(Omniglot.input_shape, ways, classification_loss, False, lambda image: prepare(image)[None] / 255.0)
    if settings.name == "folder":
        from data.images import resized

        shape = (3 if settings.colour else 1, settings.size, settings.size)
        return Description(shape, ways, classification_loss, False,
                           lambda image: resized(image, settings.size, settings.colour) / 255.0)
    from data.own import shapes

    shape, outputs = shapes(settings.name, settings.args)
    if outputs is None:
        return Description(shape, ways, classification_loss, False, None)
    return Description(shape, outputs, regression_loss, True, None)


def build(settings: Settings, cache: Path, sizes: TaskSizes, seed: int, dtype: torch.dtype, device: torch.device,
          warn: Callable[[str], None]) -> TaskSource:
    """The distribution that `settings` name; decoded files are kept in `cache`, `warn` takes lines for the user.

    Raises InputError where its files or the task's sizes are wrong.
    """
    if settings.name == "sinusoid":
        from data.sinusoid import Sinusoid

        return Sinusoid(sizes, seed, dtype)
    if settings.name == "omniglot":
        from data.omniglot import Omniglot

        return Omniglot(settings.root, cache, sizes, seed, dtype, device)
    if settings.name == "folder":
        from data.folder import Folder

        return Folder(settings.root, settings.size, settings.colour, settings.resident, cache, sizes, seed, dtype, device, warn)
    from data.own import Own

    return Own(settings.name, settings.args, sizes, seed, dtype, device, warn)
