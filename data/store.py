"""Images decoded once: a file of bytes that every rank of a node maps into its memory, and an index of what is in it.

A store is a folder of the cache, named by a digest of the files that went into it. It is written aside, in chunks with a
journal: a process that is killed leaves whole chunks, and the next one goes on behind them. Under its final name it is whole.
"""
from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from alpha_maml.data import images
from alpha_maml.errors import InputError, one_line, say

CHUNK = 256  # images between two lines of the journal
CHECKED = 2**28  # bytes whose checksums are compared when a store is opened: all of a small one, a part of a large one
ODD = 0.05  # of the images at most have another size than the rest where that is worth a word
IMAGES, JOURNAL, INDEX, LEFT_OUT = "images.u8", "journal.jsonl", "index.json", "left_out.txt"
VERSION = 1  # of the format and of the decoding
Note = tuple[str, str, str]  # what is wrong with a file or folder: its path below the root, the kind, in words


class File(NamedTuple):
    """An image file as it was found: its path below the root, bytes, and time of change in nanoseconds."""

    path: str
    size: int
    changed: int


class Class(NamedTuple):
    split: str
    name: str
    files: list[File]


class Store(NamedTuple):
    images: np.memmap  # uint8 [n, C, side, side], class after class
    classes: list[tuple[str, str, int]]  # split, name and number of images of each, in the order of the images
    notes: list[Note]
    digest: str  # SHA-256 of all this
    folder: Path


def load(root: Path, classes: list[Class], notes: list[Note], side: int, colour: bool, cache: Path) -> Store:
    """The images of `classes` under `root`, square and in colour or grey, from the cache, or decoded into it. Ranks of one
    node, and several runs, share one store: the first decodes, names on stderr what is wrong with each file (`notes` is what
    is known already), and the others wait.

    Raises InputError where no image can be decoded, or the cache cannot hold them.
    """
    shape = (3 if colour else 1, side, side)
    key = hashlib.sha256(repr((VERSION, str(root.resolve()), shape, classes)).encode("utf-8", "surrogateescape"))
    folder = cache / f"folder-{key.hexdigest()[:16]}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            store = _opened(folder, shape)
            if store is None:
                if folder.exists():
                    say(f"{folder} is damaged; its images are decoded again")
                    shutil.rmtree(folder)
                store = _made(root, classes, notes, shape, folder)
            return store
    except OSError as error:
        raise InputError(f"data.root: the decoded images of {root} cannot be kept in {cache} ({error.strerror or error}); make "
                         "it writable, or choose another place by XDG_CACHE_HOME") from None


def _opened(folder: Path, shape: tuple[int, int, int]) -> Store | None:
    """The store, or None where there is none or it is damaged."""
    try:
        sealed = json.loads((folder / INDEX).read_text())
        index = sealed["index"]
        if sealed["digest"] != _digest(index):
            return None
        count = sum(number for _, _, number in index["classes"])
        if (folder / IMAGES).stat().st_size != count * int(np.prod(shape)):
            return None
        content = np.memmap(folder / IMAGES, np.uint8, "r", shape=(count, *shape))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    data, offset = content.reshape(-1), 0
    every = -(-len(data) // CHECKED)  # of so many chunks one is read
    for number, (size, checksum) in enumerate(index["chunks"]):
        if number % every == 0 and zlib.crc32(data[offset : offset + size].data) != checksum:
            return None
        offset += size
    return Store(content, [tuple(c) for c in index["classes"]], [tuple(n) for n in index["notes"]], sealed["digest"], folder)


def _made(root: Path, classes: list[Class], notes: list[Note], shape: tuple[int, int, int], folder: Path) -> Store:
    """Decodes, and puts the store under its final name."""
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(exist_ok=True)
    files = [file.path for c in classes for file in c.files]
    needed, free = len(files) * int(np.prod(shape)), shutil.disk_usage(partial).free
    held = (partial / IMAGES).stat().st_size if (partial / IMAGES).exists() else 0
    if needed - held > free:
        raise InputError(f"data.size: {shape[1]} makes {needed / 1e9:.1f} GB of {len(files)} images and {folder.parent} has "
                         f"{free / 1e9:.1f} GB free; lower it, make room, or choose another place by XDG_CACHE_HOME")
    chunks = _decoded(root, files, shape, partial)
    results = [result for chunk in chunks for result in chunk["results"]]
    notes = notes + [(path, "broken images", f"cannot be decoded ({result}); it is left out")
                     for path, result in zip(files, results) if isinstance(result, str)] + _odd_sizes(files, results)
    lines = [f"{root / path} {words}" for path, _, words in notes]
    for line in lines:
        say(f"data.root: {line}")
    remaining = iter(results)
    counts = [sum(not isinstance(next(remaining), str) for _ in c.files) for c in classes]
    if not any(counts):
        raise InputError(f"data.root: {root} holds no image that can be decoded ({', '.join(images.SUFFIXES)}); give a folder "
                         "that does, see docs/data.md")
    index = {"classes": [(c.split, c.name, count) for c, count in zip(classes, counts)], "notes": notes,
             "chunks": [(chunk["bytes"], chunk["checksum"]) for chunk in chunks]}
    (partial / LEFT_OUT).write_text("".join(f"{one_line(line)}\n" for line in lines), "utf-8")
    (partial / INDEX).write_text(json.dumps({"index": index, "digest": _digest(index)}))
    for name in (IMAGES, INDEX):
        with (partial / name).open("rb") as file:
            os.fsync(file.fileno())
    (partial / JOURNAL).unlink()
    partial.rename(folder)
    store = _opened(folder, shape)
    if store is None:
        raise OSError(f"what was written to {folder} is not what is read from it")
    return store


def _digest(index: dict) -> str:
    return hashlib.sha256(json.dumps(index).encode()).hexdigest()


def _odd_sizes(files: list[str], results: list) -> list[Note]:
    """Notes on the few images whose size is not that of nearly all others."""
    sizes = Counter(tuple(result) for result in results if not isinstance(result, str))
    (width, height), usual = max(sizes.items(), key=lambda item: item[1], default=((0, 0), 0))
    if usual < (1 - ODD) * sizes.total():
        return []
    return [(path, "images of another size", f"has {result[0]} x {result[1]} pixels, the others {width} x {height}; it "
             "is resized like them") for path, result in zip(files, results)
            if not isinstance(result, str) and tuple(result) != (width, height)]


def _decoded(root: Path, files: list[str], shape: tuple[int, int, int], partial: Path) -> list[dict]:
    """Fills the images of `partial` and returns its journal: a chunk's bytes, their checksum, and for each of its files the
    image's width and height, or why it has none."""

    def decode(path: str) -> tuple[np.ndarray | None, tuple[int, int] | str]:
        try:
            return images.read(root / path, lambda image: (images.resized(image, shape[1], shape[0] == 3), image.size))
        except ValueError as error:
            return None, str(error)

    chunks = _whole_chunks(partial)
    done = sum(len(chunk["results"]) for chunk in chunks)
    say(f"data.root: decoding {len(files) - done} images of {root} into {partial.parent}, once")
    with (tqdm(total=len(files), initial=done, unit="image", disable=None, dynamic_ncols=True) as bar,
          (partial / IMAGES).open("ab") as content, (partial / JOURNAL).open("a") as journal,
          ThreadPoolExecutor(os.cpu_count()) as pool, warnings.catch_warnings()):
        warnings.simplefilter("ignore")  # Pillow's, of images that it decodes all the same
        for start in range(done, len(files), CHUNK):
            decoded = list(pool.map(decode, files[start : start + CHUNK]))
            data = b"".join(pixels.tobytes() for pixels, _ in decoded if pixels is not None)
            chunks.append({"bytes": len(data), "checksum": zlib.crc32(data), "results": [result for _, result in decoded]})
            content.write(data)
            content.flush()
            journal.write(json.dumps(chunks[-1]) + "\n")
            journal.flush()
            bar.update(len(decoded))
    return chunks


def _whole_chunks(partial: Path) -> list[dict]:
    """The journal up to the first chunk that is not whole; what stands behind it is cut off."""
    chunks = []
    for name in (IMAGES, JOURNAL):
        (partial / name).touch()
    with (partial / IMAGES).open("r+b") as content:
        for chunk in _lines(partial / JOURNAL):
            data = content.read(chunk["bytes"])
            if len(data) != chunk["bytes"] or zlib.crc32(data) != chunk["checksum"]:
                break
            chunks.append(chunk)
        content.truncate(sum(chunk["bytes"] for chunk in chunks))
    (partial / JOURNAL).write_text("".join(json.dumps(chunk) + "\n" for chunk in chunks))
    return chunks


def _lines(journal: Path) -> Iterator[dict]:
    for line in journal.read_bytes().splitlines():
        try:
            chunk = json.loads(line)
            if type(chunk["bytes"]) is not int or chunk["bytes"] < 0 or not all(map(_is_result, chunk["results"])):
                return
        except (ValueError, TypeError, KeyError):  # cut off by a kill
            return
        yield chunk


def _is_result(result: Any) -> bool:
    """Whether it is an image's width and height, or why there is none."""
    return isinstance(result, str) or isinstance(result, list) and [type(size) for size in result] == [int, int]
