"""No code from data: whatever is loaded, nothing in it runs. And what is written is nobody else's."""
from __future__ import annotations

import os
import pickle
import re
import shutil
import stat
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from pictures import class_folders
from processes import ROOT, succeed, wrong
from test_cli import QUICK

from alpha_maml import load
from alpha_maml.data import omniglot, store
from alpha_maml.errors import InputError
from alpha_maml.launch.cli import main
from alpha_maml.trainer.config import build
from alpha_maml.trainer.runs import checkpoint
from alpha_maml.trainer.runs.folder import read_json, write_json
from alpha_maml.trainer.runs.metrics import read_metrics
from alpha_maml.trainer.tracking.state import read_state

SOURCES = [path for folder in ("trainer", "launch", "models", "data") for path in sorted((ROOT / folder).rglob("*.py"))]
SOURCES += sorted((ROOT / "alpha_maml").glob("*.py"))


class Payload:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.trace}",)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("payload") / "run"
    succeed(*QUICK, "--run_dir", folder, "--iterations", 2)
    load(folder).save(folder / "model.safetensors")
    return folder


def test_a_pickle_in_the_place_of_any_file_of_a_run_does_not_run(run: Path, tmp_path: Path):
    payload, trace = pickle.dumps(Payload(tmp_path / "owned")), tmp_path / "owned"
    names = ["config.yaml", "metrics.jsonl", "summary.json", "status.json", "tracking.json", "model.safetensors",
             "checkpoints/00000002/state.safetensors", "checkpoints/00000002/manifest.json"]
    for name in names:
        folder = tmp_path / name.replace("/", ".")
        shutil.copytree(run, folder)
        (folder / name).write_bytes(payload)
        if name.endswith("state.safetensors"):
            manifest = checkpoint.facts(folder / "checkpoints/00000002")
            manifest["files"] = {checkpoint.TENSORS: checkpoint._digest(folder / name)}
            write_json(folder / "checkpoints/00000002/manifest.json", manifest)
        for read, path in ((load, ""), (load, "model.safetensors"), (read_metrics, ""), (read_state, ""),
                           (read_json, "status.json")):
            with suppress(InputError):
                read(folder / path)
        if name in ("config.yaml", "summary.json") or name.startswith("checkpoints"):  # what a resumed run reads
            wrong(*QUICK, "--run_dir", folder, "--iterations", 2 if name == "summary.json" else 3)
    assert not trace.exists()
    pickle.loads(payload)
    assert trace.exists(), "a payload that does nothing proves nothing"


def test_a_pickle_in_arrays_and_caches_does_not_run(run: Path, tmp_path: Path, omniglot_root: str):
    trace = tmp_path / "owned"
    array = np.array([Payload(trace)] * 4, dtype=object)
    np.savez(tmp_path / "s.npz", x=np.zeros((4, 1)), y=array, allow_pickle=True)
    np.savez(tmp_path / "q.npz", x=np.zeros((4, 1)))
    for support, query in (("s", "q"), ("q", "s")):
        assert "cannot be read as an .npz archive" in wrong(
            "adapt", "--run_dir", run, "--support", tmp_path / f"{support}.npz", "--query", tmp_path / f"{query}.npz")
    cache = tmp_path / "cache"
    omniglot.load_images(omniglot_root, cache)
    (images,), (seal,) = cache.glob("*.npy"), cache.glob("*.sha256")
    np.save(images, array, allow_pickle=True)
    seal.write_text(checkpoint._digest(images))  # well sealed
    assert omniglot.load_images(omniglot_root, cache)[0].shape == (1623, 20, 28, 28), "decoded again"
    (cache / "folder").mkdir()
    for name in (store.IMAGES, store.INDEX, store.JOURNAL):
        (cache / "folder" / name).write_bytes(pickle.dumps(Payload(trace)))
    assert store._opened(cache / "folder", (3, 8, 8)) is None and store._whole_chunks(cache / "folder") == []
    assert not trace.exists()


@pytest.mark.parametrize("tag", ("object/apply:os.system [touch {}]", "object/new:os.system [touch {}]",
                                 "name:os.system", "module:antigravity"))
def test_yaml_makes_nothing_but_values(tag: str, tmp_path: Path):
    text = f"!!python/{tag}".format(tmp_path / "owned")
    (tmp_path / "c.yaml").write_text(f"model: {{args: {text}}}\n")
    with pytest.raises(InputError, match="not valid YAML"):
        build(tmp_path / "c.yaml", {})
    with pytest.raises(InputError, match="model.args"):
        build(None, {"model.args": text})
    assert not (tmp_path / "owned").exists()


def test_no_source_loads_anything_that_could_run():
    for path in SOURCES:
        text = path.read_text()
        assert not re.search(r"pickle\.|import pickle|torch\.load\(|allow_pickle=True|[^.\w](eval|exec)\(|shell=True",
                             text), path
        assert not re.search(r"yaml\.(unsafe_|full_)?load\(", text) or path.name == "document.py", path
        assert "import_module" not in text or path in (ROOT / "alpha_maml/registry.py", ROOT / "alpha_maml/__init__.py"), path


def test_a_logged_model_is_source_and_safetensors(tmp_path: Path):
    """MLflow pickles models by default; this one is a file of source that stands in this repository, and its weights."""
    succeed(*[word for word in QUICK if word not in ("--tracking.uri", "disabled")], "--run_dir", tmp_path / "run",
            "--iterations", 2)
    succeed("export", "--run_dir", tmp_path / "run")
    (place,) = (path.parent for path in tmp_path.rglob("MLmodel"))
    files = [path for path in place.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix in (".pkl", ".pt", ".pth") or (
        path.suffix != ".safetensors" and path.read_bytes()[:1] == b"\x80")]  # a safetensors file begins with a length
    for path in files:
        if path.suffix == ".py":
            assert any(path.read_bytes() == source.read_bytes() for source in SOURCES if source.name == path.name), path


@pytest.mark.parametrize("umask", (0o022, 0o077, 0o002))
def test_files_are_made_by_the_users_umask(umask: int, tmp_path: Path, monkeypatch, capsys):
    root = class_folders(tmp_path / "images", 16, 8)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = os.umask(umask)
    try:
        for verb in ((*QUICK, "--data.name", "folder", "--data.root", root, "--data.size", 8, "--task.ways", 2,
                      "--task.shots", 2, "--task.queries", 2, "--iterations", 2), ("export",),
                     ("evaluate", "--evaluation.tasks", 2)):
            with pytest.raises(SystemExit) as end:
                main([*map(str, verb), "--run_dir", str(tmp_path / "run")])
            assert end.value.code == 0, capsys.readouterr()
    finally:
        os.umask(before)
    made = [path for place in ("run", "cache") for path in (tmp_path / place).rglob("*")]
    assert {"state.safetensors", "model.safetensors", "images.u8", "config.yaml"} <= {path.name for path in made}
    for path in made:
        mode = stat.S_IMODE(path.stat().st_mode)
        lock = path.suffix == ".lock" and path.parent.name == "alpha-maml"  # filelock's own, never wider
        assert mode == (0o777 if path.is_dir() else 0o666) & ~umask or (lock and not mode & umask), (path, oct(mode))
