"""Where our Triton kernels run."""
from __future__ import annotations

from functools import cache
from importlib.util import find_spec

from torch import Tensor


def runs_kernels(x: Tensor) -> bool:
    """x is on a GPU, and Triton is installed; elsewhere torch's operations do the same."""
    return x.is_cuda and _installed()


@cache
def _installed() -> bool:
    return find_spec("triton") is not None
