"""Omniglot (Lake, Salakhutdinov, Tenenbaum 2015): 1,623 characters of 20 drawings each, in MAML's few-shot form.

Split as in MAML's code: 1,100 characters train, 100 validation, 423 test, after one fixed shuffle; 28 x 28, ink = 1;
each class of a task is turned by 0, 90, 180 or 270 degrees.
"""
from __future__ import annotations

import hashlib
import io
import os
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from alpha_maml.data import Context, Description, Settings
from alpha_maml.data.losses.cross_entropy import cross_entropy
from alpha_maml.data.tasks import TaskBatch, TaskSizes, classification_batch, draw, draw_subset
from alpha_maml.errors import InputError, first_line, reading

if TYPE_CHECKING:
    from PIL.Image import Image

ARCHIVES = {
    "images_background.zip": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation.zip": "6b91aef0f799c5bb55b94e3f2daec811",
}
UPSTREAM = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/"
CHARACTERS, DRAWINGS, SIZE = 1623, 20, 28
LARGEST = 2**24  # bytes of an archive; the larger one has 9.5 million
SPLIT_BOUNDS = {"train": (0, 1100), "val": (1100, 1200), "test": (1200, CHARACTERS)}
REMEDY = "fetch both archives from the folder python of github.com/brendenlake/omniglot into data.root"


def find_archives(root: str | None, cache: Path) -> list[Path]:
    """The two archives under `root`, or downloaded once to `cache` when `root` is None.

    Raises InputError where one is missing or cannot be downloaded.
    """
    if root is None:
        import pooch

        try:
            return [Path(pooch.retrieve(UPSTREAM + name, f"md5:{md5}", name, cache, progressbar=True))
                    for name, md5 in ARCHIVES.items()]
        except Exception as error:  # requests and pooch raise a dozen kinds; all mean that it did not arrive
            raise InputError("data.root: not set, and Omniglot could not be downloaded "
                             f"({first_line(error)}); {REMEDY}") from None
    paths = [Path(root) / name for name in ARCHIVES]
    for path in paths:
        if not path.is_file():
            raise InputError(f"data.root: {path} does not exist; {REMEDY}")
        if path.stat().st_size > LARGEST:
            raise InputError(f"data.root: {path} has {path.stat().st_size} bytes, Omniglot's have fewer; {REMEDY}")
    return paths


def prepare(image: Image) -> np.ndarray:
    """A dark drawing on a light ground, of PIL and any size, as uint8 [28, 28] with ink = 255."""
    from PIL import Image

    return 255 - np.asarray(image.convert("L").resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def decode_archive(path: Path) -> dict[str, np.ndarray]:
    """Character path -> uint8 [20, 28, 28], ink = 255. Nothing is extracted to disk.

    Raises InputError for anything but an archive of 105 x 105 drawings, 20 of each character.
    """
    from PIL import Image

    try:
        drawings: dict[str, list[np.ndarray]] = {}
        with zipfile.ZipFile(path) as archive:
            for entry in sorted(archive.infolist(), key=lambda e: e.filename):
                if not entry.filename.endswith(".png"):
                    continue
                if entry.file_size > 1 << 16:
                    raise ValueError(f"{entry.filename} has {entry.file_size} bytes, a drawing has some hundred")
                with Image.open(io.BytesIO(archive.read(entry)), formats=["PNG"]) as image:
                    if image.size != (105, 105):
                        raise ValueError(f"{entry.filename} is {image.size[0]} x {image.size[1]}, not 105 x 105")
                    small = prepare(image)
                drawings.setdefault(entry.filename.rsplit("/", 1)[0], []).append(small)
    except Exception as error:  # zipfile, zlib and Pillow raise a dozen kinds
        raise InputError(f"data.root: {path} is not a whole Omniglot archive ({error}); {REMEDY}") from None
    for name, images in drawings.items():
        if len(images) != DRAWINGS:
            raise InputError(f"data.root: {path} has {len(images)} drawings of {name}, not {DRAWINGS}; {REMEDY}")
    return {name: np.stack(images) for name, images in drawings.items()}


def load_images(root: str | None, cache: Path) -> tuple[np.ndarray, str]:
    """All drawings, uint8 [1623, 20, 28, 28], in the fixed shuffled order, and their SHA-256.

    Decoded once and kept in `cache` under the archives' own digest; ranks of one node wait for the first of them.
    """
    from filelock import FileLock

    with reading("data.root"):
        cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "omniglot.lock"), reading("data.root"):
        archives = find_archives(root, cache)
        source = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in archives)).hexdigest()
        store, seal = cache / f"omniglot-{SIZE}-{source[:16]}.npy", cache / f"omniglot-{SIZE}-{source[:16]}.sha256"
        if store.is_file() and seal.is_file():
            content, digest = store.read_bytes(), seal.read_bytes().decode(errors="replace").strip()
            with suppress(ValueError):  # sealed, and no array of numbers: as good as damaged
                if hashlib.sha256(content).hexdigest() == digest:
                    return np.load(io.BytesIO(content), allow_pickle=False), digest
        characters: dict[str, np.ndarray] = {}
        for path in archives:
            characters |= decode_archive(path)
        if len(characters) != CHARACTERS:
            raise InputError(f"data.root: {root} holds {len(characters)} characters, Omniglot has {CHARACTERS}; {REMEDY}")
        order = np.random.RandomState(1).permutation(CHARACTERS)  # the legacy generator's stream is frozen
        images = np.stack([characters[name] for name in sorted(characters)])[order]
        buffer = io.BytesIO()
        np.save(buffer, images)
        digest = hashlib.sha256(buffer.getvalue()).hexdigest()
        for path, content in ((store, buffer.getvalue()), (seal, digest.encode())):
            partial = path.with_suffix(f".{os.getpid()}")
            partial.write_bytes(content)
            partial.replace(path)
        return images, digest


class Omniglot:
    """N-way S-shot tasks, sampled and normalised on `device`.

    support_x [T, N*S, 1, 28, 28] in [0, 1] with ink = 1, support_y [T, N*S] int64; queries likewise with Q per class.
    """

    input_shape = (1, SIZE, SIZE)
    on_device = True

    def __init__(self, root: str | None, cache: Path, sizes: TaskSizes, seed: int, dtype: torch.dtype, device: torch.device):
        smallest = min(stop - start for start, stop in SPLIT_BOUNDS.values())
        if sizes.ways > smallest:
            raise InputError(f"task.ways: {sizes.ways} is more than the {smallest} characters of Omniglot's smallest split; "
                             "lower it")
        if sizes.shots + sizes.queries > DRAWINGS:
            raise InputError(f"task.shots + task.queries: {sizes.shots} + {sizes.queries} is more than the {DRAWINGS} drawings "
                             "of a character; lower one of them")
        self.outputs, self.loss, self.sizes, self.seed, self.dtype = (
            sizes.ways, sizes.cross_entropy(), sizes, seed, dtype)
        images, self.digest = load_images(root, cache)
        self.images = torch.from_numpy(images).to(device)
        turns = [np.rot90(np.arange(SIZE * SIZE).reshape(SIZE, SIZE), k).ravel() for k in range(4)]
        self.turns = torch.from_numpy(np.stack(turns)).to(device)  # pixel positions of each rotation [4, 784]

    @classmethod
    def build(cls, settings: Settings, sizes: TaskSizes, context: Context) -> Omniglot:
        return cls(settings.root, context.cache, sizes, context.seed, context.dtype, context.device)

    @classmethod
    def describe(cls, settings: Settings, ways: int) -> Description:
        return Description(cls.input_shape, ways, cross_entropy, False, lambda image: prepare(image)[None] / 255.0)

    def batch(self, split: str, iteration: int | Tensor, indices: Tensor) -> TaskBatch:
        start, stop = SPLIT_BOUNDS[split]
        ways, shots = self.sizes.at(self.seed, split, iteration)
        tasks, examples = len(indices), shots + self.sizes.queries

        def uniforms(stream: int, count: int) -> Tensor:
            return draw(self.seed, split, iteration, indices, stream, count)

        classes = start + draw_subset(uniforms(0, stop - start), ways)  # [T, N]
        drawings = draw_subset(uniforms(1, ways * DRAWINGS).view(tasks, ways, DRAWINGS), examples)  # [T, N, S+Q]
        turns = self.turns[(uniforms(2, ways) * 4).long()]  # [T, N, 784]
        pixels = self.images[classes[..., None], drawings].flatten(-2)  # [T, N, S+Q, 784]
        pixels = pixels.gather(-1, turns[:, :, None].expand_as(pixels)).to(self.dtype) / 255
        return classification_batch(pixels.unflatten(-1, self.input_shape), shots)

    def identity(self) -> dict[str, str]:
        return {"name": "omniglot", "digest": self.digest[:36]}
