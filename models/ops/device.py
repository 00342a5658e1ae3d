"""Where Triton kernels run, and the one constant that all codes share."""
from __future__ import annotations

from functools import cache
from importlib.util import find_spec

from torch import Tensor

EPS = 1e-5  # added to a variance by batch normalisation: torch's


def runs_triton(x: Tensor) -> bool:
    """x is on a GPU, and Triton is installed; elsewhere torch's operations do the same."""
    return x.is_cuda and _installed()


@cache
def _installed() -> bool:
    return find_spec("triton") is not None
