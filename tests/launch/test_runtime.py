"""Ranks, device and signals: what is left of them at the end."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from processes import ROOT, free_port

ENDED = """
import os, sys
from launch.cli import main
try:
    main(sys.argv[1:])
finally:
    print(*(open(f"/proc/self/task/{thread}/comm").read().strip() for thread in os.listdir("/proc/self/task")), sep=",")
"""


def test_no_thread_of_the_process_group_outlives_it(tmp_path: Path):
    """One that is about to free a tensor while Python ends aborts the process: a run that is finished would have failed."""
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    result = subprocess.run(
        [sys.executable, "-c", ENDED, "train", "--iterations", "2", "--task.batch", "2", "--evaluation.tasks", "2",
         "--tracking.uri", "disabled", "--run_dir", tmp_path / "run"],
        cwd=ROOT, env=os.environ | rank, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "gloo" not in result.stdout.splitlines()[-1]
