"""Parts by name: data sets, models, losses, outer optimisers and rules, ours and the user's own.

A registry maps a name to the place of a part, "package.module:Name", which is imported only when it is asked for: the command
line checks names without importing torch. One line adds a part, and an import path in the configuration needs not even that:

    >>> from alpha_maml.data import LOSSES
    >>> LOSSES.register("squared", "alpha_maml.data.losses.mean_squared_error:mean_squared_error")
    >>> LOSSES.find("squared").__name__
    'mean_squared_error'
"""
from __future__ import annotations

import importlib
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from alpha_maml.errors import InputError, one_line


class Registry:
    """The parts that one configuration key names.

    Args:
        key: the configuration key, which error messages begin with.
        kind: what stands behind an import path, "Class" or "function".
    """

    def __init__(self, key: str, kind: str = "Class"):
        self.key, self.kind = key, kind
        self.places: dict[str, str] = {}
        self.facts: dict[str, frozenset[str]] = {}

    def register(self, name: str, place: str, *facts: str) -> None:
        """Adds the part at `place`, "package.module:Name", with facts that the configuration is checked against."""
        self.places[name], self.facts[name] = place, frozenset(facts)

    def has(self, name: str, fact: str) -> bool:
        """Whether the fact was registered with the name; nothing is known of an import path."""
        return fact in self.facts.get(name, ())

    def check(self, name: str, where: str = "") -> None:
        """Raises InputError unless the name is registered, or is an import path; `where` it stands."""
        if ":" not in name and name not in self.places:
            raise InputError(f"{self.key}: {one_line(name)!r} must be {', '.join(self.places)} or package.module:{self.kind}; "
                             f"change it{f' ({where})' if where else ''}")

    def find(self, name: str) -> Any:
        """The part itself. Raises InputError where it cannot be imported, whatever the import raises."""
        self.check(name)
        return imported(self.key, self.places.get(name, name), self.kind)


def imported(key: str, place: str, kind: str = "Class") -> Any:
    """What stands at `place`, "package.module:Name". Raises InputError, which names the `key`."""
    module, _, attribute = place.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:  # as `python -m` has it; last, so that it hides nothing
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # importing runs the user's code
        raise InputError(f"{key}: {place!r} cannot be imported ({reason(error)}); it must be package.module:{kind}, in the "
                         "working directory or on PYTHONPATH") from None


def reason(error: Exception) -> str:
    """Type and first sentence of an error, and where in the user's own code it arose."""
    said = (str(error).strip().splitlines() or [""])[0].split(". ")[0][:160]
    return f"{type(error).__name__}: {said}{place(error)}"


def place(error: Exception) -> str:
    """The innermost line of the user's own code, as ", at file.py:3"."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if _is_the_users(f.filename)]
    return f", at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""


def _is_the_users(filename: str) -> bool:
    """Whether a frame's file is neither ours, nor torch's, nor Python's."""
    others = [Path(importlib.__file__).parent, *(Path(sys.modules[name].__file__ or "").parent for name in ("torch",)
                                                 if name in sys.modules)]
    ours = [folder for folder in Path(__file__).parent.iterdir() if folder.is_dir()]
    inside = [Path(__file__).parent, *others, *(folder.resolve() for folder in ours)]
    return not filename.startswith(("<", *(f"{folder}{os.sep}" for folder in inside)))
