"""Task distributions by name."""
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch takes seconds to import, and `--help` needs none of it
    import torch

    from data.tasks import TaskSource


def build(name: str, root: str | None, cache: Path, ways: int, shots: int, queries: int, seed: int, dtype: torch.dtype,
          device: torch.device) -> TaskSource:
    """The distribution `name` (sinusoid or omniglot); decoded files are kept in `cache`.

    Raises InputError where its files or the task's sizes are wrong.
    """
    if name == "sinusoid":
        from data.sinusoid import Sinusoid

        return Sinusoid(shots, queries, seed, dtype)
    from data.omniglot import Omniglot

    return Omniglot(root, cache, ways, shots, queries, seed, dtype, device)
