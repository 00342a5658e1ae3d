"""What is said to the user, and the one exception that means: the user's input is wrong."""
from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(Exception):
    """One line that names the key or file, its value, the rule it breaks and the remedy. The command line prints it
    and exits with code 2."""


class Failure(Exception):
    """Something outside went wrong, in one line, which the command line prints; it exits with code 1."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError inside says which file it was about: those of a write, as on a full disk, do not by themselves."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def say(line: str) -> None:
    """A line for the user, on stderr."""
    print(f"alpha-maml: {line}", file=sys.stderr, flush=True)
