"""MLflow, apart from training: a process of its own ships the run's folder to the store (the only import of mlflow, but for
serving.py, which MLflow itself runs).

The folder is the queue (spool.py). The sender keeps how far it came in tracking.json, so that it can be killed, restarted,
or run long afterwards (`alpha-maml sync`) without losing or doubling a point: a point sent again with the timestamp of its
line is the same point. Training never waits for it, whatever the store does.
"""
from __future__ import annotations

import fcntl
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import closing, nullcontext, suppress
from importlib.metadata import version
from math import log10
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import InputError, reading, say
from trainer import checkpoint, comparison, spool
from trainer.config import build, flat_values
from trainer.keys import Config, storage

if TYPE_CHECKING:  # imports torch
    from trainer.learner import Learner

STATE = "tracking.json"  # run_id, experiment_id and offset: the byte of metrics.jsonl up to which all is in the store
BATCH = 1000  # MLflow's limit of metrics a request
POLL = 1.0  # seconds between looks at the folder
ANSWER = 10.0  # seconds that a store may take over one answer
LONGEST_WAIT = 10.0  # seconds between attempts while the store does not answer
SERVING = ("mlflow", "numpy", "pillow", "pyyaml", "safetensors", "torch")  # packages that a served model needs


def store_uri(config: Config, run_dir: Path) -> str:
    """The configured store, or mlflow.db beside the run's folder. The path is absolute: relative ones would follow the
    working directory."""
    return config.tracking.uri or f"sqlite:///{run_dir.resolve().parent / 'mlflow.db'}"


class Sender:
    """The process that ships a run's folder while it trains. Its end of a pipe closes when this process ends, however it
    ends, so that even a run that was killed gets its last points and its status."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        read_state(run_dir)  # raises InputError now, and not after the training
        with (run_dir / "tracking.log").open("ab") as log:
            # A session of its own: Ctrl-C at the terminal is for the trainer, and the sender outlives it by one shipment.
            self.process = subprocess.Popen([sys.executable, "-m", "trainer.tracking", str(run_dir)], stdin=subprocess.PIPE,
                                            stdout=log, stderr=log, start_new_session=True)

    def close(self, timeout: float) -> str | None:
        """Lets it ship the rest for `timeout` seconds; a line that says what is unsent, or None when all is in the store."""
        self.process.stdin.close()
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        state = read_state(self.run_dir)
        if state.get("complete"):
            return None
        unsent = sum(1 for _ in spool.read_lines(self.run_dir, state.get("offset", 0)))
        return (f"MLflow lacks the last {unsent} iterations or the run's end (see {self.run_dir / 'tracking.log'}); ship them "
                f"with: alpha-maml sync --run_dir {self.run_dir}")


def read_state(run_dir: Path) -> dict:
    """What the sender remembers of a run, {} before it has begun; raises InputError where that is damaged."""
    state = spool.read_json(run_dir / STATE)
    offset = state.get("offset", 0)
    with reading("run_dir"):
        size = (run_dir / spool.METRICS).stat().st_size if offset else 0
    if type(offset) is not int or not 0 <= offset <= size or \
            any(not isinstance(state.get(name, ""), str) for name in ("run_id", "experiment_id")):
        raise InputError(f"run_dir: {run_dir / STATE} is damaged, or of another run; remove it, and alpha-maml sync makes a "
                         "new MLflow run of the folder")
    return state


def link(config: Config, run_dir: Path) -> str:
    """How to look at the runs: the command, where no server shows them already, and the address of their comparison, of a
    sweep's runs in the view that `share` made, or of all."""
    uri, page = store_uri(config, run_dir), read_state(run_dir).get("experiment_id", "0")
    command = "" if uri.startswith("http") else f"start  mlflow ui --backend-store-uri {uri}\n  and open  "
    base = uri.rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"
    view = f"&viewStateShareKey={comparison.key(config.tracking.sweep)}" if config.tracking.sweep else ""
    page = f"{base}/#/experiments/{page}/runs?workflowType=machine_learning&compareRunsMode=CHART{view}"
    return f"Compare runs: {command}{page}"


def share(config: Config, run_dir: Path, runs: int) -> None:
    """Leaves the view of a sweep of `runs` runs in the store in which the run of `run_dir` is."""
    sweep = config.tracking.sweep
    connected(store_uri(config, run_dir)).set_experiment_tag(
        read_state(run_dir)["experiment_id"], comparison.TAG + comparison.key(sweep), comparison.view(sweep, runs))


def log_figure(config: Config, run_dir: Path, paths: list[Path]) -> None:
    """Files as artifacts of a run of their own in the experiment of the run in `run_dir`, found again by its name."""
    client, experiment = connected(store_uri(config, run_dir)), read_state(run_dir)["experiment_id"]
    name = f"report {paths[0].stem}"
    found = client.search_runs([experiment], f"attributes.run_name = {json.dumps(name)}", max_results=1)
    run_id = (found[0] if found else client.create_run(experiment, run_name=name, tags={"report": paths[0].stem})).info.run_id
    for path in paths:
        client.log_artifact(run_id, str(path), "figures")
    client.set_terminated(run_id, "FINISHED")


def log_evaluation(config: Config, run_dir: Path, figures: dict[str, float], paths: list[Path], place: str) -> None:
    """Figures without a step, and files as artifacts under `place`, in the run of `run_dir`."""
    client, run_id = connected(store_uri(config, run_dir)), read_state(run_dir)["run_id"]
    for name, value in figures.items():
        client.log_metric(run_id, name, value)
    for path in paths:
        client.log_artifact(run_id, str(path), place)


def log_model(config: Config, run_dir: Path, learner: Learner, weights: Path) -> str:
    """The learner, whose saved file is `weights`, as a model of the run of `run_dir`; its address in the store. The model holds
    this code, so that whoever serves it needs no copy of it."""
    connected(store_uri(config, run_dir))
    import mlflow
    import numpy as np
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    number = np.dtype(storage(config.precision))
    x = (-1, *learner.input_shape)
    label = (number, (-1, learner.outputs)) if learner.regression else (np.dtype(np.int64), (-1,))
    inputs = Schema([TensorSpec(number, x, "support_x"), TensorSpec(*label, "support_y"), TensorSpec(number, x, "query_x")])
    outputs = Schema([TensorSpec(np.dtype(np.float64), (-1, -1))])
    params = ParamSchema([ParamSpec("inner_steps", "long", config.inner.steps)])
    here, state = Path(__file__).parent, read_state(run_dir)
    mlflow.set_tracking_uri(store_uri(config, run_dir))
    mlflow.set_experiment(experiment_id=state["experiment_id"])
    with warnings.catch_warnings(record=True):  # asks for type hints and an example, for which the signature stands
        logged = Model.log(
            None, mlflow.pyfunc, name="model", run_id=state["run_id"], python_model=str(here / "serving.py"),
            artifacts={"weights": str(weights)}, signature=ModelSignature(inputs, outputs, params),
            code_paths=[str(here.parent / package) for package in ("trainer", "data", "models")],
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in SERVING])
    return logged.model_uri


def ship(run_dir: Path, ended: Callable[[], bool], patience: float) -> dict:
    """Ships `run_dir` until `ended()` and everything is in the store; then at most `patience` seconds more, after which
    it raises the store's last error. Returns the sender's state. Only one sender works on a folder at a time."""
    config = build(run_dir / "config.yaml", {})
    with (run_dir / ".tracking.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
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


def connected(uri: str):
    """A client of the store, which is created where it is a database that is not there yet."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"  # `ship` retries, and says so
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = f"{ANSWER:g}"
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow import MlflowClient

    with _initialised(uri):
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    return client


class Shipment:
    """One connection to the store: the run, found again or created, and what of the folder it still lacks."""

    def __init__(self, config: Config, run_dir: Path):
        self.config, self.run_dir, self.uri = config, run_dir, store_uri(config, run_dir)
        self.state = {"offset": 0} | read_state(run_dir) | {"complete": False}
        self.client = connected(self.uri)
        if "run_id" not in self.state:
            self._create()
        self.client.update_run(self.state["run_id"], status="RUNNING")
        for name, value in self._circumstances().items():
            self.client.set_tag(self.state["run_id"], name, value)

    def _create(self) -> None:
        from mlflow.entities import Param

        config = self.config
        experiment = self.client.get_experiment_by_name(config.tracking.experiment)
        if experiment is None:
            # A database's default place for artifacts follows the working directory; a server has its own.
            local = self.uri.startswith("sqlite:")
            place = (self.run_dir.resolve().parent / "mlartifacts").as_uri() if local else None
            try:
                self.state["experiment_id"] = self.client.create_experiment(config.tracking.experiment, place)
            except Exception:  # another run was first
                experiment = self.client.get_experiment_by_name(config.tracking.experiment)
                if experiment is None:
                    raise
        if experiment is not None:
            self.state["experiment_id"] = experiment.experiment_id
        rates = config.rates
        name = f"{rates.rule} a0={rates.alpha:g} b0={rates.beta:g} s{config.seed}"
        tags = {"mlflow.source.name": "alpha-maml", "run_dir": str(self.run_dir.resolve())} | _commit()
        if config.tracking.sweep:
            tags["sweep"] = config.tracking.sweep
        self.state["run_id"] = self.client.create_run(self.state["experiment_id"], run_name=name, tags=tags).info.run_id
        self._remember()
        params = {name: str(value)[:500] for name, value in flat_values(config).items() if not name.startswith("tracking.")}
        starts = {"log10_alpha": rates.alpha, "log10_beta": rates.beta}  # the axes of a contour plot over a sweep
        params |= {name: f"{log10(value):.6g}" for name, value in starts.items() if value > 0}
        self.client.log_batch(self.state["run_id"], params=[Param(k, v) for k, v in params.items()])

    def _circumstances(self) -> dict[str, Any]:
        """What may change when a run resumes: tags, since params cannot."""
        facts = spool.read_json(self.run_dir / "status.json")
        identity = facts.get("data", {})
        found = {"world_size": facts.get("world_size"), "host": facts.get("host"), "data": identity.get("name"),
                 "data.digest": identity.get("digest")}
        return {name: value for name, value in found.items() if value is not None}

    def _remember(self) -> None:
        spool.write_json(self.run_dir / STATE, self.state)

    def points(self) -> None:
        """Sends what metrics.jsonl holds beyond the offset, in whole lines."""
        from mlflow.entities import Metric

        batch: list[Metric] = []
        for reached, line in spool.read_lines(self.run_dir, self.state["offset"]):
            step, timestamp = line.pop("step"), line.pop("timestamp")
            batch += [Metric(name, value, timestamp, step) for name, value in line.items()]
            if len(batch) > BATCH - 50:
                self._send(batch, reached)
                batch = []
        if batch:
            self._send(batch, reached)

    def _send(self, batch: list, reached: int) -> None:
        self.client.log_batch(self.state["run_id"], metrics=batch)
        self.state["offset"] = reached
        self._remember()

    def finish(self) -> dict:
        """The files, the final figures without a step (they draw as bars, one a run), and the status."""
        run_id, summary = self.state["run_id"], spool.read_json(self.run_dir / "summary.json")
        for name in ("config.yaml", "summary.json"):
            if (self.run_dir / name).is_file():
                self.client.log_artifact(run_id, str(self.run_dir / name))
        lines = spool.read_metrics(self.run_dir)
        if lines:
            from trainer.figures import draw_curves

            named = [(f"{self.config.rates.rule} rule", lines)]
            for path in draw_curves(named, self.run_dir / "curves", self.config.loss_threshold):
                self.client.log_artifact(run_id, str(path), "figures")
        kept = checkpoint.saved(self.run_dir / "checkpoints")
        if kept:
            self.client.log_artifacts(run_id, str(kept[-1]), f"checkpoint/{kept[-1].name}")
        final = {"final/loss_val": summary.get("val_loss"), "final/accuracy_val": summary.get("val_accuracy"),
                 "final/iterations_to_threshold": summary.get("iterations_to_threshold")}
        for name, value in final.items():
            if value is not None:
                self.client.log_metric(run_id, name, value)
        # A run that ended without a word was killed.
        status = spool.read_json(self.run_dir / "status.json").get("status", "RUNNING")
        self.client.set_terminated(run_id, "KILLED" if status == "RUNNING" else status)
        self.state["complete"] = True
        self._remember()
        return self.state


def _initialised(uri: str):
    """Holds the lock under which an sqlite store is created: processes that race for it break it."""
    from filelock import FileLock

    if not uri.startswith("sqlite:///"):
        return nullcontext()
    path = Path(uri.removeprefix("sqlite:///"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path, timeout=ANSWER)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")  # readers and the writer do not wait for each other
    return FileLock(f"{path}.lock", timeout=6 * ANSWER)


def _commit() -> dict[str, str]:
    result = subprocess.run(["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"], capture_output=True, text=True)
    return {"mlflow.source.git.commit": result.stdout.strip()} if result.returncode == 0 else {}


def sync(run_dir: Path, patience: float) -> dict:
    """Ships what a run that has ended left unsent, trying for `patience` seconds; raises InputError where it is running."""
    with spool.lock(run_dir):
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
