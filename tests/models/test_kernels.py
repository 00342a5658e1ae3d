"""The Triton kernels, on a machine without a GPU in Triton's interpreter."""
from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from processes import ROOT


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is for Linux")
def test_kernels_give_what_torch_gives():
    """In a process of their own: what imports Triton first decides for all whether it interprets."""
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernel_cases.py"], cwd=ROOT,
                            env=os.environ | interpreted, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
