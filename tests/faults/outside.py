"""What lies outside a training fails while it runs: the tracker, the disk, the terminal, the clock, the data, a slow rank.

Each fault is a function that injects it into real processes and asserts how they come out of it. Afterwards the same command
goes on, and ends with the bits of a run that nobody disturbed. Needs root, for disks of their own (tmpfs).
"""
from __future__ import annotations

import errno
import http.server
import os
import pty
import random
import resource
import signal
import socket
import sqlite3
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
from conftest import same_bits
from processes import free_port
from victim import EVERY, GRACE, ITERATIONS, Run, backwards, on_a_terminal, terminal

from alpha_maml.trainer.runs.folder import read_json
from alpha_maml.trainer.runs.metrics import METRICS, read_metrics
from alpha_maml.trainer.tracking.state import read_state

QUIET, ENDLESS = ("--tracking.uri", "disabled", "--iterations", str(ITERATIONS)), ("--iterations", "1000000")
PATIENCE = 1  # tracking.timeout of these runs, seconds


class Outside:
    """The faults, drawn from `chance`, in `folder`. `lock_seconds`: how long a database is locked."""

    def __init__(self, folder: Path, chance: random.Random, lock_seconds: float):
        self.folder, self.chance, self.lock_seconds, self.number = folder, chance, lock_seconds, 0
        self.undisturbed = {}
        for ranks in (0, 2):
            with Run(folder / f"undisturbed{ranks}", *QUIET, ranks=ranks) as run:
                assert set(run.codes(60)) == {0}, run.text()
                self.undisturbed[ranks] = run.folder

    def place(self) -> Path:
        self.number += 1
        return self.folder / f"run{self.number}"

    def goes_on(self, folder: Path, ranks: int) -> None:
        """The same command again finishes, with the bits of the undisturbed run."""
        with Run(folder, *QUIET, ranks=ranks) as run:
            assert set(run.codes(60)) == {0}, run.text()
            run.is_saved()
        assert same_bits(folder, self.undisturbed[ranks])

    @contextmanager
    def disk(self, size: str = "4m", options: str = "") -> Iterator[Path]:
        """A disk of its own."""
        place = self.place()
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}{options}", "tmpfs", str(place)], check=True)
        try:
            yield place
        finally:
            subprocess.run(["umount", "-l", str(place)], check=True)

    # The tracker. -----------------------------------------------------------------------------------------------------------

    def tracker(self, uri: str) -> None:
        """A run whose tracker is in trouble: ends within its time, whole, says one line, and no iteration waited."""
        with Run(self.place(), *ENDLESS, "--tracking.uri", uri, "--tracking.timeout", str(PATIENCE)) as run:
            log = run.folder / "tracking.log"
            run.wait_for(lambda: log.exists() and "again in" in log.read_text())
            run.reach(run.step() + self.chance.randrange(50, 200))
            run.signal(signal.SIGTERM)
            assert run.codes(PATIENCE + GRACE) == [143]
            run.is_saved()
            (line,) = run.lines()
            assert line.startswith("alpha-maml: MLflow lacks the last ") and "alpha-maml sync" in line
            slowest = max(line["perf/step_ms"] for line in read_metrics(run.folder))
            assert slowest < 2000, f"an iteration took {slowest} ms"

    def mlflow_is_away(self) -> str:
        self.tracker(f"http://127.0.0.1:{free_port()}")
        return "trains on at its pace; one line names the unsent and the command that ships them"

    def mlflow_hangs(self) -> str:
        with socket.create_server(("127.0.0.1", 0)) as server:  # the system accepts for it
            self.tracker(f"http://127.0.0.1:{server.getsockname()[1]}")
        return "as above, and the end waits for no more than tracking.timeout"

    def mlflow_answers(self, status: int) -> str:
        class Answer(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_error(status)

            do_POST = do_PATCH = do_PUT = do_GET

            def log_message(self, *_: object) -> None:
                pass

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            self.tracker(f"http://127.0.0.1:{server.server_port}")
            server.shutdown()
        return "as above"

    def mlflow_answers_500(self) -> str:
        return self.mlflow_answers(500)

    def mlflow_answers_403(self) -> str:
        return self.mlflow_answers(403)

    def sqlite_is_locked(self) -> str:
        uri = f"sqlite:///{self.folder}/locked.db"
        with Run(self.place(), *ENDLESS, "--tracking.uri", uri, "--tracking.timeout", "60") as run:
            run.wait_for(lambda: read_state(run.folder).get("offset"))
            with closing(sqlite3.connect(self.folder / "locked.db", timeout=60, isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                before = run.step()
                time.sleep(self.lock_seconds)
                assert run.step() > before + 10 * self.lock_seconds, "training waits for the database"
                other.execute("ROLLBACK")
            run.signal(signal.SIGTERM)
            assert run.codes(60 + GRACE) == [143] and run.lines() == [], run.text()
            run.is_saved()
            state = read_state(run.folder)
            assert state["complete"] and state["offset"] == (run.folder / METRICS).stat().st_size
        return "trains on; once the lock is gone every point is in the store"

    # The disk. --------------------------------------------------------------------------------------------------------------

    def full_disk(self, left: int, file: str) -> str:
        """Fills the disk up to `left` bytes at some moment; the run ends and names the file, and goes on with room."""
        ranks = self.chance.choice((0, 2))
        with self.disk() as disk:
            with Run(disk / "run", *QUIET, ranks=ranks) as run:
                run.reach(self.chance.randrange(EVERY + 1, ITERATIONS // 4))
                filler = disk / "filler"
                with filler.open("wb") as rest:
                    while (free := os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize) > left:
                        try:
                            os.write(rest.fileno(), bytes(min(4096, free - left)))
                        except OSError as error:
                            assert error.errno == errno.ENOSPC
                            break
                assert set(run.codes(60)) == {1}, run.text()
                named = [line for line in run.lines() if f"{run.folder}/{file}" in line and "No space left on device" in line]
                assert len(named) == 1 and len(run.lines()) == max(ranks, 1), run.text()
                assert not list((run.folder / "checkpoints").glob(".*")), "takes room for nothing"
                filler.unlink()
                run.is_whole()
            self.goes_on(disk / "run", ranks)
        return "exit 1, one line names the file; with room the same command goes on, the same bits"

    def disk_full_while_spooling(self) -> str:
        return self.full_disk(0, "")  # a checkpoint that is due just then may be the first to meet it

    def disk_full_while_saving(self) -> str:
        return self.full_disk(24 * 1024, "checkpoints/")

    def read_only_folder(self) -> str:
        with self.disk(options=",ro") as disk, Run(disk / "run", *QUIET, log=self.folder / "read_only.log") as run:
            assert run.codes() == [2], run.text()
            (line,) = run.lines()
            assert "cannot be written (Read-only file system); choose another run_dir" in line
        return "exit 2, one line"

    # The process. -----------------------------------------------------------------------------------------------------------

    def disturbed(self, run: Run) -> None:
        run.reach(self.chance.randrange(10, ITERATIONS // 2))

    def clock_goes_backwards(self) -> str:
        ranks = self.chance.choice((0, 2))
        with Run(self.place(), *QUIET, ranks=ranks, target=backwards) as run:
            assert set(run.codes(60)) == {0} and run.lines() == [], run.text()
            times = [line["timestamp"] for line in read_metrics(run.folder)]
            assert min(b - a for a, b in zip(times, times[1:])) < -3.5e6, "the clock never went back"
            assert 0 < read_json(run.folder / "summary.json")["seconds"] < 60
            self.goes_on(run.folder, ranks)
        return "finishes, the same bits, durations right"

    def no_more_files(self) -> str:
        with Run(self.place(), *QUIET) as run:
            self.disturbed(run)
            resource.prlimit(run.processes[0].pid, resource.RLIMIT_NOFILE, (4, 4))  # as many as it has, at least
            assert run.codes() == [1], run.text()
            (line,) = run.lines()
            assert "Too many open files" in line
            run.is_whole()
            self.goes_on(run.folder, 0)
        return "exit 1, one line; the same command goes on, the same bits"

    def terminal_is_closed(self) -> str:
        master, slave = pty.openpty()
        with Run(self.place(), *QUIET, "--iterations", "1000000", target=on_a_terminal) as run:
            run.log.symlink_to(os.ttyname(slave))
            closing = threading.Event()
            threading.Thread(target=terminal, args=(master, slave, closing), daemon=True).start()
            self.disturbed(run)
            closing.set()
            assert run.codes() == [128 + signal.SIGHUP]
            run.log.unlink()
            run.is_saved()
        return "the iteration is finished and saved; exit 129"

    def ctrl_c(self) -> str:
        ranks = self.chance.choice((0, 2))
        with Run(self.place(), *QUIET, "--iterations", "1000000", ranks=ranks) as run:
            self.disturbed(run)
            run.signal(signal.SIGINT)
            assert set(run.codes()) == {130} and run.lines() == [], run.text()
            run.is_saved()
        return "the iteration is finished and saved; exit 130"

    def ctrl_c_twice(self) -> str:
        """The first saves and then waits for a tracker that hangs; the second does not wait."""
        with socket.create_server(("127.0.0.1", 0)) as server, Run(
                self.place(), *ENDLESS, "--tracking.uri", f"http://127.0.0.1:{server.getsockname()[1]}", "--tracking.timeout",
                "100") as run:
            self.disturbed(run)
            run.signal(signal.SIGINT)
            run.wait_for(lambda: read_json(run.folder / "status.json")["status"] == "KILLED")
            run.signal(signal.SIGINT)
            assert run.codes(2) == [-signal.SIGINT]
            run.is_saved()
        return "ends at once; what was saved stands"

    def data_vanish(self) -> str:
        folder = self.place()
        folder.mkdir()
        np.save(folder / "x.npy", np.linspace(-3, 3, 50))
        ranks = self.chance.choice((0, 2))
        arguments = ("--data.name", "faulty:Curves", "--data.args", f"{{folder: {folder}}}")
        with Run(self.place(), *arguments, *QUIET, ranks=ranks) as run:
            self.disturbed(run)
            (folder / "x.npy").rename(folder / "gone.npy")
            assert set(run.codes(60)) == {1}, run.text()
            assert f"{folder}/x.npy: No such file or directory" in run.text() and len(run.lines()) <= max(ranks, 1)
            run.is_whole()
        return "exit 1, one line names the file"

    def slow_rank(self) -> str:
        """One of two ranks runs a tenth of the time."""
        with Run(self.place(), *QUIET, ranks=2) as run:
            self.disturbed(run)
            victim, end = self.chance.choice(run.processes), time.monotonic() + 3
            while victim.exitcode is None and time.monotonic() < end:
                os.kill(victim.pid, signal.SIGSTOP)
                time.sleep(0.045)
                os.kill(victim.pid, signal.SIGCONT)
                time.sleep(0.005)
            assert set(run.codes(60)) == {0} and run.lines() == [], run.text()
            self.goes_on(run.folder, 2)
        return "waits for it, finishes, the same bits"

    def rank_dies(self) -> str:
        """Without an agent that would start it again."""
        with Run(self.place(), *QUIET, ranks=2) as run:
            self.disturbed(run)
            victim = self.chance.randrange(2)
            run.processes[victim].kill()
            assert run.codes()[1 - victim] == 1, run.text()
            (line,) = run.lines()
            assert "another rank has ended" in line
            self.goes_on(run.folder, 2)
        return "the other ends with one line, exit 1; the same command goes on, the same bits"


FAULTS = ("mlflow_is_away", "mlflow_hangs", "mlflow_answers_500", "mlflow_answers_403", "sqlite_is_locked",
          "disk_full_while_spooling", "disk_full_while_saving", "read_only_folder", "clock_goes_backwards", "no_more_files",
          "terminal_is_closed", "ctrl_c", "ctrl_c_twice", "data_vanish", "slow_rank", "rank_dies")


def campaign(count: int, seed: int, say: Callable[[str], object], kinds: tuple[str, ...] = FAULTS,
             lock_seconds: float = 60) -> int:
    """`count` faults of these kinds, as often each, in a shuffled order; how many ended as stated. Says a table."""
    chance = random.Random(seed)
    kinds = [kinds[i % len(kinds)] for i in range(count)]
    chance.shuffle(kinds)
    injected, good, outcomes = Counter(kinds), Counter(), {}
    with tempfile.TemporaryDirectory() as folder:
        outside = Outside(Path(folder), chance, lock_seconds)
        for number, kind in enumerate(kinds, 1):
            begun = time.monotonic()
            try:
                outcomes[kind], result = getattr(outside, kind)(), "as stated"
                good[kind] += 1
            except Exception as error:  # whatever happens, the table is said
                result = f"NOT as stated: {type(error).__name__} {error}"
            say(f"{number:>4}  {kind:<26} {time.monotonic() - begun:5.1f} s  {result}")
    say("| injected | times | as stated | outcome |\n|---|---|---|---|")
    for kind in dict.fromkeys(k for k in FAULTS if k in injected):
        say(f"| {kind.replace('_', ' ')} | {injected[kind]} | {good[kind]} | {outcomes.get(kind, '')} |")
    say(f"{good.total()} of {count} outside faults as stated, seed {seed}")
    return good.total()
