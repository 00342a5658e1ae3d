"""`from trainer import load`: a trained run as a learner with fit and predict (trainer.learner)."""
from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "load":  # imports torch, which the command line's --help need not wait for
        from trainer.learner import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
