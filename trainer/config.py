"""Every configuration key: its type, default, rule and meaning; read from YAML and the command line.

Sources, weakest first: the defaults below, the YAML file, `--section.key value` on the command line. Whatever is wrong
ends in one InputError line. This module imports neither torch nor anything slow, so that `--help` answers at once.
"""
from __future__ import annotations

import difflib
import hashlib
import json
import math
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from data.errors import InputError

Rule = tuple[Callable[[Any], bool], str]
POSITIVE: Rule = (lambda v: v > 0, "must be greater than 0")
NOT_NEGATIVE: Rule = (lambda v: v >= 0, "must be 0 or more")
AT_LEAST_ONE: Rule = (lambda v: v >= 1, "must be 1 or more")
NOT_EMPTY: Rule = (lambda v: v != "" and v.isprintable(), "must be printable text, not empty")

IMAGE_MODELS = ("conv4", "conv4_pooled", "resnet12")


def key(default: Any, meaning: str, rule: Rule | None = None) -> Any:
    metadata = {"meaning": meaning, "rule": rule}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Data:
    name: str = key("sinusoid", "sinusoid, omniglot, folder (images of yours), or your own as package.module:Class", NOT_EMPTY)
    root: str | None = key(None, "folder of the data set's files; null downloads Omniglot's once", NOT_EMPTY)
    size: int = key(84, "folder: side in pixels that images are resized to", AT_LEAST_ONE)
    colour: bool = key(True, "folder: three channels, or one of grey")
    resident: bool | None = key(None, "folder: images on the device; null is on a GPU where they fit half of what is free")
    args: dict = key({}, "keyword arguments of your own data set's class")


@dataclass(frozen=True)
class Model:
    name: str = key("mlp", "mlp, conv4, conv4_pooled, resnet12, or your own as package.module:Class", NOT_EMPTY)
    channels: int | None = key(None, "width; null takes the model's own", AT_LEAST_ONE)
    args: dict = key({}, "further keyword arguments of the model's class")
    randomness: Literal["error", "different", "same"] = key(
        "error", "random numbers, such as dropout's, that the model draws in training: error refuses them, different draws for "
        "each task, same draws once for all tasks")


@dataclass(frozen=True)
class Task:
    ways: int = key(1, "classes per task (1 for regression)", AT_LEAST_ONE)
    shots: int = key(10, "support examples per class", AT_LEAST_ONE)
    queries: int = key(10, "query examples per class", AT_LEAST_ONE)
    min_ways: int | None = key(None, "each training iteration draws its ways from here to task.ways; null is task.ways",
                               AT_LEAST_ONE)
    min_shots: int | None = key(None, "the same of its shots; null is task.shots", AT_LEAST_ONE)
    batch: int = key(25, "tasks per iteration, over all ranks", AT_LEAST_ONE)
    reduction: Literal["mean", "sum"] = key("mean", "over tasks; a sum's beta is 1/batch of a mean's, see README")
    chunk: int = key(0, "tasks differentiated at once on a rank, to bound memory; 0 is automatic", NOT_NEGATIVE)


@dataclass(frozen=True)
class Inner:
    steps: int = key(1, "K, gradient steps on the support set", AT_LEAST_ONE)
    order: Literal["second", "first", "reptile"] = key(
        "second", "of the meta-gradient: second is exact, first drops the Hessian, reptile takes the displacement itself")
    adapts: str = key("all", "what moves within a task: all, head (ANIL), body (BOIL), or patterns of tensors' names, as in "
                      "blocks.3.*,head.*", NOT_EMPTY)
    clip: float = key(0.0, "largest norm of a task's inner gradient; 0 is none", NOT_NEGATIVE)
    weight_decay: float = key(0.0, "of the inner loop: weight_decay / 2 |phi|^2 beside the support loss", NOT_NEGATIVE)
    multi_step_iterations: int = key(
        0, "MAML++'s multi-step loss: iterations over which the losses after the earlier inner steps fade out", NOT_NEGATIVE)
    first_order_iterations: int = key(
        0, "MAML++'s derivative-order annealing: iterations at the start that are of first order", NOT_NEGATIVE)
    recompute: bool | None = key(
        None, "compute inner steps anew in the backward sweep instead of keeping their graphs: memory that hardly grows with "
        "steps, for more time; null is above 8 steps, unless model.randomness")


@dataclass(frozen=True)
class Outer:
    optimizer: Literal["sgd", "adam"] = key("sgd", "theta's step: the paper's SGD, or Adam")
    trust: float | None = key(
        None, "largest relative step of a tensor in the first iterations, falling as 1/sqrt(1 + t/10); 0 is none, null is 0.2 "
        "(sgd) or 0.06 (adam) under rule adaptive, else none", NOT_NEGATIVE)
    weight_decay: float = key(0.0, "adds weight_decay theta to the meta-gradient", NOT_NEGATIVE)
    average: bool | None = key(
        None, "evaluate an average of theta over about the last tenth of all iterations; null is true under rule adaptive")


@dataclass(frozen=True)
class Rates:
    rule: Literal["adaptive", "paper", "fixed"] = key("adaptive", "how alpha and beta move")
    alpha_shape: Literal["scalar", "layer", "layer_step", "parameter"] = key(
        "scalar", "what has an inner rate of its own: everything one, each tensor, each tensor and step, each number")
    alpha: float = key(0.01, "first inner rate", POSITIVE)
    beta: float = key(0.001, "first meta rate", POSITIVE)
    alpha_hyperlr: float = key(1e-3, "paper: rate of alpha, per hypergradient in task.reduction", NOT_NEGATIVE)
    beta_hyperlr: float = key(1e-3, "paper: rate of beta, per product in task.reduction", NOT_NEGATIVE)
    kappa: float = key(1.0, "adaptive: largest step of log alpha and log beta per iteration", POSITIVE)
    tolerance: float = key(0.6, "adaptive: opposition of successive meta-gradients that beta endures", NOT_NEGATIVE)
    minimum: float = key(1e-6, "adaptive: lower bound of both rates", POSITIVE)
    maximum: float = key(10.0, "adaptive: upper bound of both rates", POSITIVE)


@dataclass(frozen=True)
class Engine:
    name: Literal["torch", "deepspeed"] = key("torch", "what holds theta: every rank, or ranks in shards")
    zero_stage: int = key(1, "deepspeed: what is sharded, more from 0 to 3", (lambda v: 0 <= v <= 3, "must be 0, 1, 2 or 3"))
    timeout: float = key(120.0, "seconds after which a rank that does not answer ends the run", POSITIVE)


@dataclass(frozen=True)
class Evaluation:
    every: int = key(0, "iterations between evaluations on the validation split; 0 is only at the end", NOT_NEGATIVE)
    tasks: int = key(200, "tasks per evaluation", AT_LEAST_ONE)


@dataclass(frozen=True)
class Checkpoint:
    every: int = key(500, "iterations between checkpoints; 0 is only at the end", NOT_NEGATIVE)
    keep: int = key(3, "newest checkpoints kept", AT_LEAST_ONE)


@dataclass(frozen=True)
class Tracking:
    uri: str | None = key(None, "MLflow store; null is mlflow.db beside the run's folder; disabled is none", NOT_EMPTY)
    experiment: str = key("alpha-maml", "MLflow experiment", NOT_EMPTY)
    sweep: str | None = key(None, "tag that the runs of one sweep share", NOT_EMPTY)
    timeout: float = key(30.0, "longest wait in seconds for the store at the end of a run", NOT_NEGATIVE)


@dataclass(frozen=True)
class Config:
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    task: Task = field(default_factory=Task)
    inner: Inner = field(default_factory=Inner)
    outer: Outer = field(default_factory=Outer)
    rates: Rates = field(default_factory=Rates)
    engine: Engine = field(default_factory=Engine)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    tracking: Tracking = field(default_factory=Tracking)
    iterations: int = key(1000, "meta-iterations in all", AT_LEAST_ONE)
    seed: int = key(0, "of the tasks and of theta's initialisation", (lambda v: 0 <= v < 2**63, "must be in [0, 2^63)"))
    device: Literal["auto", "cpu", "cuda"] = key("auto", "auto takes a GPU where there is one")
    precision: Literal["float32", "float64"] = key("float32", "of theta and of every product on the way to it")
    loss_threshold: float = key(2.5, "iterations_to_threshold counts until the training loss is under this", POSITIVE)
    run_dir: str | None = key(None, "folder of the run; null derives it from the configuration", NOT_EMPTY)


def keys(section: type = Config, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (its dataclass field, its resolved type), in order of definition."""
    hints, found = typing.get_type_hints(section), {}
    for item in fields(section):
        if is_dataclass(hints[item.name]):
            found |= keys(hints[item.name], f"{prefix}{item.name}.")
        else:
            found[prefix + item.name] = (item, hints[item.name])
    return found


def default(item: Any) -> Any:
    return item.default if item.default is not MISSING else item.default_factory()


def spelled(kind: Any) -> str:
    """A type as a user would say it."""
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(typing.get_args(kind))
    if isinstance(kind, types.UnionType):
        return " or ".join(spelled(k) for k in typing.get_args(kind))
    return {int: "a whole number", float: "a finite number", str: "text", bool: "true or false", dict: "a mapping",
            types.NoneType: "null"}[kind]


def _converted(value: Any, kind: Any) -> Any:
    """`value` as `kind`; raises ValueError where it is not one."""
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        return _converted(value, next(k for k in typing.get_args(kind) if k is not types.NoneType))
    if typing.get_origin(kind) is Literal:
        if value in typing.get_args(kind):
            return value
    elif kind in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        number = float(value)  # YAML 1.1 reads 1e-3 as text
        if math.isfinite(number) and (kind is float or number.is_integer()):
            return number if kind is float else int(value) if isinstance(value, (int, str)) and _digits(value) else int(number)
    elif isinstance(value, kind):
        return value
    raise ValueError


def _digits(value: int | str) -> bool:
    return isinstance(value, int) or value.strip().lstrip("+-").isdigit()


def checked(name: str, value: Any, where: str) -> Any:
    """`value` converted to the key's type and held against its rule; raises InputError."""
    table = keys()
    if name not in table:
        close = difflib.get_close_matches(name, table, 1, 0.5)
        raise InputError(f"{name}: no such key ({where}); " + (f"did you mean {close[0]}?" if close else
                         "`alpha-maml train --help` lists all"))
    item, kind = table[name]
    shown = str(value) if len(str(value)) <= 60 else str(value)[:57] + "..."
    try:
        value = _converted(value, kind)
    except (ValueError, OverflowError):
        raise InputError(f"{name}: {shown!r} must be {spelled(kind)}; change it ({where})") from None
    rule = item.metadata["rule"]
    if rule and value is not None and not rule[0](value):
        raise InputError(f"{name}: {shown!r} {rule[1]}; change it ({where})")
    return value


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict:
        seen = set()
        for name, _ in node.value:
            if isinstance(name, yaml.ScalarNode) and name.tag != "tag:yaml.org,2002:merge":
                if name.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"the key {name.value} stands twice", problem_mark=name.start_mark)
                seen.add(name.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The file's keys, dotted, not yet checked against their types; raises InputError."""
    try:
        if not path.is_file():
            raise InputError(f"--config: {path} is not a file; give the path of a YAML file, such as those under configs/")
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}" if mark else ""
        reason = (getattr(error, "problem", None) or str(error)).splitlines()[0]
        raise InputError(f"--config: {path} is not valid YAML{place} ({reason}); correct it") from None
    except OSError as error:
        raise InputError(f"--config: {path} cannot be read ({error.strerror}); check the path and its permissions") from None
    if not isinstance(content, dict | None):
        raise InputError(f"--config: {path} holds {type(content).__name__}, it must hold a mapping of keys; correct it")
    return flat(content or {}, str(path))


def flat(content: dict, where: str, prefix: str = "") -> dict[str, Any]:
    """A nested mapping as dotted keys; raises InputError where a section is not one."""
    sections, found = {name.split(".")[0] for name in keys() if "." in name}, {}
    for name, value in content.items():
        if not prefix and name in sections:
            if not isinstance(value, dict | None):
                raise InputError(f"{name}: {value!r} must be a section of keys ({where}); indent its keys below it")
            found |= flat(value or {}, where, f"{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def from_text(name: str, text: str) -> Any:
    """What a command-line value means for a key: YAML, but text stays text."""
    kind = keys()[name][1] if name in keys() else str
    if text == "null":
        return None
    if dict in (kind, *typing.get_args(kind)) or bool in (kind, *typing.get_args(kind)):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            return text
    return text


def build(file: Path | None, overrides: dict[str, str]) -> Config:
    """The checked configuration of a file (or of the defaults) and of the command line; raises InputError."""
    return of(read_yaml(file) if file else {}, f"in {file}", overrides)


def of_run(folder: Path, overrides: dict[str, str]) -> Config:
    """The configuration of the run in `folder`, with what the command line changes; raises InputError."""
    if not (folder / "config.yaml").is_file():
        raise InputError(f"run_dir: {folder} is not a run's folder (it has no config.yaml); give one that is")
    return build(folder / "config.yaml", overrides)


def of(content: dict[str, Any], where: str, overrides: dict[str, str]) -> Config:
    """The same of dotted keys that stand in `where`."""
    values = {name: checked(name, value, where) for name, value in content.items()}
    values |= {name: checked(name, from_text(name, text), f"--{name}") for name, text in overrides.items()}
    config = Config()
    for name, value in values.items():
        config = with_key(config, name, value)
    check_together(config)
    return config


def with_key(config: Config, name: str, value: Any) -> Config:
    """A copy with one dotted key changed."""
    section, _, leaf = name.rpartition(".")
    if not section:
        return replace(config, **{leaf: value})
    return replace(config, **{section: replace(getattr(config, section), **{leaf: value})})


def check_together(config: Config) -> None:
    """The rules that bind several keys."""
    rates, task = config.rates, config.task
    if rates.minimum >= rates.maximum:
        raise InputError(f"rates.minimum: {rates.minimum} must be under rates.maximum ({rates.maximum}); change one of them")
    if rates.rule == "adaptive":
        for name, value in (("alpha", rates.alpha), ("beta", rates.beta)):
            if not rates.minimum <= value <= rates.maximum:
                raise InputError(f"rates.{name}: {value} must lie within rates.minimum {rates.minimum} and rates.maximum "
                                 f"{rates.maximum} under rule adaptive; change it or the bounds")
    if config.inner.recompute and config.model.randomness != "error":
        raise InputError("inner.recompute: true would draw model.randomness anew where it computes anew; leave it null, or set "
                         "model.randomness to error")
    if config.engine.name == "deepspeed" and config.precision != "float32":
        raise InputError(f"precision: {config.precision} is not for engine.name deepspeed, whose shards are float32; use "
                         "float32, or engine.name torch")
    if ":" not in config.data.name and config.data.name not in ("sinusoid", "omniglot", "folder"):
        raise InputError(f"data.name: {config.data.name!r} must be sinusoid, omniglot, folder or package.module:Class; "
                         "change it")
    if config.data.name == "folder" and config.data.root is None:
        raise InputError("data.root: null, and data.name folder needs one; give the folder that holds the images")
    if config.data.name == "sinusoid" and task.ways != 1:
        raise InputError(f"task.ways: {task.ways} must be 1 for regression (data.name sinusoid); remove it")
    for name, least, most in (("ways", task.min_ways, task.ways), ("shots", task.min_shots, task.shots)):
        if least is not None and least > most:
            raise InputError(f"task.min_{name}: {least} is more than task.{name} ({most}); lower it, or leave it out")
    if config.data.name in ("omniglot", "folder"):
        for name, ways in (("ways", task.ways), ("min_ways", task.min_ways)):
            if ways is not None and ways < 2:
                raise InputError(f"task.{name}: {ways} must be 2 or more for classification; set it, 5 is common")
    if ":" not in config.model.name and config.model.name not in ("mlp", *IMAGE_MODELS):
        raise InputError(f"model.name: {config.model.name!r} must be mlp, {', '.join(IMAGE_MODELS)} or package.module:Class; "
                         "change it")
    if config.model.name in IMAGE_MODELS and config.data.name == "sinusoid":
        raise InputError(f"model.name: {config.model.name} takes images, data.name sinusoid has none; use mlp")


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(asdict(config), sort_keys=False)


def flat_values(config: Config) -> dict[str, Any]:
    """Dotted key -> value, for params and comparisons."""
    return flat(asdict(config), "")


# What may change between the parts of one run: where and how long it runs and is watched, not what it computes.
_CIRCUMSTANCES = ("data.root", "data.resident", "task.chunk", "engine.", "evaluation.", "checkpoint.", "tracking.",
                  "iterations", "device", "loss_threshold", "run_dir")


def trajectory(config: Config) -> dict[str, Any]:
    """The keys that decide every bit of theta: two runs that agree in them are parts of one run."""
    return {name: value for name, value in flat_values(config).items() if not name.startswith(_CIRCUMSTANCES)}


def run_dir(config: Config) -> Path:
    """The run's folder: the one given, or one that the same configuration always finds again, so that the same command
    resumes."""
    if config.run_dir:
        return Path(config.run_dir)
    digest = hashlib.sha256(json.dumps(trajectory(config), sort_keys=True).encode()).hexdigest()[:8]
    task, rates = config.task, config.rates
    name = config.data.name.replace(":", ".")
    return Path("runs") / (f"{name}-{task.ways}w{task.shots}s-{rates.rule}-a{rates.alpha:g}-b{rates.beta:g}-s{config.seed}"
                           f"-{digest}")
