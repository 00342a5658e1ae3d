"""Image files: only images are read, and none of them runs or fills anything."""
from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from pictures import claiming
from PIL import Image

from alpha_maml.data import images
from alpha_maml.data.examples import read
from alpha_maml.errors import InputError


def prepared(image: Image.Image) -> np.ndarray:
    return images.resized(image, 8, True)


def test_no_program_is_run_for_a_file_that_asks_for_one(tmp_path: Path, monkeypatch):
    """Pillow would hand PostScript to Ghostscript, whatever the file is called: here one that leaves a trace."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/owned\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(ValueError, match="it is no image"):
        images.read(tmp_path / "x.png", prepared)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(("content", "words"), (
    (b"", "it is no image"), (b"text", "it is no image"), (claiming(20_000, 20_000), "400000000 pixels"),
    (claiming(9_000, 9_000), "9000 x 9000 pixels"), (claiming(8, 8), ".")))
def test_what_is_no_image_is_one_line_and_no_warning(content: bytes, words: str, tmp_path: Path):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(InputError, match=f"--support: .*x.png cannot be read as an image .*{words}"):
        read(tmp_path, "--support", prepared)


@pytest.mark.parametrize("kind", ("GIF", "PNG", "WEBP", "TIFF"))
def test_of_an_animation_the_first_image_counts_whatever_the_name(kind: str, tmp_path: Path):
    stream = io.BytesIO()
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    frames[0].save(stream, kind, save_all=True, append_images=frames[1:], lossless=True)
    (tmp_path / "x.jpg").write_bytes(stream.getvalue())
    found = images.read(tmp_path / "x.jpg", prepared)
    assert found.shape == (3, 8, 8) and (found[0] > 250).all() and (found[2] < 5).all()
