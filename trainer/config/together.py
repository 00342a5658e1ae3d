"""The rules that bind several keys."""
from __future__ import annotations

from alpha_maml.data import DATASETS
from alpha_maml.errors import InputError
from alpha_maml.models import MODELS
from alpha_maml.trainer.config.keys import Config
from alpha_maml.trainer.core.rules import RULES
from alpha_maml.trainer.engines import ENGINES


def check_together(config: Config) -> None:
    """Raises InputError where keys that are right by themselves do not go together."""
    rates, task, data, engine = config.rates, config.task, config.data.name, config.engine.name
    if rates.minimum >= rates.maximum:
        raise InputError(f"rates.minimum: {rates.minimum} must be under rates.maximum ({rates.maximum}); change one of them")
    if RULES.has(rates.rule, "bounds"):
        for name, value in (("alpha", rates.alpha), ("beta", rates.beta)):
            if not rates.minimum <= value <= rates.maximum:
                raise InputError(f"rates.{name}: {value} must lie within rates.minimum {rates.minimum} and rates.maximum "
                                 f"{rates.maximum} under rule {rates.rule}; change it or the bounds")
    if config.inner.per_step is not None and config.inner.order == "reptile":
        raise InputError(f"inner.per_step: {config.inner.per_step} is learned by the meta-gradient, and inner.order reptile "
                         "moves only what adapts; leave it out, or use order second or first")
    if config.inner.recompute and config.model.randomness != "error":
        raise InputError("inner.recompute: true would draw model.randomness anew where it computes anew; leave it null, or set "
                         "model.randomness to error")
    if config.compile and config.model.randomness != "error":
        raise InputError("compile: true would draw other numbers than model.randomness promises; leave one of them out")
    if config.capture and (
            not ENGINES.has(engine, "replicated") or config.model.randomness != "error" or config.device == "cpu"):
        raise InputError("capture: true needs engine.name torch, model.randomness error, and a GPU; leave it null")
    if ENGINES.has(engine, "float32") and config.precision != "float32":
        raise InputError(f"precision: {config.precision} is not for engine.name {engine}, whose shards are float32; use "
                         "float32, or engine.name torch")
    if DATASETS.has(data, "needs a root") and config.data.root is None:
        raise InputError(f"data.root: null, and data.name {data} needs one; give the folder that holds the images")
    if DATASETS.has(data, "regression") and task.ways != 1:
        raise InputError(f"task.ways: {task.ways} must be 1 for regression (data.name {data}); remove it")
    for name, least, most in (("ways", task.min_ways, task.ways), ("shots", task.min_shots, task.shots)):
        if least is not None and least > most:
            raise InputError(f"task.min_{name}: {least} is more than task.{name} ({most}); lower it, or leave it out")
    if DATASETS.has(data, "classification"):
        for name, ways in (("ways", task.ways), ("min_ways", task.min_ways)):
            if ways is not None and ways < 2:
                raise InputError(f"task.{name}: {ways} must be 2 or more for classification; set it, 5 is common")
    if MODELS.has(config.model.name, "images") and DATASETS.has(data, "regression"):
        raise InputError(f"model.name: {config.model.name} takes images, data.name {data} has none; use mlp")
