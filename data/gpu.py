"""Where our Triton kernels can run."""
from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from torch import Tensor


def kernels(name: str, x: Tensor) -> ModuleType | None:
    """The module `name` of kernels, where x is on a GPU and Triton is installed; torch's operations do the same elsewhere."""
    return import_module(name) if x.is_cuda and _installed() else None


@cache
def _installed() -> bool:
    return find_spec("triton") is not None
