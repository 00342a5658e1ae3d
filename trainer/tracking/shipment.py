"""What the sender does with one connection: find or create the run, and send what it lacks."""
from __future__ import annotations

import subprocess
from math import log10
from pathlib import Path
from typing import Any

from alpha_maml.trainer.config import Config, flat_values
from alpha_maml.trainer.runs import checkpoint
from alpha_maml.trainer.runs.folder import read_json, write_json
from alpha_maml.trainer.runs.metrics import read_lines, read_metrics
from alpha_maml.trainer.runs.summary import STATUS, SUMMARY, own_metrics
from alpha_maml.trainer.tracking.client import connected
from alpha_maml.trainer.tracking.state import STATE, read_state, store_uri

BATCH = 1000  # MLflow's limit of metrics a request


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
        facts = read_json(self.run_dir / STATUS)
        identity = facts.get("data", {})
        found = {"world_size": facts.get("world_size"), "host": facts.get("host"), "data": identity.get("name"),
                 "data.digest": identity.get("digest")}
        return {name: value for name, value in found.items() if value is not None}

    def _remember(self) -> None:
        write_json(self.run_dir / STATE, self.state)

    def points(self) -> None:
        """Sends what metrics.jsonl holds beyond the offset, in whole lines."""
        from mlflow.entities import Metric

        batch, reached = [], self.state["offset"]
        for reached, line in read_lines(self.run_dir, self.state["offset"]):
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
        run_id, summary = self.state["run_id"], read_json(self.run_dir / SUMMARY)
        for name in ("config.yaml", SUMMARY):
            if (self.run_dir / name).is_file():
                self.client.log_artifact(run_id, str(self.run_dir / name))
        lines = read_metrics(self.run_dir)
        if lines:
            from alpha_maml.trainer.runs.figures import draw_curves

            named = [(f"{self.config.rates.rule} rule", lines)]
            for path in draw_curves(named, self.run_dir / "curves", self.config.loss_threshold):
                self.client.log_artifact(run_id, str(path), "figures")
        kept = checkpoint.saved(self.run_dir / "checkpoints")
        if kept:
            self.client.log_artifacts(run_id, str(kept[-1]), f"checkpoint/{kept[-1].name}")
        final = {"final/loss_val": summary.get("val_loss"), "final/accuracy_val": summary.get("val_accuracy"),
                 "final/iterations_to_threshold": summary.get("iterations_to_threshold")}
        final |= {f"final/{name}_val": value for name, value in own_metrics(summary).items()}
        for name, value in final.items():
            if value is not None:
                self.client.log_metric(run_id, name, value)
        # A run that ended without a word was killed.
        status = read_json(self.run_dir / STATUS).get("status", "RUNNING")
        self.client.set_terminated(run_id, "KILLED" if status == "RUNNING" else status)
        self.state["complete"] = True
        self._remember()
        return self.state


def _commit() -> dict[str, str]:
    result = subprocess.run(["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"], capture_output=True, text=True)
    return {"mlflow.source.git.commit": result.stdout.strip()} if result.returncode == 0 else {}
