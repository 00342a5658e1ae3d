"""Every page of docs/ that ends in "## Try it": the commands there run as they stand."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import OMNIGLOT
from processes import ROOT


def commands(page: Path) -> str:
    """The indented lines under the page's last heading, "## Try it"; none where it has no such heading."""
    _, found, section = page.read_text().rpartition("\n## Try it\n")
    return "\n".join(line[4:] for line in section.splitlines() if line.startswith("    ")) if found else ""


PAGES = {page.name: commands(page) for page in sorted((ROOT / "docs").glob("*.md")) if commands(page)}


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(page: str, tmp_path: Path, request: pytest.FixtureRequest):
    """From the repository's root, with $TMP an empty folder and $OMNIGLOT_ROOT the folder of Omniglot's archives."""
    if "$OMNIGLOT_ROOT" in PAGES[page]:
        request.getfixturevalue("omniglot_root")
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", PAGES[page]], cwd=ROOT, capture_output=True, text=True, timeout=600,
        env=os.environ | {"TMP": str(tmp_path), "OMNIGLOT_ROOT": str(OMNIGLOT.resolve()), "PYTHONPATH": str(ROOT),
                          "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})
    assert result.returncode == 0, result.stdout + result.stderr
