"""Folders of small generated images, and images that lie."""
from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from alpha_maml.data.store import Class, File


def picture(path: Path, seed: int, side: int = 16, colour: tuple[int, ...] | None = None) -> Path:
    """Noise about a colour, which the seed gives or `colour`."""
    rng = np.random.default_rng(seed)
    base = np.array(colour if colour else rng.integers(40, 215, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(base + rng.normal(0, 8, (side, side, 3)), 0, 255).astype(np.uint8)).save(path)
    return path


def class_folders(root: Path, classes: int, images: int, side: int = 16) -> Path:
    """root/c000/0.png and so on; each class has a colour of its own."""
    for c in range(classes):
        colour = tuple(int(x) for x in np.random.default_rng(c).integers(40, 215, 3))
        for i in range(images):
            picture(root / f"c{c:03d}" / f"{i}.png", c * images + i, side, colour)
    return root


def chunk(kind: bytes, content: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def claiming(width: int, height: int, pixels: bytes = b"") -> bytes:
    """A PNG of that size by its header, whatever is in it."""
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b""))


def listing(root: Path) -> list[Class]:
    """Every folder of the root as a class of split train."""
    return [Class("train", folder.name, [File(f"{folder.name}/{f.name}", f.stat().st_size, f.stat().st_mtime_ns)
                                         for f in sorted(folder.iterdir())]) for folder in sorted(root.iterdir())]
