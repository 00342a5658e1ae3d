"""A run's configuration, read from YAML and the command line, checked, and written.

Sources, weakest first: the defaults of keys.py, the YAML file, `--section.key value` on the command line. Whatever is
wrong ends in one InputError line. """
from __future__ import annotations

import difflib
import math
import reprlib
import types
import typing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from alpha_maml.errors import InputError, one_line, reading
from alpha_maml.trainer.config.document import parsed
from alpha_maml.trainer.config.keys import UNION, Config, spelled, table
from alpha_maml.trainer.config.together import check_together


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
    known = table()
    if name not in known:
        close = difflib.get_close_matches(name, known, 1, 0.5)
        raise InputError(f"{name}: no such key ({where}); " + (f"did you mean {close[0]}?" if close else
                         "`alpha-maml train --help` lists all"))
    key, shown = known[name], _shown(value)
    try:
        value = _converted(value, key.kind)
    except (ValueError, OverflowError):
        raise InputError(f"{name}: {shown!r} must be {spelled(key.kind)}; change it ({where})") from None
    if key.rule and value is not None and not key.rule[0](value):
        raise InputError(f"{name}: {shown!r} {key.rule[1]}; change it ({where})")
    if key.registry and value is not None:
        key.registry.check(value, where)
    return value


def _shown(value: Any) -> str:
    try:
        text = one_line(value) if isinstance(value, str) else reprlib.repr(value)
    except ValueError:  # Python does not write it
        text = "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."


def read_yaml(path: Path) -> dict[str, Any]:
    """The file's keys, dotted, not yet checked against their types; raises InputError."""
    with reading("--config"):
        if not path.is_file():
            raise InputError(f"--config: {path} is not a file; give the path of a YAML file, such as those under configs/")
        content = path.read_bytes()
    try:
        content = parsed(content.decode())
    except ValueError as error:  # or no UTF-8
        raise InputError(f"--config: {path} is not valid YAML ({error}); correct it") from None
    if not isinstance(content, dict | None):
        raise InputError(f"--config: {path} holds {type(content).__name__}, it must hold a mapping of keys; correct it")
    return flat(content or {}, str(path))


def flat(content: dict, where: str, prefix: str = "") -> dict[str, Any]:
    """A nested mapping as dotted keys; raises InputError where a section is not one."""
    sections, found = {name.split(".")[0] for name in table() if "." in name}, {}
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
    kind = table()[name].kind if name in table() else str
    if text == "null":
        return None
    if {dict, bool} & {kind, *typing.get_args(kind)}:
        try:
            return parsed(text)
        except ValueError:
            return text
    return text


def build(file: Path | None, overrides: dict[str, str]) -> Config:
    """The checked configuration of a file (or of the defaults) and of the command line; raises InputError."""
    return from_keys(read_yaml(file) if file else {}, f"in {file}", overrides)


def of_run(folder: Path, overrides: dict[str, str]) -> Config:
    """The configuration of the run in `folder`, with what the command line changes; raises InputError."""
    with reading("run_dir"):
        if not (folder / "config.yaml").is_file():
            raise InputError(f"run_dir: {folder} is not a run's folder (it has no config.yaml); give one that is")
    return build(folder / "config.yaml", overrides)


def from_keys(content: dict[str, Any], where: str, overrides: dict[str, str]) -> Config:
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


