"""What a user names as package.module:Class, and how what goes wrong in their code is said in one line."""
from __future__ import annotations

import importlib
import os
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from data.errors import InputError

OURS = Path(__file__).parents[1]
NOT_THE_USERS = (*(f"{Path(module.__file__).parent}{os.sep}" for module in (torch, importlib)), "<",
                 *(f"{OURS / folder}{os.sep}" for folder in ("data", "models")))


def imported(key: str, name: str) -> Callable:
    """The class at package.module:Class; raises InputError, which names the `key`, whatever importing it raises."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # importing runs the user's code
        raise InputError(f"{key}: {name!r} cannot be imported ({reason(error)}); it must be package.module:Class and on "
                         "PYTHONPATH") from None


def reason(error: Exception) -> str:
    """Type and first sentence of an error, and where in the user's own code it arose."""
    said = (str(error).strip().splitlines() or [""])[0].split(". ")[0][:160]
    return f"{type(error).__name__}: {said}{place(error)}"


def place(error: Exception) -> str:
    """The innermost line of the user's own code, as ", at file.py:3"."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(NOT_THE_USERS)]
    return f", at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
