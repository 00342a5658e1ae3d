"""Every program under examples/ runs, from an empty folder; each asserts what it shows. The docstrings' examples run too."""
from __future__ import annotations

import doctest
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LINES = 60
DOCUMENTED = ("alpha_maml.registry", "alpha_maml.rules", "alpha_maml.launch.api", "alpha_maml.launch.wrap",
              "alpha_maml.data.adapters", "alpha_maml.data.function", "alpha_maml.trainer.core.rules.adaptive")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path: Path, tmp_path: Path):
    assert len(path.read_text().splitlines()) < LINES
    code = f"import zoo, runpy, sys; sys.argv = [{str(path)!r}]; runpy.run_path({str(path)!r}, run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")})
    assert result.returncode == 0, result.stderr[-2000:]


def test_the_notebook_runs(tmp_path: Path):
    """Its cells in order, as Jupyter runs them, but for the display."""
    cells = json.loads((ROOT / "examples/notebook.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"})
    assert result.returncode == 0, result.stderr[-2000:]
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 15


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_examples_of_docstrings(name: str, tmp_path: Path):
    module = importlib.import_module(name)
    found = doctest.testmod(module, extraglobs={"torch": torch, "tmp": tmp_path}, optionflags=doctest.ELLIPSIS)
    assert found.attempted > 0 and found.failed == 0
