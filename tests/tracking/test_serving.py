"""The exported weights, and the learner as an MLflow model: a real server, a real request, the numbers of `predict_proba`."""
from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from processes import succeed, wrong
from safetensors.torch import load_file, save
from serving import Post, serving

from alpha_maml import load
from alpha_maml.errors import InputError
from alpha_maml.models.build import build as build_model
from alpha_maml.trainer.runs import checkpoint

WAYS = 3
TRAIN = ("train", "--iterations", 20, "--evaluation.tasks", 8)


@pytest.fixture(scope="module")
def drawing(tmp_path_factory: pytest.TempPathFactory, omniglot_root: str) -> Path:
    """A tracked run of Omniglot."""
    folder = tmp_path_factory.mktemp("drawing") / "run"
    succeed(*TRAIN, "--data.name", "omniglot", "--data.root", omniglot_root, "--model.name", "conv4", "--model.channels", 4,
            "--task.ways", WAYS, "--task.shots", 1, "--task.queries", 2, "--task.batch", 2, "--run_dir", folder)
    return folder


@pytest.fixture(scope="module")
def curve(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untracked run of sinusoids, with an average of theta."""
    folder = tmp_path_factory.mktemp("curve") / "run"
    succeed(*TRAIN, "--task.batch", 4, "--tracking.uri", "disabled", "--run_dir", folder)
    return folder


def test_exported_weights_are_a_state_dict_and_a_learner(curve: Path, tmp_path: Path):
    file = tmp_path / "weights.safetensors"
    result = succeed("export", "--run_dir", curve, "--out", file)
    assert result.stdout == f"{file}\n" and result.stderr == "alpha-maml: not in MLflow (tracking.uri is disabled)\n"
    model = build_model("mlp", (1,), 1, 0, None, {})
    missing, unexpected = model.load_state_dict(load_file(file), strict=False)
    assert not missing and unexpected == ["rates.alpha"]
    state = checkpoint.read(checkpoint.saved(curve / "checkpoints")[-1])
    for name, p in model.named_parameters():
        assert torch.equal(p, state[f"outer.average.{name}"]) and not torch.equal(p, state[f"theta.{name}"])
    x = np.linspace(-5, 5, 20)[:, None]
    expected, found = (load(path).fit(x[::2], np.sin(x[::2]), 3).predict(x) for path in (curve, file))
    assert np.array_equal(found, expected)
    assert str(curve.parent) not in file.read_bytes()[:4000].decode(errors="ignore"), "names this machine"


def test_a_rate_for_every_number_is_a_tensor_of_the_file(tmp_path: Path):
    """As text it would outgrow the metadata."""
    folder, file = tmp_path / "run", tmp_path / "weights.safetensors"
    succeed("train", "--iterations", 2, "--task.batch", 2, "--evaluation.tasks", 2, "--tracking.uri", "disabled",
            "--model.channels", 1000, "--rates.alpha_shape", "parameter", "--run_dir", folder)
    load(folder).save(file)
    tensors = load_file(file)
    assert torch.equal(tensors["rates.alpha"], load(folder).alpha) and tensors["rates.alpha"].numel() == 1_004_001
    assert file.stat().st_size < 1.01 * sum(t.nbytes for t in tensors.values())
    x = np.linspace(-5, 5, 20)[:, None]
    found, expected = (load(path).fit(x, np.sin(x)).predict(x) for path in (file, folder))
    assert np.array_equal(found, expected)


def test_what_is_no_export_is_one_line(curve: Path, tmp_path: Path):
    succeed("export", "--run_dir", curve)
    whole = (curve / "model.safetensors").read_bytes()
    for content in (None, b"", b"no weights", whole[:-1], (checkpoint.saved(curve / "checkpoints")[-1]
                                                           / "state.safetensors").read_bytes()):
        file = tmp_path / "x.safetensors"
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(InputError, match="is not a whole file of `alpha-maml export`"):
            load(file)
    with safetensors.safe_open(curve / "model.safetensors", "pt") as saved:
        facts, theta = saved.metadata(), load_file(curve / "model.safetensors")
    for changed, tensors, words in (
            ({}, theta | {"rates.alpha": torch.zeros(2)}, "alpha of shape .2., rates.alpha_shape layer_step has .1, 6."),
            ({"config": "[" * 100_000}, theta, "is not a whole file"), ({"config": "[]"}, theta, "is not a whole file"),
            ({"config": '{"seed": null}'}, theta, "seed: 'None' must be a whole number"),
            ({}, {name: t.reshape(-1) for name, t in theta.items()}, "does not hold alpha and the parameters"),
            ({}, {name: t.to(torch.complex64) for name, t in theta.items()}, "does not hold alpha and the parameters")):
        file.write_bytes(save(tensors, facts | changed))
        with pytest.raises(InputError, match=words):
            load(file)
    for arguments, words in ((("--run_dir", tmp_path), "is not a run's folder"),
                             (("--run_dir", curve, "--out", tmp_path / "a.pt"), "must end in .safetensors"),
                             (("--run_dir", curve, "--out", tmp_path / "none/a.safetensors"), "cannot be written")):
        assert words in wrong("export", *arguments)


def test_a_served_model_answers_as_the_learner_does(drawing: Path, tmp_path: Path):
    file, line = succeed("export", "--run_dir", drawing).stdout.splitlines()
    assert file == str(drawing / "model.safetensors")
    with serving(line, Path(sys.executable), tmp_path) as ask:
        assert_answers(drawing, ask)


def assert_answers(drawing: Path, ask: Post) -> None:
    random = np.random.default_rng(0)
    support, query = random.random((2 * WAYS, 1, 28, 28), np.float32), random.random((7, 1, 28, 28), np.float32)
    labels = np.arange(2 * WAYS) % WAYS * 10
    inputs = {"support_x": support.tolist(), "support_y": labels.tolist(), "query_x": query.tolist()}
    for params, steps in (({}, 1), ({"params": {"inner_steps": 3}}, 3)):
        code, answer = ask({"inputs": inputs} | params)
        assert code == 200, answer
        expected = load(drawing).fit(support, labels, steps).predict_proba(query)
        assert np.abs(np.array(answer["predictions"]) - expected).max() < 1e-12
    small = {name: values[:WAYS] for name, values in inputs.items()}
    for content, words in (
            ({"inputs": small | {"support_y": [0, 0, 0]}}, "support_y holds 1 classes"),
            ({"inputs": small | {"support_y": [0, 1]}}, "support_y has 2 entries, support_x 3"),
            ({"inputs": small, "params": {"inner_steps": -1}}, "steps is -1, it must be 0 or more"),
            ({"inputs": small, "params": {"inner_steps": "many"}}, "inner_steps"),
            ({"inputs": small | {"query_x": [[1.0]]}}, "query_x"),
            ({"inputs": {"support_x": small["support_x"]}}, "support_y"),
            ({"nothing": 1}, "inputs")):
        code, answer = ask(content)
        assert code == 400 and words in answer["message"], (code, answer["message"][-300:])
