"""Examples that a user brings to a trained run: a folder of images, or an .npz archive of arrays."""
from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL.Image import Image

from alpha_maml.data import images
from alpha_maml.data.images import SUFFIXES
from alpha_maml.errors import InputError, first_line, reading

Prepare = Callable[[Image], np.ndarray]  # an image of PIL's -> the model's input


class Examples(NamedTuple):
    x: np.ndarray  # [n, *input]
    y: np.ndarray | None  # [n], where they are labelled
    names: list[str]


def read(path: Path, option: str, prepare: Prepare | None) -> Examples:
    """The examples of a folder of images (one folder a class inside, or all in one without labels), or of an archive with the
    arrays x and, where they are labelled, y. `prepare` is None where the model takes no images.

    Raises InputError, which names `option`, the file, and what is wrong with it.
    """
    if path.suffix == ".npz":
        return _arrays(path, option)
    with reading(option), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of images that it decodes all the same
        return _folder(path, option, prepare)


def _folder(path: Path, option: str, prepare: Prepare | None) -> Examples:
    if not path.is_dir():
        raise InputError(f"{option}: {path} is neither a folder nor an .npz file; give one of the two")
    if prepare is None:
        raise InputError(f"{option}: {path} is a folder, and this run takes no images; give an .npz file with the array x")
    classes = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    found = [(file, folder.name) for folder in classes for file in _images(folder)] or [(file, "") for file in _images(path)]
    for folder in classes:
        if not _images(folder):
            raise InputError(f"{option}: {folder} holds no image; put some into it, or remove it")
    if not found:
        raise InputError(f"{option}: {path} holds no image ({', '.join(SUFFIXES)}); give a folder that does")
    x = np.stack([_image(file, option, prepare) for file, _ in found])
    labels = np.array([label for _, label in found]) if classes else None
    return Examples(x, labels, [str(file.relative_to(path)) for file, _ in found])


def _images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())


def _image(file: Path, option: str, prepare: Prepare) -> np.ndarray:
    try:
        return images.read(file, prepare)
    except ValueError as error:
        raise InputError(f"{option}: {file} cannot be read as an image ({error}); replace or remove it") from None


def _arrays(path: Path, option: str) -> Examples:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files if name in ("x", "y")}
            if any(isinstance(array, bytes) for array in arrays.values()):
                raise ValueError("an entry is no array")
    except Exception as error:  # numpy, zipfile and zlib raise a dozen kinds
        raise InputError(f"{option}: {path} cannot be read as an .npz archive of arrays ({first_line(error)}); write it with "
                         "numpy.savez") from None
    if "x" not in arrays:
        raise InputError(f"{option}: {path} has no array x; write it with numpy.savez(file, x=..., y=...)")
    x, y = arrays["x"], arrays.get("y")
    if x.ndim == 0 or (y is not None and y.shape[:1] != x.shape[:1]):
        raise InputError(f"{option}: {path} has x of shape {x.shape} and y of shape {None if y is None else y.shape}; give one "
                         "y for each x")
    return Examples(x, y, [str(i) for i in range(len(x))])
