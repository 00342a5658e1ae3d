"""Data sets of the user's own, each in under ten lines outside the package: trained by two processes, and what is refused."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import newest_state
from processes import ROOT, run, succeed, wrong
from test_data import same

from alpha_maml import load
from alpha_maml.data.own import Own
from alpha_maml.data.tasks import TaskSizes
from alpha_maml.errors import InputError
from alpha_maml.models.build import build as build_model
from alpha_maml.trainer.runs.folder import read_json

CPU = torch.device("cpu")
TRAIN = ("train", "--task.batch", 4, "--evaluation.tasks", 8, "--tracking.uri", "disabled", "--iterations", 5)


class Blobs:
    input_shape = (4,)

    def classes(self, split):
        return 30

    def examples(self, split, c):
        return 12 if c else 2

    def read(self, split, c, places):
        centre = np.random.default_rng([len(split), c]).normal(size=4)
        return np.stack([centre + 0.1 * np.random.default_rng([c, p]).normal(size=4) for p in places])


class Waves:
    input_shape, outputs = (1,), 1

    def __init__(self, count):
        self.count = count

    def classes(self, split):
        return self.count

    def examples(self, split, c):
        return 100

    def read(self, split, c, places):
        x = np.linspace(-5, 5, 100)[places, None]
        return x, np.sin(x + c)


def own(name: str, sizes: TaskSizes, args: dict | None = None, warn=print) -> Own:
    return Own(f"test_own:{name}", args or {}, sizes, 0, torch.float64, CPU, warn)


@pytest.mark.parametrize("words", (
    ("--data.name", "test_own:Blobs", "--task.ways", 5, "--task.shots", 3, "--task.queries", 4, "--task.min_ways", 2),
    ("--data.name", "test_own:Waves", "--data.args", "{count: 1000}", "--task.shots", 10, "--task.min_shots", 5)))
def test_trains_with_two_processes_as_with_one(words: tuple, tmp_path: Path):
    for ranks in (0, 2):
        result = succeed(*TRAIN, *words, "--precision", "float64", "--run_dir", tmp_path / str(ranks), ranks=ranks,
                         PYTHONPATH=str(ROOT / "tests"))
    one, two = (newest_state(tmp_path / name) for name in ("0", "2"))
    assert all(torch.allclose(one[name], two[name], rtol=1e-9, atol=1e-12) for name in one)
    assert result.stderr.count("class 0 of split train has 2 examples") == ("test_own:Blobs" in words)
    assert read_json(tmp_path / "2/status.json")["status"] == "FINISHED"


def test_tasks_are_what_was_read():
    blobs = own("Blobs", TaskSizes(5, 3, 4))
    whole = blobs.batch("val", 2, torch.arange(7))
    assert whole.support_x.shape == (7, 15, 4) and whole.query_x.shape == (7, 20, 4)
    parts = [blobs.batch("val", 2, i).tensors() for i in torch.arange(7).tensor_split(3)]
    assert same(whole, [torch.cat(x) for x in zip(*parts)])
    known = {tuple(x): (c, p) for c in range(1, 30) for p, x in enumerate(Blobs().read("val", c, range(12)).tolist())}
    for support, query in zip(whole.support_x.tolist(), whole.query_x.tolist()):
        found = [known[tuple(x)] for n in range(5) for x in (*support[3 * n : 3 * n + 3], *query[4 * n : 4 * n + 4])]
        assert len(set(found)) == 35 and [c for c, _ in found] == [c for c, _ in found[::7] for _ in range(7)]
    waves = own("Waves", TaskSizes(1, 10, 15), {"count": 10**6})
    x, y, query_x, query_y = waves.batch("train", 0, torch.arange(3)).tensors()
    assert x.shape == y.shape == (3, 10, 1) and query_x.shape == query_y.shape == (3, 15, 1)
    assert len(torch.cat([x, query_x], 1)[0].unique()) == 25
    for task in range(3):  # one sin(x + phase)
        weights = torch.linalg.lstsq(torch.cat([x[task].sin(), x[task].cos()], 1), y[task]).solution
        assert torch.allclose(torch.cat([query_x[task].sin(), query_x[task].cos()], 1) @ weights, query_y[task])


def test_a_run_is_put_to_use(tmp_path: Path, monkeypatch):
    succeed(*TRAIN, "--data.name", "test_own:Waves", "--data.args", "{count: 9}", "--run_dir", tmp_path / "run",
            PYTHONPATH=str(ROOT / "tests"))
    x = np.linspace(-5, 5, 20)[:, None]
    np.savez(tmp_path / "task.npz", x=x, y=np.sin(x))
    monkeypatch.setattr(Waves, "__init__", None)  # its data need not be there
    assert load(tmp_path / "run").fit(x, np.sin(x)).predict(x).shape == (20, 1)
    printed = succeed("adapt", "--run_dir", tmp_path / "run", "--support", tmp_path / "task.npz", "--query",
                      tmp_path / "task.npz", PYTHONPATH=str(ROOT / "tests")).stdout
    assert len(printed.splitlines()) == 21


class Few(Blobs):
    def classes(self, split):
        return 4


class Unready(Blobs):
    read = property()


class Wide(Blobs):
    def read(self, split, c, places):
        return np.zeros((len(places), 5))


class Names(Blobs):
    def read(self, split, c, places):
        return np.full((len(places), 4), "a")


class Alone(Waves):
    def read(self, split, c, places):
        return np.zeros((len(places), 1))


@pytest.mark.parametrize(("name", "sizes", "args", "words"), (
    ("Nothing", (5, 1, 1), {}, "data.name: 'test_own:Nothing' cannot be imported"),
    ("Waves", (1, 1, 1), {}, "data.args: test_own:Waves cannot be built from {}"),
    ("Unready", (5, 1, 1), {}, "data.name: test_own:Unready has no read"),
    ("Few", (4, 1, 2), {}, r"task.ways: 4 is more than the 3 classes of split train that have the 3 examples"),
    ("Blobs", (1, 1, 1), {}, "task.ways: 1 must be 2 or more"),
    ("Blobs", (5, 1, 1, 1), {}, "task.min_ways"),
    ("Waves", (2, 1, 1), {"count": 5}, "task.ways: 2 must be 1 for regression"),
    ("Wide", (5, 1, 1), {}, r"test_own:Wide.read\('train', \d+, places\) returned float64 \(2, 5\), it must .* \(2, 4\)"),
    ("Names", (5, 1, 1), {}, "returned <U1"),
    ("Alone", (1, 1, 1), {"count": 5}, r"returned float64 \(2, 1\), it must return numbers of shape \(2, 1\) and \(2, 1\)"),
))
def test_what_is_wrong_is_one_line(name: str, sizes: tuple, args: dict, words: str):
    with pytest.raises(InputError, match=words) as caught:
        own(name, TaskSizes(*sizes), args, warn=lambda line: None).batch("train", 0, torch.arange(2))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ("..a:b", ":b", "a:", "os:sep", "math:pi"))
def test_what_is_no_class_is_one_line(name: str):
    with pytest.raises(InputError, match="data.name|data.args"):
        Own(name, {}, TaskSizes(5, 1, 1), 0, torch.float32, CPU, print)


class Breaks(Blobs):
    def __init__(self):
        raise RuntimeError("no connection. Try later")


def test_what_the_users_code_raises_is_one_line_for_data_and_models_alike(tmp_path: Path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "breaks_at_import.py").write_text("\nraise RuntimeError('no licence\\nat all')\n")
    wanted = r": 'breaks_at_import:A' cannot be imported \(RuntimeError: no licence, at breaks_at_import.py:2\); it must be"
    with pytest.raises(InputError, match="data.name" + wanted):
        Own("breaks_at_import:A", {}, TaskSizes(5, 1, 1), 0, torch.float64, CPU, print)
    with pytest.raises(InputError, match="model.name" + wanted):
        build_model("breaks_at_import:A", (4,), 5, 0)
    with pytest.raises(InputError, match=r"data.args: test_own:Breaks .*RuntimeError: no connection, at test_own.py:\d+\)"):
        own("Breaks", TaskSizes(5, 1, 1))


def test_a_wrong_data_set_ends_the_command_with_2(tmp_path: Path):
    common = (*TRAIN, "--task.ways", 5, "--task.shots", 1, "--task.queries", 1, "--run_dir", tmp_path / "run")
    result = run(*common, "--data.name", "test_own:Blobs", "--model.name", "conv4", PYTHONPATH=str(ROOT / "tests"))
    assert result.returncode == 2 and "it takes images, of the shape [C, H, W]" in result.stderr.splitlines()[-1]
    result = run(*common, "--data.name", "test_own:Wide", PYTHONPATH=str(ROOT / "tests"))
    assert result.returncode == 2 and "Traceback" not in result.stderr and "Wide.read" in result.stderr.splitlines()[-1]


class Labelled(Blobs):
    """Labels of its own: the class's parity, whatever its place in the task."""

    def read(self, split: str, c: int, places: np.ndarray) -> tuple:
        return super().read(split, c, places), np.full(len(places), c % 2)


def test_labels_of_its_own():
    source = own("Labelled", TaskSizes(3, 2, 1))
    batch = source.batch("val", 0, torch.arange(4))
    assert batch.support_y.shape == (4, 6) and batch.support_y.dtype is torch.int64
    assert set(batch.support_y.unique().tolist()) == {0, 1}
    assert bool((batch.support_y.unflatten(1, (3, 2))[:, :, 0] == batch.query_y).all())


class Lines:
    """Whole tasks, by a method."""

    def __init__(self, slope: float = 1.0):
        self.slope = slope

    def task(self, split: str, number: int) -> tuple:
        x = np.linspace(0, 1, 6)[:, None]
        return (x[:3], self.slope * number * x[:3]), (x[3:], self.slope * number * x[3:])


def test_a_class_with_a_method_task_by_import_path(tmp_path: Path):
    words = ("train", "--data.name", "test_own:Lines", "--task.batch", 2, "--iterations", 2, "--evaluation.tasks", 2,
             "--tracking.uri", "disabled")
    here = {"PYTHONPATH": str(Path(__file__).parent)}
    succeed(*words, "--data.args", "{slope: 2.0}", "--run_dir", tmp_path / "run", **here)
    line = wrong(*words, "--data.args", "{slop: 1}", "--run_dir", tmp_path / "other", **here)
    assert "data.args: test_own:Lines cannot be built from {'slop': 1} (TypeError" in line
