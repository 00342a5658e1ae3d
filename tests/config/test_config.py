"""Configuration: what is read, and the one line for whatever is wrong."""
from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from processes import ROOT

from alpha_maml.errors import InputError
from alpha_maml.trainer.config import build, of_run, run_dir, to_yaml, trajectory
from alpha_maml.trainer.config.keys import Config, table


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.name)
def test_shipped_files_are_valid(path: Path):
    assert isinstance(build(path, {}), Config)


def test_the_command_line_outweighs_the_file_and_the_file_the_defaults(tmp_path: Path):
    file = tmp_path / "c.yaml"
    file.write_text("iterations: 7\nrates: {alpha: 1e-2, beta: 0.5}\nmodel: {args: {pooled: true}}\n")
    config = build(file, {"rates.beta": "2e-3", "model.channels": "null", "iterations": "1e2"})
    assert (config.iterations, config.rates.alpha, config.rates.beta, config.seed) == (100, 0.01, 0.002, 0)
    assert config.model.args == {"pooled": True} and config.model.channels is None


def test_a_resolved_file_reads_back_the_same(tmp_path: Path):
    config = build(None, {"rates.alpha": "3e-7", "rates.minimum": "1e-9", "run_dir": "null", "model.args": "{a: 1}"})
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert build(tmp_path / "c.yaml", {}) == config


def test_every_key_has_a_meaning():
    assert all(key.meaning for key in table().values())


WRONG = {  # YAML: what its line must name
    "rates: {alpa: 1}": ("rates.alpa", "did you mean rates.alpha"),
    "iteration: 3": ("iteration", "did you mean iterations"),
    "zzz: 3": ("zzz", "--help"),
    "rates: {alpha: fast}": ("rates.alpha", "fast", "finite number"),
    "rates: {alpha: -0.1}": ("rates.alpha", "-0.1", "greater than 0"),
    "rates: {alpha: .nan}": ("rates.alpha", "nan", "finite"),
    "rates: {alpha: [1]}": ("rates.alpha", "[1]", "finite number"),
    "rates: {alpha: true}": ("rates.alpha", "True", "finite number"),
    "rates: {rule: magic}": ("rates.rule", "magic", "adaptive, paper, fixed"),
    "rates: {minimum: 1, maximum: 1}": ("rates.minimum", "under rates.maximum"),
    "rates: {alpha: 10000}": ("rates.alpha", "10000", "rates.maximum"),
    "rates: 3": ("rates", "3", "section"),
    "rates: [alpha]": ("rates", "section"),
    "task: {batch: 1.5}": ("task.batch", "1.5", "whole number"),
    "task: {batch: 0}": ("task.batch", "0", "1 or more"),
    "task: {batch: 1e999}": ("task.batch", "whole number"),
    "task: {ways: 5}": ("task.ways", "5", "regression"),
    "data: {name: omniglot}\nmodel: {name: conv4}": ("task.ways", "1", "2 or more"),
    "data: {root: ''}": ("data.root", "not empty"),
    "data: {name: mnist}": ("data.name", "mnist", "package.module:Class"),
    "data: {name: folder}": ("data.root", "null", "holds the images"),
    "data: {size: 0}": ("data.size", "0", "1 or more"),
    "data: {colour: grey}": ("data.colour", "grey", "true or false"),
    "data: {name: folder, root: x}\ntask: {ways: 5, min_ways: 1}": ("task.min_ways", "1", "2 or more"),
    "data: {name: omniglot}\ntask: {ways: 5, min_ways: 6}": ("task.min_ways", "6", "task.ways (5)"),
    "task: {min_ways: 2}": ("task.min_ways", "2", "task.ways (1)"),
    "task: {shots: 3, min_shots: 4}": ("task.min_shots", "4", "task.shots (3)"),
    "task: {min_shots: 0}": ("task.min_shots", "0", "1 or more"),
    "inner: {order: reptile, per_step: '*bias'}": ("inner.per_step", "*bias", "second or first"),
    "model: {name: conv5}": ("model.name", "conv5", "conv4_pooled"),
    "model: {name: conv4}": ("model.name", "images"),
    "model: {args: 3}": ("model.args", "3", "mapping"),
    "seed: -1": ("seed", "-1"),
    "seed: 99999999999999999999": ("seed", "2^63"),
    "device: tpu": ("device", "tpu", "auto, cpu, cuda"),
    "precision: bfloat16": ("precision", "bfloat16", "float32, tf32, float64"),
    "capture: true\nengine: {name: deepspeed}": ("capture", "true", "engine.name torch"),
    "capture: true\ndevice: cpu": ("capture", "true", "a GPU"),
    "capture: 1": ("capture", "1", "true or false"),
    "precision: tf32\nengine: {name: deepspeed}": ("precision", "tf32", "float32"),
    "seed: 1\nseed: 2": ("seed", "twice", "line 2"),
    "rates: {": ("YAML", "line"),
    "- a\n- b": ("list", "mapping"),
    "a: !!python/object/apply:os.system ['true']": ("YAML",),
    "seed: !!int ''": ("YAML", "correct it"),
    "seed: !!bool x": ("YAML", "correct it"),
    f"seed: 0x{'f' * 5000}": ("seed", "whole number"),
    "task: {batch: 10000000000}": ("task.batch", "10^9"),
    "engine: {timeout: 1e300}": ("engine.timeout", "10^7"),
    "inner: {weight_decay: 1e300}": ("inner.weight_decay", "10^9"),  # no number of float32
    "outer: {weight_decay: 1e300}": ("outer.weight_decay", "10^9"),
    "data: {args: {day: 2020-01-01}}": ("data.args", "mapping"),
    "data: {args: {1: 2}}": ("data.args", "mapping"),
    "model: {args: {x: .nan}}": ("model.args", "mapping"),
    "model: {args: {x: 18446744073709551616}}": ("model.args", "mapping"),
    "model: {args: &a {x: *a}}": ("YAML", "alias"),
    '"rates.alpha\\n": 1': (r"rates.alpha\n: no such key",),
    f"rates: {'x' * 10_000}": ("rates", "section"),
    "tracking: {uri: 'http://user:hush@host'}": ("tracking.uri", "MLFLOW_TRACKING_PASSWORD", "PGPASSWORD"),
    "1: 2": ("1", "no such key"),
    "? {a: 1}\n: 2": ("YAML",),
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_input_is_one_line_that_names_it(text: str, tmp_path: Path):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        build(file, {})
    line = str(caught.value)
    assert "\n" not in line
    for word in WRONG[text]:
        assert word in line, line


@pytest.mark.parametrize("content", (b"\xff\xfe", b"a: \x00", b"\xc3\x28: 1"))
def test_bytes_that_are_no_text_are_one_line(content: bytes, tmp_path: Path):
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(InputError, match="not valid YAML"):
        build(tmp_path / "c.yaml", {})


def test_a_missing_file_is_one_line(tmp_path: Path):
    with pytest.raises(InputError, match="is not a file"):
        build(tmp_path / "none.yaml", {})


def test_the_folder_follows_what_decides_theta_and_nothing_else():
    base = build(None, {})
    assert run_dir(base) == run_dir(build(None, {"iterations": "9", "checkpoint.every": "1", "engine.timeout": "9"}))
    assert run_dir(base) != run_dir(build(None, {"seed": "1"}))
    assert run_dir(build(None, {"run_dir": "x"})) == Path("x")
    assert set(trajectory(base)) < set(table())


def test_yaml_of_a_configuration_is_plain():
    assert yaml.safe_load(to_yaml(Config())) == asdict(Config())


def test_anchors_and_merges_mean_what_they_say(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("model: {args: &a {x: 1, y: 2}}\ndata: {args: {<<: *a, y: 3}}\nrates: &r {alpha: 0.5}\n")
    config = build(tmp_path / "c.yaml", {})
    assert config.model.args == {"x": 1, "y": 2} and config.data.args == {"x": 1, "y": 3} and config.rates.alpha == 0.5


@pytest.mark.parametrize("form", ("[{}]", "{{<<: [{}]}}"))
def test_a_bomb_of_aliases_or_merges_does_not_go_off(form: str, tmp_path: Path):
    """Nine references to the level before, over twenty levels."""
    lines = ["a0: &a0 {x: 1}"] + [f"a{i}: &a{i} " + form.format(", ".join([f"*a{i - 1}"] * 9)) for i in range(1, 20)]
    (tmp_path / "c.yaml").write_text("data:\n args:\n" + "".join(f"  {line}\n" for line in lines))
    with pytest.raises(InputError, match="more than 10000 values"):
        build(tmp_path / "c.yaml", {})


@pytest.mark.parametrize("uri", ("http://user:hush@127.0.0.1:5000", "postgresql://me:hush@host/db", "mysql://host/db?password=hush"))
def test_a_password_is_refused_and_never_shown(uri: str, tmp_path: Path):
    (tmp_path / "c.yaml").write_text(f"tracking: {uri}\n")
    for make in (lambda: build(None, {"tracking.uri": uri}), lambda: build(tmp_path / "c.yaml", {}),
                 lambda: build(None, {"tracking.url": uri}), lambda: build(None, {"seed": uri})):
        with pytest.raises(InputError) as caught:
            make()
        assert "hush" not in str(caught.value)
    for plain in ("http://127.0.0.1:5000", "postgresql://me@host/db", "sqlite:////a:b/c@d.db", "disabled"):
        assert build(None, {"tracking.uri": plain}).tracking.uri == plain


def test_a_path_that_no_file_system_has_is_one_line(tmp_path: Path):
    for read in (lambda: build(tmp_path / ("x" * 300), {}), lambda: of_run(tmp_path / ("x" * 300), {})):
        with pytest.raises(InputError, match="cannot be read .File name too long"):
            read()
