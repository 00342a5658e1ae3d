"""A model served by the very command that `alpha-maml export` prints."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from processes import free_port

Post = Callable[[object], tuple[int, dict]]  # JSON -> HTTP status and the answer


@contextmanager
def serving(line: str, python: Path, folder: Path) -> Iterator[Post]:
    """Starts the command `line`, NAME=URI mlflow ..., with this Python, in `folder`, and posts JSON to it."""
    store, *words = line.split()
    name, uri = store.split("=", 1)
    port = free_port()
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"  # mlflow starts uvicorn by its name
    away = {"PATH": path, "PYTHONPATH": "", name: uri, "MLFLOW_DISABLE_TELEMETRY": "true"}  # the model brings its own code
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([python, "-m", *words, "--port", str(port)], cwd=folder, stdout=log, stderr=log,
                                   env=os.environ | away, start_new_session=True)

    def post(content: object) -> tuple[int, dict]:
        request = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", json.dumps(content).encode(),
                                         {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    try:
        end = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5):
                    break
            except OSError:
                assert process.poll() is None and time.monotonic() < end, (folder / "log").read_text()
                time.sleep(0.1)
        yield post
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
