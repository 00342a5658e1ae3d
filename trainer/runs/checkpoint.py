"""One checkpoint format for every engine and world size: a folder checkpoints/<iteration> of one safetensors file, which
torch.distributed.checkpoint reads too (HuggingFaceStorageReader), and a manifest of its SHA-256.

Written aside, synced, renamed: a folder under its final name is whole. The last good one is never touched by a save. The
format is safetensors because nothing in it is ever executed, and because its writer, unlike torch.distributed.checkpoint's,
does not hold the interpreter lock: training goes on meanwhile (tests/benchmarks/save.py).
"""
from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from alpha_maml.errors import InputError, naming
from alpha_maml.trainer.core.names import NEEDED, RATES

MANIFEST, TENSORS = "manifest.json", "state.safetensors"


class Saver:
    """Writes checkpoints of one run in a thread, one at a time, so that an iteration waits for none of them. The tensors
    handed over must not be written to again."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def save(self, iteration: int, state: dict[str, Tensor], about: dict) -> None:
        """Begins to write; waits only where the last save is not over yet. Raises what that one met."""
        self.wait()
        self.thread = threading.Thread(target=self._run, args=(iteration, state, about))
        self.thread.start()

    def _run(self, iteration: int, state: dict[str, Tensor], about: dict) -> None:
        try:
            save(self.folder, iteration, state, about, self.keep)
        except BaseException as error:  # raised where somebody can see it
            self.error = error

    def wait(self) -> None:
        """Returns once the last save is under its final name; raises what it met."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        self.check()

    def check(self) -> None:
        """Raises what a save has met so far, once."""
        if self.error is not None:
            error, self.error = self.error, None
            raise error


def save(folder: Path, iteration: int, state: dict[str, Tensor], about: dict, keep: int) -> Path:
    """Writes `state` (name -> tensor) and `about` (JSON) as `folder`/<iteration>, then prunes to the `keep` newest.

    Raises OSError where it cannot be written; then nothing of it is left.
    """
    final = folder / f"{iteration:08d}"
    partial = folder / f".{final.name}.{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with naming(final):
            partial.mkdir(parents=True)
            safetensors.torch.save_file({name: t.contiguous() for name, t in state.items()}, partial / TENSORS)
            manifest = {"iteration": iteration, "files": {TENSORS: _digest(partial / TENSORS)}, **about}
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
            shutil.copymode(partial / MANIFEST, partial / TENSORS)  # the user's umask: safetensors makes it the owner's alone
            for path in partial.iterdir():
                _sync(path)
            _sync(partial)
            shutil.rmtree(final, ignore_errors=True)  # only ever a damaged one: a good one is resumed from, not written again
            partial.rename(final)
            _sync(folder)
    except safetensors.SafetensorError as error:  # its writer's word for what the system said
        raise OSError(errno.EIO, str(error), str(final)) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for old in saved(folder)[:-keep]:
        shutil.rmtree(old)
    for aside in folder.glob(".*"):  # what a save that was killed left behind
        shutil.rmtree(aside, ignore_errors=True)
    return final


def saved(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("[0-9]*") if path.is_dir())


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and a line for each damaged one that was passed over.

    Raises InputError where there are checkpoints and all of them are damaged.
    """
    complaints = []
    for path in reversed(saved(folder)):
        fault = _fault(path)
        if fault is None:
            return path, complaints
        complaints.append(f"{path}: {fault}; using the one before it")
    if complaints:
        raise InputError(f"run_dir: every checkpoint under {folder} is damaged ({complaints[0].split(': ', 1)[1].split(';')[0]}"
                         "); restore one, or remove the folder to start again")
    return None, complaints


def facts(path: Path) -> dict:
    return json.loads((path / MANIFEST).read_text())


def read(path: Path) -> dict[str, Tensor]:
    """Every tensor of a whole checkpoint, by name, on the CPU."""
    return safetensors.torch.load_file(path / TENSORS)


def load(path: Path, state: dict[str, Tensor]) -> None:
    """Fills `state`'s tensors in place, on whatever device they are. Raises InputError where names or shapes differ; what only
    one of two rules for the rates remembers stays as it is."""
    held = {name: t for name, t in read(path).items() if name in state or not name.startswith(RATES)}
    own = {name for name in state.keys() - held.keys() if name.startswith(RATES) and name not in NEEDED}
    for name in sorted((held.keys() | state.keys()) - own):
        has, needs = (f"{list(t[name].shape)} of {t[name].dtype}" if name in t else None for t in (held, state))
        if has != needs:
            raise InputError(f"run_dir: {path} holds {name} with shape {has}, the configuration needs {needs}; use the "
                             "configuration it was trained with")
        state[name].copy_(held[name])


def _fault(path: Path) -> str | None:
    try:
        about = facts(path)
        if about["iteration"] != int(path.name):
            return f"{MANIFEST} is of another iteration"
        if _digest(path / TENSORS) != about["files"][TENSORS]:
            return f"{TENSORS} is damaged (its SHA-256 differs from the manifest's)"
        with safetensors.safe_open(path / TENSORS, "pt"):  # reads its header
            return None
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except safetensors.SafetensorError as error:
        return f"{TENSORS} is no safetensors file ({error})"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"{MANIFEST} is damaged ({type(error).__name__})"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else \
            hashlib.sha256(file.read()).hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

