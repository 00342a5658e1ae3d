"""A run's configuration, read from YAML and the command line, checked, and written.

Sources, weakest first: the defaults of trainer/keys.py, the YAML file, `--section.key value` on the command line. Whatever is
wrong ends in one InputError line. This module imports neither torch nor anything slow, so that `--help` answers at once.
"""
from __future__ import annotations

import difflib
import hashlib
import json
import math
import reprlib
import types
import typing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from data.errors import InputError, first_line, one_line, reading
from trainer.keys import UNION, Config, keys, spelled

IMAGE_MODELS = ("conv4", "conv4_pooled", "resnet12")
NODES = 10_000  # values that a file may hold, those that aliases repeat counted each time


def _converted(value: Any, kind: Any) -> Any:
    """`value` as `kind`; raises ValueError where it is not one."""
    if typing.get_origin(kind) in UNION:
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
    elif kind is dict and isinstance(value, dict):
        return _plain(value)
    elif kind in (str, bool) and isinstance(value, kind):
        return value
    raise ValueError


def _plain(value: Any) -> Any:
    """`value` where it is what JSON can hold as well; raises ValueError where it is not (YAML has dates, sets, and more)."""
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str) or (isinstance(value, float) and math.isfinite(value)) or (
            isinstance(value, int) and abs(value) < 2**64):
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
    shown = _shown(value)
    try:
        value = _converted(value, kind)
    except (ValueError, OverflowError):
        raise InputError(f"{name}: {shown!r} must be {spelled(kind)}; change it ({where})") from None
    rule = item.metadata["rule"]
    if rule and value is not None and not rule[0](value):
        raise InputError(f"{name}: {shown!r} {rule[1]}; change it ({where})")
    return value


def _shown(value: Any) -> str:
    try:
        text = one_line(value) if isinstance(value, str) else reprlib.repr(value)
    except ValueError:  # Python does not write it
        text = "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key that stands twice is an error, and aliases cannot grow without bound."""

    def __init__(self, text: str):
        super().__init__(text)
        self.sizes: dict[yaml.Node, int] = {}  # with all that its aliases stand for

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        alias, mark = self.check_event(yaml.AliasEvent), self.peek_event().start_mark
        node = super().compose_node(parent, index)
        if alias and node not in self.sizes:
            raise yaml.MarkedYAMLError(problem="an alias stands for what it is in", problem_mark=mark)
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in parts for part in pair]
        self.sizes[node] = 1 + sum(self.sizes[part] for part in parts)
        if self.sizes[node] > NODES:
            raise yaml.MarkedYAMLError(problem=f"it holds more than {NODES} values", problem_mark=mark)
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, seen = super().compose_mapping_node(anchor), set()
        for name, _ in node.value:
            if isinstance(name, yaml.ScalarNode) and name.tag != "tag:yaml.org,2002:merge":
                if name.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"the key {name.value} stands twice", problem_mark=name.start_mark)
                seen.add(name.value)
        return node


def _parsed(text: str) -> Any:
    """What a YAML text holds; raises ValueError, which says why it holds nothing."""
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # PyYAML raises a dozen kinds, such as an IndexError of an empty !!int
        mark = getattr(error, "problem_mark", None)
        place = f", at line {mark.line + 1}" if mark else ""
        raise ValueError(f"{getattr(error, 'problem', None) or first_line(error)}{place}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The file's keys, dotted, not yet checked against their types; raises InputError."""
    with reading("--config"):
        if not path.is_file():
            raise InputError(f"--config: {path} is not a file; give the path of a YAML file, such as those under configs/")
        content = path.read_bytes()
    try:
        content = _parsed(content.decode())
    except ValueError as error:  # or no UTF-8
        raise InputError(f"--config: {path} is not valid YAML ({error}); correct it") from None
    if not isinstance(content, dict | None):
        raise InputError(f"--config: {path} holds {type(content).__name__}, it must hold a mapping of keys; correct it")
    return flat(content or {}, str(path))


def flat(content: dict, where: str, prefix: str = "") -> dict[str, Any]:
    """A nested mapping as dotted keys; raises InputError where a section is not one."""
    sections, found = {name.split(".")[0] for name in keys() if "." in name}, {}
    for name, value in content.items():
        if not prefix and name in sections:
            if not isinstance(value, dict | None):
                raise InputError(f"{name}: {_shown(value)!r} must be a section of keys ({where}); indent its keys below it")
            found |= flat(value or {}, where, f"{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def from_text(name: str, text: str) -> Any:
    """What a command-line value means for a key: YAML, but text stays text."""
    kind = keys()[name][1] if name in keys() else str
    if text == "null":
        return None
    if {dict, bool} & {kind, *typing.get_args(kind)}:
        try:
            return _parsed(text)
        except ValueError:
            return text
    return text


def build(file: Path | None, overrides: dict[str, str]) -> Config:
    """The checked configuration of a file (or of the defaults) and of the command line; raises InputError."""
    return of(read_yaml(file) if file else {}, f"in {file}", overrides)


def of_run(folder: Path, overrides: dict[str, str]) -> Config:
    """The configuration of the run in `folder`, with what the command line changes; raises InputError."""
    with reading("run_dir"):
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
    if config.inner.per_step is not None and config.inner.order == "reptile":
        raise InputError(f"inner.per_step: {config.inner.per_step} is learned by the meta-gradient, and inner.order reptile "
                         "moves only what adapts; leave it out, or use order second or first")
    if config.inner.recompute and config.model.randomness != "error":
        raise InputError("inner.recompute: true would draw model.randomness anew where it computes anew; leave it null, or set "
                         "model.randomness to error")
    if config.compile and config.model.randomness != "error":
        raise InputError("compile: true would draw other numbers than model.randomness promises; leave one of them out")
    if config.capture and (config.engine.name != "torch" or config.model.randomness != "error" or config.device == "cpu"):
        raise InputError("capture: true needs engine.name torch, model.randomness error, and a GPU; leave it null")
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
                  "iterations", "device", "compile", "capture", "loss_threshold", "run_dir")


def trajectory(config: Config) -> dict[str, Any]:
    """The keys that decide every bit of theta: two runs that agree in them are parts of one run."""
    return {name: value for name, value in flat_values(config).items() if not name.startswith(_CIRCUMSTANCES)}


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
    digest = hashlib.sha256(json.dumps(trajectory(config), sort_keys=True).encode()).hexdigest()[:8]
    task, rates = config.task, config.rates
    name = config.data.name.replace(":", ".")
    return Path("runs") / (f"{name}-{task.ways}w{task.shots}s-{rates.rule}-a{rates.alpha:g}-b{rates.beta:g}-s{config.seed}"
                           f"-{digest}")
