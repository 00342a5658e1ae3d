"""Bad configurations and bad command lines."""
from __future__ import annotations

import datetime
import functools
import itertools
import typing
from pathlib import Path

import file_areas
import fuzz
import run_areas
import yaml
from hypothesis import strategies as st
from hypothesis.strategies import DataObject

from alpha_maml.errors import InputError
from alpha_maml.launch import cli
from alpha_maml.trainer import config as configuration
from alpha_maml.trainer.config.keys import UNION, table

NAMES = sorted(table())
NASTY = ("", " ", "null", "~", "nan", "inf", "-inf", "1e999", "-1", "0", "1e-400", "0x10", "1_0", "1:30", "é", "\u202e", "🙈",
         "a\nb", "\x1b[31m", "\x00", "..", "../x", "a" * 300, "9" * 400, "true", "[]", "{}", "{a: 1}", "{a: {b: [1, .nan]}}",
         "[", "*a", "!!python/object/apply:os.system [touch owned]", "os:system", "..a:b", ":", "a:", ":b",
         "collections:OrderedDict", "math:pi", "folder", "omniglot", "conv4", "resnet12", "paper", "fixed", "adam",
         "layer_step", "head", "*", "?", "[a", "%s", "{0}", "1e3", "5", "2", "1")
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(1, 8), st.sampled_from([2**31, 2**63, -2**63, 10**40]),
    st.floats(), st.floats(1e-6, 10), st.sampled_from(NASTY), st.text(max_size=30), st.binary(max_size=8),
    st.just(datetime.date(2020, 1, 1)), st.just({1, 2}))
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), v,
                                                                                    max_size=3), max_leaves=5)
FITTING = {int: (0, 1, 2, 3, 5, 10, 10**9, 10**40), float: (0, 1e-320, 1e-30, 1e-6, 0.01, 0.5, 1, 9.9, 1e6, 1e38, 1e300),
           bool: (False, True), str: NASTY, dict: ({}, {"hidden": 8}, {"a": [1, {"b": None}]}), type(None): (None,)}


@functools.cache
def fitting(name: str) -> st.SearchStrategy:
    """Values of a key's own type: small, usual and extreme."""
    key = table()[name]
    kind = typing.Literal[tuple(key.registry.places)] if key.registry and len(key.registry.places) > 1 else key.kind
    kinds = typing.get_args(kind) if typing.get_origin(kind) in UNION else (kind,)
    return st.sampled_from([value for k in kinds for value in FITTING.get(k) or typing.get_args(k)])  # a Literal's own


# What is expensive is only read, and then cut down to what trains in a moment.
MOST = {"iterations": 2, "evaluation.tasks": 3, "task.batch": 3, "task.shots": 4, "task.queries": 4, "task.ways": 3,
        "inner.steps": 3, "model.channels": 16, "data.size": 16}
DAMAGE = ("none", "none", "twice", "anchor", "merge", "itself", "bomb", "merge bomb", "deep", "tag", "digits", "cut", "text")
TAGS = ("int", "float", "bool", "timestamp", "binary", "null", "set", "omap", "map", "python/name:os.system")
DIGITS = ("\nseed: {}\n", "\nmodel: {{args: {{x: {}}}}}\n", "\n{}: 1\n")
ALWAYS = {"run_dir": "run", "tracking.uri": "disabled", "compile": "false", "engine.name": "torch", "device": "cpu",
          "data.root": "images", "evaluation.every": "0"}


@st.composite
def documents(draw) -> str:
    """A configuration's YAML: some keys with any values, in sections, and then perhaps damaged as a text."""
    content, usual = {}, draw(st.booleans())  # half of them are only unusual in their values
    for name in draw(st.lists(st.sampled_from(NAMES) if usual else st.sampled_from(NAMES) | st.text(max_size=8), max_size=4)):
        section, _, leaf = name.rpartition(".")
        place = content.setdefault(section, {}) if section and draw(st.booleans()) else content
        if isinstance(place, dict):
            values = fitting(name) if name in NAMES and (usual or draw(st.booleans())) else VALUES
            place[leaf if place is not content else name] = draw(values)
    text, damage = dumped(content), "none" if usual else draw(st.sampled_from(DAMAGE))
    if damage == "twice":
        text += text
    elif damage == "anchor":
        text += f"\nrates: &a {dumped(draw(VALUES), True)}\ninner: *a\n"
    elif damage == "merge":
        text = "model: {args: &a {x: 1, y: 2}}\ndata: {args: {<<: *a, y: 3}}\n" + text
    elif damage == "itself":
        text += "\nmodel: {args: &a {x: *a}}\n"
    elif damage == "bomb":
        text = bomb("[{}]", draw(st.integers(1, 12))) + text
    elif damage == "merge bomb":
        text = bomb("{{<<: [{}]}}", draw(st.integers(1, 12)), "{x: 1, y: 2}") + text
    elif damage == "deep":
        text += "\nmodel: {args: " + "[" * 5000
    elif damage == "tag":
        text += f"\nseed: !!{draw(st.sampled_from(TAGS))} {draw(st.sampled_from(('', 'x', '-', '0x')))}\n"
    elif damage == "digits":
        text += draw(st.sampled_from(DIGITS)).format(f"0x{'f' * 5000}")
    elif damage == "cut":
        text = text[:draw(st.integers(0, len(text)))]
    elif damage == "text":
        text = draw(st.text(max_size=60))
    return text


def dumped(content: object, flow: bool = False) -> str:
    try:
        return yaml.safe_dump(content, default_flow_style=flow, allow_unicode=True).removesuffix("...\n")
    except ValueError:  # a number of more digits than Python writes
        return f"seed: 0x{'f' * 5000}"


def bomb(form: str, levels: int, first: str = "[1]") -> str:
    """Nine references to the level before in each: 9 ** levels in all."""
    lines = [f"a0: &a0 {first}"] + [f"a{i}: &a{i} " + form.format(", ".join([f"*a{i - 1}"] * 9)) for i in range(1, levels)]
    return "\n".join(["data:", "  args:", *(f"    {line}" for line in lines)]) + "\n"


def configuration_case(data: DataObject, folder: Path) -> str:
    text = data.draw(documents())
    (folder / "c.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        config = configuration.build(Path("c.yaml"), {})
    except InputError as error:
        outcome = fuzz.refused(error)
        assert fuzz.commanded(["train", "--config", "c.yaml"]) == outcome
        return outcome
    assert not Path("owned").exists()
    Path("again.yaml").write_text(configuration.to_yaml(config), encoding="utf-8")
    assert repr(configuration.build(Path("again.yaml"), {})) == repr(config), "what is written is not what is read"
    configuration.run_dir(config)
    for c, i in itertools.product(range(16), range(9)):
        image = folder / "images" / f"c{c:02}" / f"{i}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(file_areas.picture(size=(9, 9), mode="RGB"))
    return trained(config)


def trained(config: configuration.Config) -> str:
    values = configuration.flat_values(config)
    small = ALWAYS | {name: str(most) for name, most in MOST.items() if values[name] is None or values[name] > most}
    return fuzz.commanded(["train", "--config", "again.yaml", *(f"--{name}={value}" for name, value in small.items())],
                          Path("run/summary.json"))


@functools.cache
def options(verb: str) -> dict[str, bool]:
    """A verb's options, and whether each takes a value."""
    sub = cli.parser()._subparsers._group_actions[0].choices[verb]
    return {option: action.nargs != 0 for action in sub._actions for option in action.option_strings
            if option not in ("-h", "--help")}


# A verb's ends, after whatever was drawn: what keeps it short and inside the folder (the last word counts).
ENDS = {
    "train": ALWAYS | MOST | {"task.ways": 1},
    "sweep": ALWAYS | MOST | {"task.ways": 1, "iterations": 1, "jobs": 1},
    "slurm": {"dry-run": None, "run_dir": "run"},
    "evaluate": {"evaluation.tasks": 2, "out": "out"}, "adapt": {"out": "out"}, "export": {"out": "out.safetensors"},
    "report": {"out": "out.png"}, "sync": {},
}


REQUIRED = {
    "sweep": {"--grid": "rates.alpha=1e-2,1"}, "adapt": {"--run_dir": "run", "--support": "s.npz", "--query": "q.npz"},
    "report": {"--runs": "run"}, "export": {"--run_dir": "run"}, "sync": {"--run_dir": "run"}, "evaluate": {"--run_dir": "run"},
}
WRONG = ("--rates.alpa", "--", "-x", "--é", "--jobs=", "--seed", "x")
WORDS = ("run", "c.yaml", "none", ".", "s.npz", "q.npz", "out.png", "1/1", "2/1", "0/0", "rates.alpha=1,2", "rates.alpha=1,1",
         "seed=1", "rates.alpha=", "=", "rates=1", "task.batch=1,x", "rates.rule=fixed,paper", "data.args={a: 1}", "run_dir=x",
         "1:00:00")


@st.composite
def lines(draw) -> list[str]:
    """Words of a command line."""
    verb = draw(st.sampled_from(sorted(cli.VERBS)))
    words, known = [verb], options(verb)
    for option in REQUIRED.get(verb, {}):
        if draw(st.integers(0, 5)):
            words += [option, REQUIRED[verb][option]]
    for option in draw(st.lists(st.sampled_from(sorted(known)) | st.sampled_from(WRONG), max_size=3)):
        value = draw(st.sampled_from(NASTY) | st.text(max_size=20) | st.sampled_from(WORDS)).replace("\x00", "")
        form = draw(st.sampled_from(("two", "two", "one", "none")))
        if form == "none" or not known.get(option, True):
            words.append(option)
        else:
            words += [option, value] if form == "two" else [f"{option}={value}"]
    if verb == "sweep" and draw(st.booleans()):
        words.append("--vectorised")
    for name, value in ENDS[verb].items():
        if value is None or f"--{name}" in known:
            words.append(f"--{name}" if value is None else f"--{name}={value}")
    return words


def command_case(data: DataObject, folder: Path) -> str:
    words = data.draw(lines())
    if any(word.rpartition("=")[2].startswith(("/", "..")) for word in words):  # nothing outside the folder
        words = [word.replace("/", "_").replace("..", "_") for word in words]
    run_areas.copied("run" if words[0] not in ("train", "sweep", "slurm") else "other")
    run_areas.write_examples(folder)
    Path("c.yaml").write_text("task: {batch: 2}\n")
    return fuzz.commanded(words)


AREAS = [
    fuzz.Area("configurations", "every key with wrong types, extremes, NaN, unicode, dates and sets; keys that stand twice, "
              "anchors, merges, aliases to themselves and bombs of them, tags, cut and random text", 34, configuration_case),
    fuzz.Area("command lines", "all verbs; options left out, doubled, without a value, misspelt, and with any text", 16,
              command_case),
]
