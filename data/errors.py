"""What is said to the user, and the one exception that means: the user's input is wrong."""
from __future__ import annotations

import sys


class InputError(Exception):
    """One line that names the key or file, its value, the rule it breaks and the remedy. The command line prints it
    and exits with code 2."""


def say(line: str) -> None:
    """A line for the user, on stderr."""
    print(f"alpha-maml: {line}", file=sys.stderr, flush=True)
