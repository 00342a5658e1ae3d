"""Starts from files, runs and Hugging Face folders, and what a run keeps of frozen parameters."""
from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import alpha_maml
from alpha_maml import InputError
from alpha_maml.trainer.config import from_keys
from alpha_maml.trainer.engines.collective import World
from alpha_maml.trainer.runs import checkpoint
from alpha_maml.trainer.setup import set_up

SMALL = {"iterations": 3, "task.batch": 3, "evaluation.tasks": 3}
MLP = ("mlp", "sinusoid")


def first(**keys: object) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """theta and alpha before the first iteration."""
    _, state = set_up(from_keys({"task.batch": 3} | {name.replace("__", "."): v for name, v in keys.items()}, "", {}), World())
    return state.engine.theta(), state.rates.alpha


def test_from_a_file_with_what_does_not_match_named(tmp_path: Path, capsys):
    theta, _ = first(seed=5)
    save_file({name: p.contiguous() for name, p in theta.items() if name != "layers.1.bias"}, tmp_path / "a.safetensors")
    found, _ = first(model__init=str(tmp_path / "a.safetensors"))
    said = capsys.readouterr().err
    assert "5 tensors start from" in said and "others start anew, whose name or shape is not in it: layers.1.bias" in said
    assert all(torch.equal(found[name], theta[name]) == (name != "layers.1.bias") for name in theta)
    part, _ = first(model__init=str(tmp_path / "a.safetensors"), model__init_names="layers.3.*")
    assert [name for name in theta if torch.equal(part[name], theta[name])] == ["layers.3.weight", "layers.3.bias"]


def test_from_a_run_theta_and_alpha_and_the_run_does_not_need_it_any_more(tmp_path: Path):
    parent = alpha_maml.train(*MLP, config=SMALL, run_dir=tmp_path / "parent")
    state = checkpoint.read(checkpoint.saved(parent.folder / "checkpoints")[-1])
    theta, alpha = first(model__init=str(parent.folder))
    assert all(torch.equal(theta[name], state[f"outer.average.{name}"]) for name in theta)
    assert torch.equal(alpha, state["rates.alpha"])
    child = alpha_maml.train(*MLP, config=SMALL | {"model.init": str(parent.folder)}, run_dir=tmp_path / "child")
    shutil.rmtree(parent.folder)
    settings = SMALL | {"model.init": str(parent.folder), "iterations": 5}
    assert len(alpha_maml.train(*MLP, config=settings, run_dir=child.folder).history) == 5


def net() -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    model[0].requires_grad_(False)
    return model


def line(split: str, number: int) -> tuple:
    x = torch.linspace(0, 1, 6)[:, None]
    return (x[:3], number % 5 * x[:3]), (x[3:], number % 5 * x[3:])


def test_frozen_parameters_come_along_and_others_are_refused(tmp_path: Path):
    values = {name: t.clone() for name, t in nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).state_dict().items()}
    save_file(values, tmp_path / "a.safetensors")
    settings = SMALL | {"model.init": str(tmp_path / "a.safetensors")}
    run = alpha_maml.train(net(), line, config=settings, run_dir=tmp_path / "run")
    assert torch.equal(load_file(run.folder / "frozen.safetensors")["0.weight"], values["0.weight"])
    (tmp_path / "a.safetensors").unlink()
    again = alpha_maml.train(net(), line, config=settings | {"iterations": 4}, run_dir=tmp_path / "run")
    assert len(again.history) == 4
    again.learner.save(tmp_path / "learner.safetensors")
    assert torch.equal(load_file(tmp_path / "learner.safetensors")["frozen.0.weight"], values["0.weight"])
    plain = alpha_maml.train(net(), line, config=SMALL, run_dir=tmp_path / "plain")
    other = net()
    other[0].weight.data += 1
    with pytest.raises(InputError, match="model.name = python|other frozen parameters"):
        alpha_maml.train(other, line, config=SMALL | {"iterations": 4}, run_dir=plain.folder)


def test_from_a_folder_of_hugging_face(tmp_path: Path):
    import zoo  # noqa: F401  makes torchvision importable, which transformers may look for
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=40,
                                                     intermediate_size=24, max_position_embeddings=16, num_labels=7))
    model.save_pretrained(tmp_path / "bert")
    keys = {"data__name": "zoo:tokens", "model__args": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}}
    theta, _ = first(model__name=f"hf:{tmp_path / 'bert'}", **keys)
    name = "bert.encoder.layer.0.output.dense.weight"
    assert torch.equal(theta[name], model.state_dict()[name])
    assert theta["classifier.weight"].shape == (3, 16), "a head of its own"


@pytest.mark.parametrize(("content", "words"), (
    (None, "is neither a .safetensors file, nor the folder of a run"), (b"nothing", "is no safetensors file"),
    ({"other": torch.zeros(2)}, "no tensor of .* has the name and the shape of one of mlp's")))
def test_what_nothing_can_start_from_is_one_line(content: object, words: str, tmp_path: Path):
    path = tmp_path / "a.safetensors"
    if isinstance(content, dict):
        save_file(content, path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        first(model__init=str(path))
