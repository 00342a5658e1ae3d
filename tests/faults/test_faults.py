"""The fault harness at the length that CI affords, and nodes that leave and return."""
from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from conftest import apart, newest_state
from harness import GAP, PROBLEM, Nodes, campaign, kill_node, local_job

from alpha_maml.trainer.runs.folder import read_json

KILLS = int(os.environ.get("FAULTS", 20))


@pytest.fixture(autouse=True)
def namespaces():
    if os.geteuid() != 0 or not shutil.which("ip"):
        reason = "network namespaces need root and Debian's iproute2"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)


def test_whatever_is_killed_the_run_finishes_with_the_same_bits(tmp_path: Path, record_property):
    lines: list[str] = []
    identical = campaign(KILLS, 0, tmp_path, lines.append)
    record_property("report", "\n".join(lines))
    assert len(lines) == KILLS + 1 and identical == [True, True]


def test_a_node_leaves_and_returns(tmp_path: Path):
    """Elastic, one to two nodes: training goes on alone, then with both; the tasks are the same throughout."""
    folder, quiet = tmp_path / "run", tmp_path / "quiet"
    iterations = ("--precision", "float64", "--iterations", str(30 * GAP), "--run_dir")
    worlds = []

    def world() -> int:
        worlds.append(read_json(folder / "status.json")["world_size"])
        return worlds[-1]

    with Nodes() as nodes:
        job = nodes.job(folder, (*PROBLEM, *iterations, str(folder)), "1:2")
        try:
            job.wait_for(GAP)
            while world() != 2:  # the first may have begun alone
                job.wait_for(job.step() + 10)
            command, job.commands[1] = job.commands[1], ["sleep", "1000000"]  # nobody starts this node again
            kill_node(1)
            before = job.step()
            job.wait_for(before + 50)
            assert world() == 1, "did not go on alone"
            job.commands[1] = command
            job.agents[1].kill()
            job.agents[1].wait()
            while world() != 2:
                job.wait_for(job.step() + 10)
            job.wait_for(10**9, 300)
        finally:
            job.end()
    job = local_job(quiet, (*PROBLEM, *iterations, str(quiet)))
    job.wait_for(10**9, 300)
    job.end()
    assert [w for i, w in enumerate(worlds) if i == 0 or worlds[i - 1] != w][-3:] == [2, 1, 2]
    assert apart(newest_state(folder), newest_state(quiet), "theta.") < 1e-6, "not the same tasks"
    last, loss = (read_json(x / "summary.json")["loss_last"] for x in (folder, quiet))
    assert last == pytest.approx(loss, rel=1e-6)
