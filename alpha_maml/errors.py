"""What is said to the user, and the one exception that means: the user's input is wrong."""
from __future__ import annotations

import errno
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LONGEST = 2000  # characters of a line
MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO)  # no path or permission mends these
PASSWORD = re.compile(r"(?<=://)[^\s:/@]*:[^@]*@|(?<=[?&])password=[^\s&]*", re.IGNORECASE)  # in the address of a store


def one_line(text: str) -> str:
    """The text as one line of a terminal, whatever the names and values in it hold: what does not print stands as Python would
    write it, passwords are left out, and much too much is cut out of the middle."""
    text = PASSWORD.sub("***", text)
    shown = text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return shown if len(shown) <= LONGEST else f"{shown[:LONGEST // 2]} ... {shown[-LONGEST // 2:]}"


def first_line(error: Exception) -> str:
    """What an error says, its first line and not all of a long one; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


class InputError(Exception):
    """One line that names the key or file, its value, the rule it breaks and the remedy. The command line prints it
    and exits with code 2."""

    def __init__(self, line: str):
        super().__init__(one_line(line))


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
    print(f"alpha-maml: {one_line(line)}", file=sys.stderr, flush=True)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """What hinders the reading of files inside is an InputError about the key or option `what`, unless it is the machine."""
    try:
        yield
    except OSError as error:
        if error.errno in MACHINE:
            raise
        raise InputError(f"{what}: {error.filename or 'a file'} cannot be read ({error.strerror or error}); check the path and "
                         "its permissions") from None
