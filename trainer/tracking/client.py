"""The store, as the verbs of the command line use it: a connection, and what they put there."""
from __future__ import annotations

import json
import os
import sqlite3
import warnings
from contextlib import AbstractContextManager, closing, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import alpha_maml
from alpha_maml.trainer.config import Config, storage
from alpha_maml.trainer.tracking import comparison
from alpha_maml.trainer.tracking.state import read_state, store_uri

if TYPE_CHECKING:  # imports torch
    from alpha_maml.trainer.learner import Learner

PACKAGE = Path(alpha_maml.__file__).parent
ANSWER = 10.0  # seconds that a store may take over one answer
SERVING = ("mlflow", "numpy", "pillow", "pyyaml", "safetensors", "torch")  # packages that a served model needs


def connected(uri: str) -> Any:
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


def _initialised(uri: str) -> AbstractContextManager[Any]:
    """Holds the lock under which an sqlite store is created: processes that race for it break it."""
    from filelock import FileLock

    if not uri.startswith("sqlite:///"):
        return nullcontext()
    path = Path(uri.removeprefix("sqlite:///"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path, timeout=ANSWER)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")  # readers and the writer do not wait for each other
    return FileLock(f"{path}.lock", timeout=6 * ANSWER)


def share(config: Config, run_dir: Path, runs: int) -> None:
    """Leaves the view of a sweep of `runs` runs in the store in which the run of `run_dir` is."""
    sweep = str(config.tracking.sweep)
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
    state = read_state(run_dir)
    mlflow.set_tracking_uri(store_uri(config, run_dir))
    mlflow.set_experiment(experiment_id=state["experiment_id"])
    with warnings.catch_warnings(record=True):  # asks for type hints and an example, for which the signature stands
        logged = Model.log(
            None, mlflow.pyfunc, name="model", run_id=state["run_id"], python_model=str(Path(__file__).with_name("serving.py")),
            artifacts={"weights": str(weights)}, signature=ModelSignature(inputs, outputs, params),
            code_paths=[str(PACKAGE)],
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in SERVING])
    return logged.model_uri
