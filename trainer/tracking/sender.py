"""The process that ships a run's folder while it trains, and the same afterwards."""
from __future__ import annotations

import fcntl
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from alpha_maml.errors import InputError, say
from alpha_maml.trainer.config import build
from alpha_maml.trainer.runs.folder import lock
from alpha_maml.trainer.runs.metrics import read_lines
from alpha_maml.trainer.tracking.shipment import Shipment
from alpha_maml.trainer.tracking.state import read_state

POLL = 1.0  # seconds between looks at the folder
LONGEST_WAIT = 10.0  # seconds between attempts while the store does not answer


class Sender:
    """The process that ships a run's folder while it trains. Its end of a pipe closes when this process ends, however it
    ends, so that even a run that was killed gets its last points and its status."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        read_state(run_dir)  # raises InputError now, and not after the training
        with (run_dir / "tracking.log").open("ab") as log:
            # A session of its own: Ctrl-C at the terminal is for the trainer, and the sender outlives it by one shipment.
            command = [sys.executable, "-m", "alpha_maml.trainer.tracking.sender", str(run_dir)]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True)

    def close(self, timeout: float) -> str | None:
        """Lets it ship the rest for `timeout` seconds; a line that says what is unsent, or None when all is in the store."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        state = read_state(self.run_dir)
        if state.get("complete"):
            return None
        unsent = sum(1 for _ in read_lines(self.run_dir, state.get("offset", 0)))
        return (f"MLflow lacks the last {unsent} iterations or the run's end (see {self.run_dir / 'tracking.log'}); ship them "
                f"with: alpha-maml sync --run_dir {self.run_dir}")


def ship(run_dir: Path, ended: Callable[[], bool], patience: float) -> dict:
    """Ships `run_dir` until `ended()` and everything is in the store; then at most `patience` seconds more, after which
    it raises the store's last error. Returns the sender's state. Only one sender works on a folder at a time."""
    config = build(run_dir / "config.yaml", {})
    with (run_dir / ".tracking.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        wait, deadline = POLL, None
        while True:
            try:
                shipment = Shipment(config, run_dir)
                while not ended():
                    shipment.points()
                    time.sleep(POLL)
                shipment.points()
                return shipment.finish()
            except InputError:  # no patience mends the folder
                raise
            except Exception as error:  # whatever the store or the way to it does, the points stay in the folder
                if ended():
                    deadline = deadline or time.monotonic() + patience
                    if time.monotonic() + wait > deadline:
                        raise
                with suppress(OSError):  # a full disk, on which the log lies too
                    print(f"{time.strftime('%F %T')} {type(error).__name__}: {str(error)[:300]}; again in {wait:g} s",
                          flush=True)
                pause = time.monotonic() + wait
                while time.monotonic() < pause and not (deadline is None and ended()):
                    time.sleep(0.1)
                wait = min(2 * wait, LONGEST_WAIT)


def sync(run_dir: Path, patience: float) -> dict:
    """Ships what a run that has ended left unsent, trying for `patience` seconds; raises InputError where it is running."""
    with lock(run_dir):
        return ship(run_dir, lambda: True, patience)


def main() -> None:
    """The sender's process: ends once standard input has closed and all is shipped."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a scheduler signals all processes of a job: the trainer's end is what counts
    closed = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.buffer.read(), closed.set()), daemon=True).start()
    try:
        ship(Path(sys.argv[1]), closed.is_set, patience=600)
    except InputError as error:
        say(str(error))
        sys.exit(2)


if __name__ == "__main__":
    main()
