"""Damage to what a run leaves: checkpoints, metrics, the sender's state, exported models."""
from __future__ import annotations

import functools
import json
import shutil
import tempfile
from pathlib import Path

import fuzz
import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DataObject

from alpha_maml import load
from alpha_maml.trainer.config import build
from alpha_maml.trainer.runs import checkpoint
from alpha_maml.trainer.runs.metrics import METRICS, read_lines
from alpha_maml.trainer.tracking.state import STATE, read_state

QUICK = ("train", "--tracking.uri=disabled", "--task.batch=2", "--task.shots=3", "--task.queries=3", "--evaluation.tasks=2",
         "--model.channels=4", "--checkpoint.every=2")
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3), max_leaves=5)


@functools.cache
def original() -> tempfile.TemporaryDirectory:
    """A trained run with two checkpoints, in a folder that goes with this process; its exported model beside it."""
    folder = tempfile.TemporaryDirectory(dir=fuzz.PLACE)
    run = Path(folder.name) / "run"
    assert fuzz.commanded([*QUICK, "--iterations=4", f"--run_dir={run}"], run / "summary.json") == fuzz.RAN
    load(run).save(Path(folder.name) / "model.safetensors")
    return folder


def copied(name: str = "run") -> Path:
    """The run, to be damaged."""
    return Path(shutil.copytree(Path(original().name) / "run", name))


def write_examples(folder: Path) -> None:
    x = np.linspace(-4, 4, 5)[:, None]
    np.savez(folder / "s.npz", x=x, y=np.sin(x))
    np.savez(folder / "q.npz", x=x)


def damaged(data: DataObject, content: bytes) -> bytes:
    """A few bytes changed, a part cut out or put in, or only zeros."""
    how = data.draw(st.sampled_from(("flip", "flip", "cut", "remove", "insert", "zeros", "empty")))
    place = data.draw(st.integers(0, max(0, len(content) - 1)))
    length = data.draw(st.integers(1, 64))
    if how == "flip":
        changed = bytes(b ^ data.draw(st.integers(1, 255)) for b in content[place : place + 1])
        return content[:place] + changed + content[place + 1 :]
    if how == "cut":
        return content[:place]
    if how == "remove":
        return content[:place] + content[place + length :]
    if how == "insert":
        return content[:place] + data.draw(st.binary(min_size=1, max_size=64)) + content[place:]
    return b"\0" * len(content) if how == "zeros" else b""


def goes_on(run: Path) -> str:
    """The outcome of training further, and of the other verbs that read a run; a refusal must leave all as it is."""
    before = contents(run)
    outcome = fuzz.commanded([*QUICK, "--iterations=5", f"--run_dir={run}"])
    assert outcome != fuzz.REFUSED or contents(run) == before, "a refused run was changed"
    return outcome


def contents(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def checkpoint_case(data: DataObject, folder: Path) -> str:
    run = copied()
    saved = checkpoint.saved(run / "checkpoints")
    victims = data.draw(st.sampled_from((saved[-1:], saved)))
    for path in victims:
        how = data.draw(st.sampled_from(("bytes", "bytes", "manifest", "sealed", "model", "missing", "renamed")))
        tensors, manifest = path / checkpoint.TENSORS, path / checkpoint.MANIFEST
        facts = json.loads(manifest.read_text())
        if how == "bytes":
            victim = data.draw(st.sampled_from((tensors, manifest)))
            victim.write_bytes(damaged(data, victim.read_bytes()))
        elif how == "manifest":  # well-formed, but not what is expected
            place = data.draw(st.sampled_from(("iteration", "files", "world_size", "trajectory", "all", "deep")))
            facts = data.draw(JSON) if place == "all" else facts | {place: data.draw(JSON)}
            manifest.write_text("[" * 100_000 if place == "deep" else json.dumps(facts))
        elif how == "sealed":  # damaged, and the digest is right
            tensors.write_bytes(damaged(data, tensors.read_bytes()))
            manifest.write_text(json.dumps(facts | {"files": {checkpoint.TENSORS: checkpoint._digest(tensors)}}))
        elif how == "model":
            other = {name: another(data, t) for name, t in checkpoint.read(path).items()}
            if data.draw(st.booleans()):
                other.pop(data.draw(st.sampled_from(sorted(other))))
            checkpoint.save(path.parent, int(path.name), other, {"world_size": 1}, 9)
        elif how == "missing":
            data.draw(st.sampled_from((tensors, manifest))).unlink()
        else:
            path.rename(path.with_name(path.name[1:] + data.draw(st.sampled_from(("", "0", "x", ".bak", "\n")))))
    loaded = fuzz.called(use, run)
    if data.draw(st.integers(0, 19)) == 0:  # draws a figure
        fuzz.commanded(["evaluate", f"--run_dir={run}", "--out=out", "--evaluation.tasks=2"], Path("out"))
    outcome = goes_on(run)
    return fuzz.REFUSED if fuzz.REFUSED in (loaded, outcome) else outcome


def another(data: DataObject, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or one of another shape or dtype."""
    how = data.draw(st.sampled_from(("same", "same", "same", "longer", "flat", "half", "integers", "complex")))
    return {"same": tensor, "longer": torch.cat([tensor.reshape(-1)] * 2), "flat": tensor.reshape(-1), "half": tensor.half(),
            "integers": tensor.long(), "complex": tensor.to(torch.complex64)}[how]


def use(path: Path) -> None:
    """Loads a learner and predicts with it; ValueErrors are its way to refuse values."""
    learner = load(path)
    x = np.linspace(-4, 4, 5)[:, None]
    try:
        learner.fit(x, np.sin(x)).predict(x)
    except ValueError as error:
        assert "not finite" in str(error), error


def spool_case(data: DataObject, folder: Path) -> str:
    run = copied()
    metrics = run / METRICS
    lines = metrics.read_bytes().splitlines(keepends=True)
    how = data.draw(st.sampled_from(("bytes", "torn", "torn end", "other run", "order", "json", "values", "state", "state file",
                                     "summary", "config")))
    place = data.draw(st.integers(0, len(lines) - 1))
    if how == "bytes":
        metrics.write_bytes(damaged(data, metrics.read_bytes()))
    elif how in ("torn", "torn end"):
        lines[place if how == "torn" else -1] = lines[place][:data.draw(st.integers(0, len(lines[place]) - 1))]
        metrics.write_bytes(b"".join(lines))
    elif how == "other run":
        metrics.write_bytes(b"".join(lines * 2 if data.draw(st.booleans()) else lines[place:]))
    elif how == "order":
        metrics.write_bytes(b"".join(data.draw(st.permutations(lines))))
    elif how == "json":
        lines[place] = data.draw(st.sampled_from((b"\xff", b"[" * 100_000, json.dumps(data.draw(JSON)).encode()))) + b"\n"
        metrics.write_bytes(b"".join(lines))
    elif how == "values":
        line = json.loads(lines[place])
        name = data.draw(st.sampled_from(sorted(line)))
        lines[place] = json.dumps(line | {name: data.draw(JSON)} if data.draw(st.booleans()) else
                                  {k: v for k, v in line.items() if k != name}).encode() + b"\n"
        metrics.write_bytes(b"".join(lines))
    else:
        file = run / {"summary": "summary.json", "config": "config.yaml"}.get(how, STATE)
        state = {"run_id": "0" * 32, "experiment_id": "0", "offset": len(lines[0]), "complete": False}
        content = file.read_bytes() if file.is_file() else json.dumps(state).encode()
        if how == "state":
            content = json.dumps(state | {data.draw(st.sampled_from(sorted(state))): data.draw(JSON)}).encode()
        elif data.draw(st.booleans()):
            content = json.dumps(data.draw(JSON)).encode()
        else:
            content = damaged(data, content)
        file.write_bytes(content)
    outcomes = [fuzz.called(to_ship, run)]
    if data.draw(st.integers(0, 19)) == 0:  # draws a figure
        outcomes.append(fuzz.commanded(["report", "--runs", str(run), "--out=out.png"], Path("out.png")))
    outcomes.append(goes_on(run))
    return fuzz.REFUSED if fuzz.REFUSED in outcomes else fuzz.RAN


def to_ship(run: Path) -> list:
    """What the sender would send of a run, all of it numbers."""
    build(run / "config.yaml", {})
    found = list(read_lines(run, read_state(run).get("offset", 0)))
    assert all(isinstance(value, int | float) for _, line in found for value in line.values())
    return found


def exported_case(data: DataObject, folder: Path) -> str:
    path = folder / "model.safetensors"
    content = (Path(original().name) / path.name).read_bytes()
    how = data.draw(st.sampled_from(("bytes", "bytes", "header", "facts", "tensors")))
    size = int.from_bytes(content[:8], "little")
    if how == "bytes":
        content = damaged(data, content)
    elif how == "header":
        content = content[:8] + damaged(data, content[8 : 8 + size])[:size].ljust(size) + content[8 + size :]
    else:
        import safetensors.torch

        with safetensors.safe_open(Path(original().name) / path.name, "pt") as file:
            facts = file.metadata()
            theta = {name: file.get_tensor(name) for name in file.keys()}
        if how == "tensors":
            theta = {name: another(data, t) for name, t in theta.items()}
        elif data.draw(st.booleans()):
            facts[data.draw(st.sampled_from(sorted(facts)))] = data.draw(st.sampled_from(("", "[" * 100_000, "nan"))
                                                                         | JSON.map(json.dumps))
        else:
            values = json.loads(facts["config"])
            facts["config"] = json.dumps(values | {data.draw(st.sampled_from(sorted(values))): data.draw(JSON)})
        content = safetensors.torch.save(theta, facts)
    path.write_bytes(content)
    return fuzz.called(use, path)


AREAS = [
    fuzz.Area("checkpoints", "bytes of every region changed, cut and put in, with and without the right digest; manifests of "
              "anything; another model's tensors; missing and renamed files", 12, checkpoint_case),
    fuzz.Area("spools", "torn lines, lines of another run, out of order or of anything; damage to the sender's state, "
              "summary.json and config.yaml of a run", 9, spool_case),
    fuzz.Area("exported models", "bytes changed, headers, metadata and tensors of anything", 7, exported_case),
]
