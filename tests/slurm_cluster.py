"""A real SLURM of two virtual nodes for the tests, and a model that takes its time."""
from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from processes import ROOT, free_port, succeed, wrong
from torch import nn

SCRIPT = Path(os.environ.get("SLURM_CLUSTER_SCRIPT", ROOT / "../shared/slurm/start_slurm.sh"))
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"}


class Paced(nn.Module):
    """A small regression that sleeps `pause` seconds a pass: a run that lasts, without the processors it would take."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int, pause: float):
        super().__init__()
        self.pause = pause
        self.layers = nn.Sequential(nn.Linear(input_shape[0], 8), nn.Tanh(), nn.Linear(8, outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.pause)
        return self.layers(x)


def absent() -> str | None:
    """Why no cluster can be started here, or None."""
    if not SCRIPT.is_file():
        return f"{SCRIPT} does not exist; name the script that starts a cluster in SLURM_CLUSTER_SCRIPT"
    missing = [name for name in ("slurmctld", "slurmd", "sbatch", "munged", "ip") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not found; install slurmctld, slurmd, slurm-client, munge and iproute2"
    return None if os.geteuid() == 0 else "a cluster of virtual nodes needs root"


def until(condition: Callable[[], object], seconds: float, what: str) -> object:
    """The condition's first true value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.25)
    return value


def free_subnet() -> str:
    """The first three numbers of a /24 that no interface of this machine has: what an earlier, killed cluster left behind must
    not answer for this one's nodes."""
    taken = subprocess.run(["ip", "-o", "-4", "addr"], capture_output=True, text=True, check=True).stdout
    return next(subnet for subnet in (f"10.213.{i}" for i in range(7, 256)) if f" {subnet}." not in taken)


class Cluster:
    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {"SLURM_CONF": f"{folder}/etc/slurm.conf", "PYTHONPATH": str(ROOT / "tests")}
        try:
            self._script("start", "--nodes", "2", "--gpus", "2", "--ctld-port", str(free_port()), "--subnet", free_subnet())
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        self._script("stop")

    def _script(self, verb: str, *options: str) -> None:
        result = subprocess.run([SCRIPT, verb, self.folder, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                text=True, timeout=100)
        assert result.returncode == 0, result.stdout

    def call(self, *words: object, check: bool = True) -> str:
        """What a command of SLURM prints."""
        result = subprocess.run([str(w) for w in words], capture_output=True, text=True, timeout=30,
                                env=os.environ | self.environment)
        assert result.returncode == 0 or not check, result.stderr
        return result.stdout

    def submit(self, *arguments: object) -> str:
        """The id of the job that `alpha-maml slurm` submits."""
        output = succeed("slurm", *arguments, **self.environment).stdout
        return re.match(r"job (\d+)", output)[1]

    def wrong(self, *arguments: object) -> str:
        """The one line that `alpha-maml slurm` with wrong input leaves."""
        return wrong("slurm", *arguments, **self.environment)

    def show(self, job: str) -> list[dict[str, str]]:
        """What SLURM knows of a job: one mapping, or one for each task of an array."""
        lines = self.call("scontrol", "--oneliner", "show", "job", job).splitlines()
        return [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]

    def done(self, job: str, seconds: float = 90) -> list[dict[str, str]]:
        """Waits for the end of a job, which must be a good one."""
        until(lambda: all(f["JobState"] in ENDED for f in self.show(job)), seconds, f"job {job}'s end")
        facts = self.show(job)
        for f in facts:
            assert f["JobState"] == "COMPLETED", f"{f['JobState']}\n{Path(f['StdOut']).read_text()}"
        return facts
