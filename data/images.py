"""Images from files: which are read, and what they become. Pillow is imported where one is read: a start that finds all images
decoded need not wait for it."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from alpha_maml.errors import first_line

if TYPE_CHECKING:
    from PIL import Image

PIXELS = 2**26  # of an image at most: more is not a photograph but a way to fill the memory
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF")  # by content, whatever the name: Pillow runs Ghostscript for PostScript
Read = TypeVar("Read")


def read(path: str | Path, prepare: Callable[[Image.Image], Read]) -> Read:
    """What `prepare` makes of the image in a file. Raises ValueError, in one line, where it cannot be decoded or has more
    than PIXELS pixels (seen from its header, before any is decoded)."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > PIXELS:
                raise ValueError(f"it has {image.width} x {image.height} pixels, at most {PIXELS} are read")
            return prepare(image)
    except UnidentifiedImageError:
        raise ValueError("it is no image") from None
    except Exception as error:  # Pillow raises a dozen kinds for a file that is no image
        raise ValueError(first_line(error)) from None


def resized(image: Image.Image, side: int, colour: bool) -> np.ndarray:
    """The whole image, upright as its EXIF tag says, made a square: uint8 [3, side, side], or [1, side, side] of grey."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode == "P":
        image = image.convert("RGBA")  # Pillow warns of a palette that is transparent otherwise
    pixels = np.asarray(image.convert("RGB" if colour else "L").resize((side, side), Image.Resampling.LANCZOS))
    return pixels.transpose(2, 0, 1) if colour else pixels[None]
