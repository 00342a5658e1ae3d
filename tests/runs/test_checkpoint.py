"""Checkpoints: every bit back, the damaged passed over, the good never touched."""
from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from conftest import newest_state
from processes import ROOT, succeed, wrong

from alpha_maml.errors import InputError
from alpha_maml.trainer.runs import checkpoint


def some_state(seed: int) -> dict[str, torch.Tensor]:
    """Float32 and float64, vectors and scalars, as a training state has them."""
    generator = torch.Generator().manual_seed(seed)
    state = {f"{part}.{n}": torch.randn(s, generator=generator) for part in ("theta", "outer.previous")
             for n, s in (("a.weight", (3, 2)), ("a.bias", (3,)))}
    return state | {f"rates.{n}": torch.rand((), generator=generator, dtype=torch.float64) for n in ("alpha", "beta")}


def save(folder: Path, iteration: int, keep: int = 3) -> dict:
    state = some_state(iteration)
    checkpoint.save(folder, iteration, state, {"world_size": 1}, keep)
    return state


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def test_every_bit_comes_back(tmp_path: Path):
    state = save(tmp_path, 12)
    path, complaints = checkpoint.newest(tmp_path)
    assert path.name == "00000012" and not complaints and checkpoint.facts(path)["iteration"] == 12
    assert same(checkpoint.read(path), state)
    empty = {n: torch.zeros_like(t) for n, t in state.items()}
    checkpoint.load(path, empty)
    assert same(empty, state)


def test_only_the_newest_are_kept_and_nothing_is_left_aside(tmp_path: Path):
    (tmp_path / ".00000009.123").mkdir()  # a save that was killed
    for iteration in (1, 2, 3, 10):
        save(tmp_path, iteration, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000003", "00000010"]


def files(path: Path) -> list[Path]:
    return sorted(path.iterdir())


@pytest.mark.parametrize("number", range(2))
@pytest.mark.parametrize("how", ("flipped", "truncated", "missing"))
def test_a_damaged_newest_is_passed_over_and_said(how: str, number: int, tmp_path: Path):
    for iteration in (1, 2):
        save(tmp_path, iteration)
    victim = files(tmp_path / "00000002")[number]
    content = victim.read_bytes()
    if how == "missing":
        victim.unlink()
    elif how == "truncated":
        victim.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        victim.write_bytes(content[:middle] + bytes([content[middle] ^ 0x80]) + content[middle + 1 :])
    path, (complaint,) = checkpoint.newest(tmp_path)
    assert path.name == "00000001" and "00000002" in complaint and victim.name in complaint and "one before" in complaint


def test_when_all_are_damaged_nothing_is_guessed(tmp_path: Path):
    save(tmp_path, 1)
    (tmp_path / "00000001" / checkpoint.MANIFEST).write_text("{")
    with pytest.raises(InputError, match="every checkpoint .* is damaged .*restore one"):
        checkpoint.newest(tmp_path)
    assert (tmp_path / "00000001").is_dir()


def test_a_state_of_another_shape_is_refused(tmp_path: Path):
    state = save(tmp_path, 1)
    state["theta.a.bias"] = torch.zeros(4)
    with pytest.raises(InputError, match="theta.a.bias"):
        checkpoint.load(tmp_path / "00000001", state)


def test_a_state_of_another_dtype_is_refused(tmp_path: Path):
    state = save(tmp_path, 1)
    state["theta.a.bias"] = state["theta.a.bias"].double()
    with pytest.raises(InputError, match="theta.a.bias with shape .3. of torch.float32"):
        checkpoint.load(tmp_path / "00000001", state)


@pytest.mark.parametrize("how", ("sealed", "of another", "endless", "deep", "no files", "no iteration", "renamed"))
def test_a_checkpoint_that_is_none_is_passed_over(how: str, tmp_path: Path):
    for iteration in (1, 2):
        save(tmp_path, iteration)
    path = tmp_path / "00000002"
    manifest, facts = path / checkpoint.MANIFEST, checkpoint.facts(path)
    if how == "sealed":  # with the right digest
        (path / checkpoint.TENSORS).write_bytes(b"\0" * 100)
        facts["files"] = {checkpoint.TENSORS: checkpoint._digest(path / checkpoint.TENSORS)}
    elif how == "renamed":
        path.rename(tmp_path / "00000003")
        manifest = tmp_path / "00000003" / checkpoint.MANIFEST
    else:
        facts = {"of another": facts | {"iteration": 7}, "endless": facts | {"files": {"/dev/zero": "x"}}, "deep": facts,
                 "no files": {"iteration": 2}, "no iteration": {"files": facts["files"]}}[how]
    manifest.write_text("[" * 100_000 if how == "deep" else json.dumps(facts))
    found, (complaint,) = checkpoint.newest(tmp_path)
    assert found.name == "00000001" and "using the one before" in complaint


def test_a_save_killed_before_its_end_leaves_no_checkpoint(tmp_path: Path, monkeypatch):
    save(tmp_path, 1)

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_sync", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2)
    assert [p.name for p in checkpoint.saved(tmp_path)] == ["00000001"] and checkpoint.newest(tmp_path)[0].name == "00000001"
    monkeypatch.undo()
    save(tmp_path, 2)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["00000001", "00000002"]


def test_the_manifest_is_json(tmp_path: Path):
    save(tmp_path, 1)
    manifest = json.loads((tmp_path / "00000001" / checkpoint.MANIFEST).read_text())
    assert manifest["world_size"] == 1 and list(manifest["files"]) == [checkpoint.TENSORS]
    shutil.rmtree(tmp_path / "00000001")
    assert checkpoint.newest(tmp_path) == (None, [])


def test_torch_distributed_checkpoint_reads_it(tmp_path: Path):
    state = save(tmp_path, 1)
    found = {n: torch.zeros_like(t) for n, t in state.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(path=str(tmp_path / "00000001")), no_dist=True)
    assert same(found, state)


@pytest.mark.parametrize("rule", ("paper", "fixed"))
def test_a_run_of_before_goes_on(rule: str, tmp_path: Path):
    """Runs of four iterations made at version 0.1.0, commit 62183b3, and what three more gave there."""
    before = ROOT / "tests/runs/before" / rule
    shutil.copytree(before, tmp_path / "run")
    succeed("train", "--config", tmp_path / "run/config.yaml", "--run_dir", tmp_path / "run", "--iterations", 7)
    expected, found = safetensors.torch.load_file(before / "expected.safetensors"), newest_state(tmp_path / "run")
    assert set(found) <= set(expected)
    for name, t in found.items():
        assert torch.allclose(t, expected[name], rtol=1e-10, atol=1e-14), name


def test_a_run_of_before_by_the_rule_of_before_is_refused_and_still_of_use(tmp_path: Path):
    """Rule adaptive took other steps at version 0.1.0. What it learned can be evaluated."""
    folder = tmp_path / "run"
    shutil.copytree(ROOT / "tests/runs/before/adaptive", folder)
    line = wrong("train", "--config", folder / "config.yaml", "--run_dir", folder, "--iterations", 7)
    assert "run_dir" in line and "version 0.1" in line
    line = wrong("train", "--config", folder / "config.yaml", "--run_dir", folder, "--rates.tolerance", 0)
    assert "rates.tolerance = 0.6" in line
    succeed("evaluate", "--run_dir", folder, "--evaluation.tasks", 4)
    assert newest_state(folder)["outer.count"] == 4
