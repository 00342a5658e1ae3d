"""The files of a run's folder: held by a lock, written whole, read with care. Plain files, written by rank 0."""
from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alpha_maml.errors import InputError, naming, reading


@contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Held by rank 0 for as long as the run lives, so that a second job on the folder is turned away (InputError)."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / ".lock").open("a")
    except OSError as error:
        raise InputError(f"run_dir: {run_dir} cannot be written ({error.strerror}); choose another run_dir") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"run_dir: {run_dir} is in use by a running job; wait for it, or choose another run_dir") from None
        yield


def write_text(path: Path, text: str) -> None:
    """Atomically: a reader sees the old content or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with naming(path):
            partial.write_text(text)
            partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> dict:
    """The file's content, or {} where there is none; raises InputError where it is damaged."""
    with reading("run_dir"):
        if not path.is_file():
            return {}
        text = path.read_bytes()
    content = parsed_json(text)
    if not isinstance(content, dict):
        raise InputError(f"run_dir: {path} is damaged; restore it, or remove it")
    return content


def parsed_json(text: bytes) -> Any:
    """What it holds; None where it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
