"""What makes two configurations the same run, and where its folder is."""
from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from alpha_maml.errors import InputError
from alpha_maml.trainer.config.keys import CIRCUMSTANCE, LATER, Config, names, table
from alpha_maml.trainer.config.read import build, flat
from alpha_maml.trainer.core.rules import RULES

BEFORE = 0.6  # rates.tolerance under the rules that do not read it: its default in version 0.1, which folders are named by


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(asdict(config), sort_keys=False)


def flat_values(config: Config) -> dict[str, Any]:
    """Dotted key -> value, for params and comparisons."""
    return flat(asdict(config), "")


def optimizer_of(config: Config) -> str:
    """The outer optimiser's name; outer.optimizer may leave it to the rule."""
    return config.outer.optimizer or ("muon" if RULES.has(config.rates.rule, "relative") else "sgd")


def trajectory(config: Config) -> dict[str, Any]:
    """The keys that decide every bit of theta: two runs that agree in them are parts of one run."""
    circumstances = names(CIRCUMSTANCE)
    values = {name: value for name, value in flat_values(config).items() if name not in circumstances}
    tolerance = values["rates.tolerance"] if config.rates.rule == "adaptive" else BEFORE
    return values | {"outer.optimizer": optimizer_of(config), "rates.tolerance": tolerance}


def check_ownership(folder: Path, config: Config) -> None:
    """Raises InputError where the folder belongs to a run of another configuration."""
    if not (folder / "config.yaml").is_file():
        return
    theirs = trajectory(build(folder / "config.yaml", {}))
    for name, value in trajectory(config).items():
        if theirs[name] != value:
            raise InputError(f"run_dir: {folder} belongs to a run with {name} = {theirs[name]}, not {value}; choose another "
                             "run_dir, or remove that one")


def run_dir(config: Config) -> Path:
    """The run's folder: the one given, or one that the same configuration always finds again, so that the same command
    resumes."""
    if config.run_dir:
        return Path(config.run_dir)
    later = names(LATER)
    decisive = {name: value for name, value in trajectory(config).items()
                if name not in later or value != table()[name].default}
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:8]
    task, rates = config.task, config.rates
    name = config.data.name.replace(":", ".")
    return Path("runs") / (f"{name}-{task.ways}w{task.shots}s-{rates.rule}-a{rates.alpha:g}-b{rates.beta:g}-s{config.seed}"
                           f"-{digest}")
