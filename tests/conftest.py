"""What the tests share: real data, real processes, small problems."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from processes import ROOT, command, free_port

from alpha_maml.data.losses.cross_entropy import cross_entropy
from alpha_maml.data.losses.mean_squared_error import mean_squared_error
from alpha_maml.data.tasks import TaskBatch, labelled
from alpha_maml.models.build import build as build_model
from alpha_maml.models.functional import function, function_of_tasks
from alpha_maml.trainer.runs import checkpoint
from alpha_maml.trainer.runs.metrics import read_metrics

OMNIGLOT = Path(os.environ.get("OMNIGLOT_ROOT", ROOT / "../shared/data/omniglot"))


@pytest.fixture(scope="session")
def omniglot_root() -> str:
    """The folder of Omniglot's two archives."""
    if not OMNIGLOT.is_dir():
        reason = f"{OMNIGLOT} does not exist; name the folder of Omniglot's archives in OMNIGLOT_ROOT"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return str(OMNIGLOT.resolve())


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def background(tmp_path: Path):
    """Starts alpha-maml (arguments as in `run`) and returns the process; whatever still runs at the end is killed. Its
    output goes to output.N under tmp_path."""
    processes: list[subprocess.Popen] = []

    def start(*arguments: object, ranks: int = 0, **environment: str) -> subprocess.Popen:
        with (tmp_path / f"output.{len(processes)}").open("wb") as output:
            processes.append(subprocess.Popen(
                command(*arguments, ranks=ranks), cwd=ROOT, stdout=output, stderr=output, start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | environment))
        return processes[-1]

    yield start
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Server:
    """A real MLflow server on this machine."""

    def __init__(self, folder: Path):
        self.folder, self.port, self.process = folder, free_port(), None
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> Server:
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
                 "--backend-store-uri", f"sqlite:///{self.folder}/store.db",
                 "--artifacts-destination", str(self.folder / "artifacts")],
                stdout=log, stderr=log, start_new_session=True,
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"})
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=1):
                    return self
            except OSError:
                time.sleep(0.1)
        raise AssertionError((self.folder / "server.log").read_text())

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def server(tmp_path: Path):
    server = Server(tmp_path).start()
    yield server
    server.kill()


def pytest_terminal_summary(terminalreporter) -> None:
    """Shows what tests report by record_property("report", text), from workers of xdist too."""
    for report in terminalreporter.getreports("passed"):
        for name, text in report.user_properties:
            if name == "report":
                terminalreporter.write_line(text)


def started(process: subprocess.Popen, run_dir: Path, lines: int) -> None:
    """Waits until the run has recorded so many iterations."""
    end = time.monotonic() + 120
    while len(read_metrics(run_dir)) < lines:
        assert process.poll() is None, f"ended with {process.returncode}: see {run_dir.parent}/output.*"
        assert time.monotonic() < end, "too slow to be alive"
        time.sleep(0.05)


def newest_state(run_dir: Path) -> dict[str, torch.Tensor]:
    return checkpoint.read(checkpoint.saved(run_dir / "checkpoints")[-1])


def same_bits(a: Path, b: Path) -> bool:
    """Whether two runs ended with the same training state."""
    left, right = newest_state(a), newest_state(b)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], names: str) -> float:
    """The relative difference of the tensors whose names begin so."""
    left, right = (torch.cat([t.flatten().double() for n, t in x.items() if n.startswith(names)]) for x in (a, b))
    return float((left - right).norm() / right.norm())


class Small:
    """A float64 problem of one model, small enough for finite differences."""

    def __init__(self, name: str, tasks: int = 3, **args):
        generator = torch.Generator().manual_seed(7)

        def random(*shape: int) -> torch.Tensor:
            return torch.rand(*shape, generator=generator, dtype=torch.float64)

        if name == "mlp":
            shape, outputs, self.loss = (1,), 1, mean_squared_error
            self.tasks = labelled(*(4 * random(tasks, 5, 1) - 2 for _ in range(4)))
        else:
            shape, outputs, self.loss = (1, 16, 16), 3, cross_entropy
            labels = torch.arange(3).expand(tasks, 3)
            self.tasks = labelled(random(tasks, 3, *shape), labels, random(tasks, 3, *shape), labels)
        channels = args.pop("channels", {"mlp": 8, "conv4": 4, "conv4_pooled": 4, "resnet12": 2}.get(name))
        self.model = build_model(name, shape, outputs, 3, channels, args).double()
        self.theta = {name: p.detach() for name, p in self.model.named_parameters()}
        self.alpha = torch.tensor(0.2, dtype=torch.float64)
        self.apply, self.forward_tasks = function(self.model, training=True), function_of_tasks(self.model)

    def task(self, b: int) -> TaskBatch:
        return self.tasks.map(lambda x: x[b])
