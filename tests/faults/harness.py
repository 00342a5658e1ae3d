"""Kills trainings at random moments and measures how they come back.

usage: python tests/faults/harness.py [--kills 100] [--outside 100] [--seed 0]

One job runs under torchrun's agent and loses a worker, a worker in the middle of a save, its agent, or has a worker stopped
(SIGSTOP). A second job runs on two nodes, network namespaces with addresses of their own, and loses a whole node. Whatever
of a job's agents has ended is started again, as a scheduler would. At the end theta is compared, bit by bit, with that of an
undisturbed run. Before that, outside.py lets the tracker, the disk and the rest of the outside fail.
"""
from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import outside
import psutil
from conftest import same_bits
from processes import ROOT
from victim import last_line

from alpha_maml.trainer.runs.metrics import METRICS

GAP = 60  # iterations between kills
PROBLEM = ("train", "--task.batch", "4", "--task.shots", "5", "--task.queries", "5", "--tracking.uri", "disabled",
           "--evaluation.tasks", "8", "--checkpoint.every", "15", "--engine.timeout", "10")
LOCAL = ("worker", "worker", "worker in a save", "agent", "worker", "worker in a save", "stopped worker")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PYTHON": sys.executable}


class Job:
    """Agents that are started again when they end, until one of them ends well."""

    def __init__(self, folder: Path, commands: list[list[str]], environments: list[dict[str, str]]):
        self.folder, self.commands, self.environments = folder, commands, environments
        self.log = (folder.parent / f"{folder.name}.log").open("ab")
        self.agents = [self._start(i) for i in range(len(commands))]

    def _start(self, i: int) -> subprocess.Popen:
        return subprocess.Popen(self.commands[i], cwd=ROOT, env=self.environments[i], stdout=self.log, stderr=self.log,
                                start_new_session=True)

    def finished(self) -> bool:
        """Restarts what has ended badly; true once all agents have ended well."""
        if not any(agent.poll() == 0 for agent in self.agents):
            for i, agent in enumerate(self.agents):
                if agent.poll() is not None:
                    self.agents[i] = self._start(i)
        return all(agent.poll() == 0 for agent in self.agents)

    def workers(self) -> list[psutil.Process]:
        found = []
        for agent in self.agents:
            try:
                found += [p for p in psutil.Process(agent.pid).children(recursive=True) if "RANK" in p.environ()]
            except psutil.Error:
                pass
        return found

    def end(self) -> None:
        for agent in self.agents:
            for process in psutil.Process(agent.pid).children(recursive=True) if agent.poll() is None else []:
                process.kill()
            agent.kill()
            agent.wait()
        self.log.close()

    def step(self) -> int:
        """The last recorded iteration."""
        return last_line(self.folder / METRICS)[0]

    def wait_for(self, step: int, seconds: float = 120) -> float:
        """Waits for an iteration to be recorded; the seconds it took."""
        begun = time.monotonic()
        while self.step() < step:
            if time.monotonic() - begun > seconds:
                raise AssertionError(f"no iteration {step} after {seconds} s; see {self.log.name}")
            if self.finished():
                break
            time.sleep(0.02)
        return time.monotonic() - begun


def strike(job: Job, kind: str, chance: random.Random) -> str:
    """One fault; says whom it hit."""
    if kind == "agent":
        os.kill(job.agents[0].pid, signal.SIGKILL)
        return f"agent {job.agents[0].pid}"
    if kind == "node":
        number = chance.randrange(2)
        kill_node(number)
        return f"node {number}"
    if kind == "worker in a save":
        saves, end = job.folder / "checkpoints", time.monotonic() + 30
        while not list(saves.glob(".*")) and time.monotonic() < end:
            time.sleep(0.0005)
        victim = next(p for p in job.workers() if p.environ()["RANK"] == "0")
        victim.kill()
        return f"rank 0, {'saving' if list(saves.glob('.*')) else 'a moment after saving'}"
    time.sleep(0.3 * chance.random())
    victim = chance.choice(job.workers())
    rank = victim.environ()["RANK"]
    victim.send_signal(signal.SIGSTOP if kind == "stopped worker" else signal.SIGKILL)
    return f"rank {rank}"


def disturb(job: Job, kinds: list[str], chance: random.Random, say: Callable[[str], object]) -> list[float]:
    """Injects the faults one after the other and says each; the seconds from each to the next iteration."""
    seconds = []
    for number, kind in enumerate(kinds):
        job.wait_for(number * GAP + chance.randrange(15, GAP))
        while len(job.workers()) < 2:  # a group that is only just forming has nobody to hit
            job.finished()
            time.sleep(0.05)
        victim, begun = strike(job, kind, chance), time.monotonic()
        time.sleep(0.3)  # what was under way when it struck is not a recovery
        before = job.step()
        job.wait_for(before + 1)
        seconds.append(time.monotonic() - begun)
        say(f"{number + 1:>4}  {kind:<17} {victim:<32} at iteration {before:>6}  next after {seconds[-1]:5.1f} s")
    return seconds


def namespace(number: int) -> str:
    return f"alphamaml{number}"


def namespace_pids(number: int) -> list[int]:
    result = subprocess.run(["ip", "netns", "pids", namespace(number)], capture_output=True, text=True)
    return [int(pid) for pid in result.stdout.split()]


def kill_node(number: int) -> None:
    for pid in namespace_pids(number):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


class Nodes:
    """Two nodes on one machine: network namespaces with a cable between them. Needs root."""

    def __enter__(self) -> Nodes:
        self.__exit__()
        for number in range(2):
            subprocess.run(["ip", "netns", "add", namespace(number)], check=True)
        subprocess.run(["ip", "link", "add", "cable", "netns", namespace(0), "type", "veth", "peer", "name", "cable", "netns",
                        namespace(1)], check=True)
        for number in range(2):
            for words in (("addr", "add", f"10.214.9.{number + 1}/24", "dev", "cable"), ("link", "set", "cable", "up"),
                          ("link", "set", "lo", "up")):
                subprocess.run(["ip", "-n", namespace(number), *words], check=True)
        return self

    def __exit__(self, *_: object) -> None:
        for number in range(2):
            kill_node(number)
            subprocess.run(["ip", "netns", "del", namespace(number)], capture_output=True)

    def job(self, folder: Path, arguments: tuple[str, ...], nodes: str) -> Job:
        commands, environments = [], []
        for number in range(2):
            # A host name of its own, as a node has.
            commands.append(["ip", "netns", "exec", namespace(number), "unshare", "--uts", "bash", "-c",
                             f"hostname {namespace(number)}; exec bash launch/torchrun.sh \"$@\"", "_", *arguments])
            environments.append(ENVIRONMENT | {
                "HEAD": "10.214.9.1:29555", "NODES": nodes, "ADDRESS": f"10.214.9.{number + 1}", "IS_HEAD": str(1 - number),
                "RESTARTS": "1000", "GLOO_SOCKET_IFNAME": "cable", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"})
        return Job(folder, commands, environments)


def local_job(folder: Path, arguments: tuple[str, ...]) -> Job:
    return Job(folder, [[sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                         "--max-restarts=1000", "--shutdown-timeout=3", "-m", "alpha_maml", *arguments]], [ENVIRONMENT])


def campaign(kills: int, seed: int, folder: Path, say: Callable[[str], object]) -> list[bool]:
    """All faults of a run of this program, said line by line; whether each job's theta is that of the undisturbed one."""
    chance = random.Random(seed)
    node_kills = max(1, kills // 7)
    plan = {"one": [LOCAL[i % len(LOCAL)] for i in range(kills - node_kills)], "two": ["node"] * node_kills}
    chance.shuffle(plan["one"])
    seconds, identical = [], []
    with Nodes() as nodes:
        for name, kinds in plan.items():
            arguments = (*PROBLEM, "--iterations", str((len(kinds) + 1) * GAP), "--run_dir", str(folder / name))
            quiet = folder / f"{name}_undisturbed"
            job = local_job(quiet, (*arguments[:-1], str(quiet)))
            job.wait_for(10**9, 600)
            job.end()
            job = local_job(folder / name, arguments) if name == "one" else nodes.job(folder / name, arguments, "2")
            try:
                seconds += disturb(job, kinds, chance, say)
                job.wait_for(10**9, 300)
            finally:
                job.end()
            identical.append(same_bits(folder / name, quiet))
    say(f"{len(seconds)} faults, seed {seed}: theta bit-identical to the undisturbed runs: {identical}; next iteration after "
        f"{statistics.median(seconds):.1f} s (median), {max(seconds):.1f} s (longest)")
    return identical


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--outside", type=int, default=100, help="faults of outside.py")
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()
    say = partial(print, flush=True)
    good = settings.outside == 0 or outside.campaign(settings.outside, settings.seed, say) == settings.outside
    if settings.kills:
        with tempfile.TemporaryDirectory() as folder:
            good &= all(campaign(settings.kills, settings.seed, Path(folder), say))
    sys.exit(not good)


if __name__ == "__main__":
    main()
