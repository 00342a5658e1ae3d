"""What a run leaves in words: that it runs, how it ended, and what came out."""
from __future__ import annotations

import platform
import time
from pathlib import Path

import torch

from alpha_maml.trainer.config import Config, to_yaml
from alpha_maml.trainer.runs import folder as files
from alpha_maml.trainer.runs.metrics import read_metrics

SUMMARY, STATUS = "summary.json", "status.json"


def begin(folder: Path, config: Config, data: dict[str, str], ranks: int, iteration: int) -> None:
    """Leaves in the run's folder what it is and that it runs; `data` names the data set."""
    files.write_text(folder / "config.yaml", to_yaml(config))
    files.write_json(folder / STATUS, {
        "status": "RUNNING", "world_size": ranks, "host": platform.node(), "resumed_at": iteration, "data": data})


def conclude(folder: Path, config: Config, ranks: int, device: torch.device, begun: float, status: str, diverged: bool) -> None:
    """Leaves in the run's folder how it ended and what came out; it has `begun` at that time.monotonic()."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    facts = {"world_size": ranks, "device": name, "engine": config.engine.name, "rule": config.rates.rule,
             "seconds": time.monotonic() - begun, "status": status, "diverged": diverged,
             "versions": {"python": platform.python_version(), "torch": torch.__version__}}
    files.write_json(folder / SUMMARY, summarise(read_metrics(folder), config.loss_threshold) | facts)
    files.write_json(folder / STATUS, {"status": status})


def shown(value: float | None) -> str:
    """A figure of a summary as people read it."""
    return "-" if value is None else f"{value:.4g}"


def mean_of(lines: list[dict], name: str) -> float | None:
    values = [line[name] for line in lines if name in line]
    return sum(values) / len(values) if values else None


def iterations_to(lines: list[dict], threshold: float) -> int | None:
    """The first iteration at which the mean training loss of the last 5 is under the threshold."""
    losses = [line.get("loss/train", float("inf")) for line in lines]
    return next((lines[i]["step"] for i in range(4, len(losses)) if sum(losses[i - 4 : i + 1]) / 5 < threshold), None)


def summarise(lines: list[dict], threshold: float) -> dict:
    """The part of summary.json that follows from the metrics; losses are means over 20 iterations."""
    first, last = (lines[0], lines[-1]) if lines else ({}, {})
    validated = next((line for line in reversed(lines) if "loss/val" in line), {})
    return {
        "iterations": last.get("step", 0),
        "alpha_first": first.get("rates/alpha"),  # left out of a line where it is not finite
        "alpha_last": last.get("rates/alpha"),
        "beta_first": first.get("rates/beta"),
        "beta_last": last.get("rates/beta"),
        "loss_first": mean_of(lines[:20], "loss/train"),
        "loss_last": mean_of(lines[-20:], "loss/train"),
        "val_loss": validated.get("loss/val"),
        "val_accuracy": validated.get("accuracy/val"),
        "val_accuracy_ci95": validated.get("accuracy_ci95/val"),
        **{f"val_{name.removesuffix('/val')}": value for name, value in validated.items() if name.endswith("/val")},
        "iterations_to_threshold": iterations_to(lines, threshold),
        "tasks_per_s": mean_of(lines[len(lines) // 10 :], "perf/tasks_per_s"),
    }


def own_metrics(summary: dict) -> dict[str, float]:
    """The validation metrics of a summary that a loss of the user's own gave, beside accuracy."""
    return {name.removeprefix("val_"): value for name, value in summary.items()
            if name.startswith("val_") and not name.endswith("_ci95") and name not in ("val_loss", "val_accuracy")}
