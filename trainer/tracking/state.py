"""What the sender remembers of a run, and where its store is. Free of MLflow."""
from __future__ import annotations

from pathlib import Path

from alpha_maml.errors import InputError, reading
from alpha_maml.trainer.config import Config
from alpha_maml.trainer.runs.folder import read_json
from alpha_maml.trainer.runs.metrics import METRICS
from alpha_maml.trainer.tracking import comparison

STATE = "tracking.json"  # run_id, experiment_id and offset: the byte of metrics.jsonl up to which all is in the store


def store_uri(config: Config, run_dir: Path) -> str:
    """The configured store, or mlflow.db beside the run's folder. The path is absolute: relative ones would follow the
    working directory."""
    return config.tracking.uri or f"sqlite:///{run_dir.resolve().parent / 'mlflow.db'}"


def read_state(run_dir: Path) -> dict:
    """What the sender remembers of a run, {} before it has begun; raises InputError where that is damaged."""
    state = read_json(run_dir / STATE)
    offset = state.get("offset", 0)
    with reading("run_dir"):
        size = (run_dir / METRICS).stat().st_size if offset else 0
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
