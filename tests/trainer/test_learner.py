"""A trained run put to use: fit and predict, `alpha-maml adapt`, and what both refuse."""
from __future__ import annotations

import csv
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import succeed, wrong

from alpha_maml import load
from alpha_maml.errors import InputError
from alpha_maml.launch.cli import main
from alpha_maml.trainer import config as configuration
from alpha_maml.trainer import loop
from alpha_maml.trainer.engines.collective import World
from alpha_maml.trainer.evaluate import evaluate

WAYS = 5


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, omniglot_root: str) -> Path:
    folder = tmp_path_factory.mktemp("run") / "omniglot"
    succeed("train", "--data.name", "omniglot", "--data.root", omniglot_root, "--model.name", "conv4", "--model.channels", 16,
            "--task.ways", WAYS, "--task.shots", 1, "--task.queries", 1, "--task.batch", 8, "--iterations", 300,
            "--evaluation.tasks", 20, "--tracking.uri", "disabled", "--run_dir", folder)
    return folder


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "sinusoid"
    succeed("train", "--iterations", 200, "--task.batch", 8, "--evaluation.tasks", 20, "--tracking.uri", "disabled",
            "--run_dir", folder)
    return folder


def problem_of(folder: Path) -> tuple[loop.Problem, loop.State]:
    problem, state = loop.set_up(configuration.build(folder / "config.yaml", {}), World())
    return problem, loop.resume(state, folder, World())


def test_predicts_what_evaluation_measures(trained: Path):
    """Over 200 tasks of the test split, whose characters the run has never seen: the very accuracy of `evaluate`."""
    problem, state = problem_of(trained)
    alpha = state.rates.alpha.float()
    expected = evaluate(problem.apply, problem.source, problem.loss, state.engine.learned(), alpha, "test", 200,
                        problem.inner(0), World())
    learner, tasks = load(trained), problem.source.batch("test", 0, torch.arange(200))
    right = [(learner.fit(x, y).predict(q) == label).mean() for x, y, q, label in zip(*(t.numpy() for t in tasks.tensors()))]
    assert np.mean(right) == pytest.approx(expected.figures()["accuracy"], abs=2e-3)  # one query may stand at a tie
    assert expected.figures()["accuracy"] > 0.5


def test_labels_are_the_users_and_fewer_classes_will_do(trained: Path):
    tasks = problem_of(trained)[0].source.batch("test", 0, torch.arange(1))
    x, q = tasks.support_x[0].numpy(), tasks.query_x[0].numpy()
    names = np.array(["zeta", "alpha", "mu", "beta", "omega"])
    plain, named = load(trained).fit(x, np.arange(WAYS)), load(trained).fit(x, names)
    assert set(named.predict(q)) <= set(names) and list(named.classes_) == sorted(names)
    assert plain.predict_proba(q).shape == (WAYS, WAYS) and np.allclose(plain.predict_proba(q).sum(1), 1)
    few = load(trained).fit(x[:3], names[:3])
    assert few.predict_proba(q).shape == (WAYS, 3) and set(few.predict(q)) <= set(names[:3])
    first = plain.predict_proba(q)
    assert np.array_equal(plain.fit(x, np.arange(WAYS)).predict_proba(q), first), "a second fit does not start from theta"


def test_a_regression_learns_its_curve(curves: Path):
    x = np.linspace(-5, 5, 40)[:, None]
    learner = load(curves)
    before = np.square(learner.fit(x[::4], np.sin(x[::4]), steps=0).predict(x) - np.sin(x)).mean()
    after = np.square(learner.fit(x[::4], np.sin(x[::4]), steps=5).predict(x) - np.sin(x)).mean()
    assert learner.predict(x).shape == (40, 1) and after < before


def test_what_each_step_has_of_its_own_is_put_to_use(tmp_path: Path):
    folder, file = tmp_path / "run", tmp_path / "weights.safetensors"
    succeed("train", "--iterations", 30, "--task.batch", 4, "--evaluation.tasks", 20, "--tracking.uri", "disabled",
            "--inner.steps", 2, "--inner.per_step", "layers.*.bias", "--rates.alpha_shape", "layer_step", "--run_dir", folder)
    measured = json.loads(succeed("evaluate", "--run_dir", folder, "--evaluation.tasks", 20, "--inner.steps", 3).stdout)
    tasks = [t.numpy() for t in problem_of(folder)[0].source.batch("test", 0, torch.arange(20)).tensors()]
    load(folder).save(file)
    learner = load(file)
    for steps, expected in enumerate(measured["curve"]["loss"]):
        losses = [np.square(learner.fit(x, y, steps).predict(q) - answer).mean() for x, y, q, answer in zip(*tasks)]
        assert np.mean(losses) == pytest.approx(expected, rel=1e-4)
    assert learner.theta["layers.1.bias"].shape == (2, 40) and learner.phi["layers.1.bias"].shape == (40,)


@pytest.mark.parametrize(("arguments", "words"), (
    ((np.zeros((2, 1, 28, 28)), [0]), "support_y has 1 entries, support_x 2"),
    ((np.zeros((2, 28, 28)), [0, 1]), r"support_x has shape \(2, 28, 28\), it must be \[n, 1, 28, 28\]"),
    ((np.zeros((0, 1, 28, 28)), []), "n of 1 or more"),
    ((np.full((2, 1, 28, 28), np.nan), [0, 1]), "not finite"),
    ((np.full((2, 1, 28, 28), "a"), [0, 1]), "must hold numbers"),
    ((np.zeros((2, 1, 28, 28)), [1, 1]), "holds 1 classes"),
    ((np.zeros((6, 1, 28, 28)), range(6)), "holds 6 classes, the run was trained for 5"),
    ((np.zeros((2, 1, 28, 28)), [[0, 1], [1, 0]]), r"support_y has shape \(2, 2\), it must be \[n\]"),
    ((np.zeros((2, 1, 28, 28)), 3), "support_y has 0 entries"),
    ((np.full((2, 1, 28, 28), 1e300), [0, 1]), "not finite"),
))
def test_wrong_examples_are_value_errors(arguments: tuple, words: str, trained: Path):
    with pytest.raises(ValueError, match=words):
        load(trained).fit(arguments[0], np.array(arguments[1]))


@pytest.mark.parametrize("kind", (">f4", "g", "f2", "u2", "?"))
def test_numbers_of_any_kind_are_numbers(kind: str, curves: Path):
    x = np.arange(6)[:, None]
    expected = load(curves).fit((x % 2).astype("f8"), x).predict(x)
    assert np.array_equal(load(curves).fit((x % 2).astype(kind), x).predict(x), expected)


def test_predict_before_fit_and_folders_that_are_no_runs(trained: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="call fit"):
        load(trained).predict(np.zeros((1, 1, 28, 28)))
    with pytest.raises(InputError, match="is not a run's folder"):
        load(tmp_path)
    (tmp_path / "config.yaml").write_text((trained / "config.yaml").read_text())
    with pytest.raises(InputError, match="has no checkpoint yet"):
        load(tmp_path)


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory, omniglot_root: str) -> tuple[Path, Path]:
    """Folders of Omniglot's own drawings of five characters of the second archive: one drawing each, and ten each."""
    folder = tmp_path_factory.mktemp("drawings")
    with zipfile.ZipFile(Path(omniglot_root) / "images_evaluation.zip") as archive:
        names = sorted(n for n in archive.namelist() if n.endswith(".png"))
        characters = sorted({n.rsplit("/", 1)[0] for n in names})[::100][:WAYS]
        for label, character in zip("ABCDE", characters):
            for number, name in enumerate(n for n in names if n.startswith(character + "/")):
                place = folder / ("support" if number == 0 else "query") / label
                place.mkdir(parents=True, exist_ok=True)
                if number <= 10:
                    (place / f"{number}.png").write_bytes(archive.read(name))
    return folder / "support", folder / "query"


def test_adapt_reads_folders_and_writes_a_table(trained: Path, drawings: tuple[Path, Path], tmp_path: Path):
    support, query = drawings
    out = tmp_path / "predictions.csv"
    result = succeed("adapt", "--run_dir", trained, "--support", support, "--query", query, "--out", out)
    rows = list(csv.DictReader(io.StringIO(out.read_text())))
    assert len(rows) == 50 and list(rows[0]) == ["example", "label", *(f"p_{c}" for c in "ABCDE")]
    right = sum(row["label"] == row["example"][0] for row in rows) / 50
    assert f"accuracy {100 * right:.2f} % of 50 examples" in result.stderr and right > 0.3
    assert all(sum(float(row[f"p_{c}"]) for c in "ABCDE") == pytest.approx(1, abs=1e-5) for row in rows)

    def stack(files: list[Path]) -> np.ndarray:
        return np.stack([255 - np.asarray(Image.open(f).convert("L").resize((28, 28), Image.Resampling.LANCZOS))
                         for f in files])[:, None] / 255

    shown, asked = (sorted(folder.rglob("*.png")) for folder in drawings)
    np.savez(tmp_path / "support.npz", x=stack(shown), y=[f.parent.name for f in shown])
    np.savez(tmp_path / "query.npz", x=stack(asked))
    printed = succeed("adapt", "--run_dir", trained, "--support", tmp_path / "support.npz", "--query", tmp_path / "query.npz")
    assert [row["label"] for row in csv.DictReader(io.StringIO(printed.stdout))] == [row["label"] for row in rows]


def test_adapt_reaches_the_accuracy_of_the_evaluation_on_unseen_characters(trained: Path, tmp_path: Path):
    """60 tasks of the test split as folders of PNG files, each through the whole of `adapt`: files, resizing, fit, table."""
    count, queries = 60, 5
    measured = json.loads(succeed("evaluate", "--run_dir", trained, "--evaluation.tasks", count, "--task.queries", queries,
                                  "--inner.steps", 2, "--out", tmp_path / "evaluation").stdout)
    config = configuration.build(trained / "config.yaml", {"task.queries": str(queries)})
    problem, _ = loop.set_up(config, World())
    tasks, right = problem.source.batch("test", 0, torch.arange(count)), []
    for number in range(count):
        sets = {}
        for name in ("support", "query"):
            for i, (x, y) in enumerate(zip(getattr(tasks, f"{name}_x")[number], getattr(tasks, f"{name}_y")[number])):
                place = tmp_path / str(number) / name / f"character {int(y)}"
                place.mkdir(parents=True, exist_ok=True)
                ink = (255 * x[0]).round().to(torch.uint8).numpy()
                Image.fromarray(255 - ink).resize((105, 105), Image.Resampling.NEAREST).save(place / f"{i}.png")
            sets[name] = tmp_path / str(number) / name
        out = tmp_path / f"{number}.csv"
        with pytest.raises(SystemExit, match="0"):
            main(["adapt", "--run_dir", str(trained), "--support", str(sets["support"]), "--query", str(sets["query"]),
                  "--out", str(out), "--inner.steps", "2"])
        rows = list(csv.DictReader(io.StringIO(out.read_text())))
        assert len(rows) == WAYS * queries
        right.append(np.mean([row["label"] == row["example"].split("/")[0] for row in rows]))
    assert np.mean(right) == pytest.approx(measured["accuracy"], abs=measured["accuracy_ci95"])
    assert measured["accuracy_ci95"] < 0.05 and measured["accuracy"] > 0.5


def test_adapt_answers_for_a_regression(curves: Path, tmp_path: Path):
    x = np.linspace(-5, 5, 20)[:, None]
    np.savez(tmp_path / "s.npz", x=x[::2], y=np.sin(x[::2]))
    np.savez(tmp_path / "q.npz", x=x)
    printed = succeed("adapt", "--run_dir", curves, "--support", tmp_path / "s.npz", "--query", tmp_path / "q.npz").stdout
    learner = load(curves).fit(x[::2], np.sin(x[::2]))
    assert [float(r["output_0"]) for r in csv.DictReader(io.StringIO(printed))] == pytest.approx(learner.predict(x)[:, 0])


def test_ten_malformed_inputs_get_one_line_each(trained: Path, curves: Path, drawings: tuple[Path, Path], tmp_path: Path):
    support, query = drawings
    for name in ("empty", "class/A", "class/B", "broken", "flat"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "broken" / "a.png").write_bytes(b"no picture")
    (tmp_path / "class" / "A" / "a.png").write_bytes(next(support.rglob("*.png")).read_bytes())
    (tmp_path / "flat" / "a.png").write_bytes(next(support.rglob("*.png")).read_bytes())
    (tmp_path / "no.npz").write_bytes(b"no archive")
    np.savez(tmp_path / "no_x.npz", y=[1])
    np.savez(tmp_path / "objects.npz", x=np.array([{}, {}], dtype=object))
    with zipfile.ZipFile(tmp_path / "vast.npz", "w") as archive:  # a header that claims 80 TB
        head = b"{'descr': '<f8', 'fortran_order': False, 'shape': (10000000000000,), }".ljust(117) + b"\n"
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head)
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as archive:
        archive.writestr("x.npy", b"text")
    np.savez_compressed(tmp_path / "deflated.npz", x=np.arange(1000.0))
    content = bytearray((tmp_path / "deflated.npz").read_bytes())
    content[60:80] = b"\xff" * 20
    (tmp_path / "deflated.npz").write_bytes(content)
    np.savez(tmp_path / "uneven.npz", x=np.zeros((2, 1, 28, 28)), y=[1])
    np.savez(tmp_path / "shape.npz", x=np.zeros((2, 3, 28, 28)), y=[1, 2])
    cases = (
        (trained, tmp_path / "none", query, "is neither a folder nor an .npz file"),
        (trained, tmp_path / "empty", query, "holds no image"),
        (trained, tmp_path / "class", query, "class/B holds no image"),
        (trained, support, tmp_path / "broken", "a.png cannot be read as an image"),
        (trained, tmp_path / "flat", query, "has no labels"),
        (trained, tmp_path / "no.npz", query, "cannot be read as an .npz archive"),
        (trained, tmp_path / "no_x.npz", query, "has no array x"),
        (trained, tmp_path / "text.npz", query, "cannot be read as an .npz archive of arrays (an entry is no array)"),
        (trained, tmp_path / "vast.npz", query, "cannot be read as an .npz archive"),
        (trained, tmp_path / "deflated.npz", query, "cannot be read as an .npz archive"),
        (trained, support, tmp_path / "objects.npz", "cannot be read as an .npz archive"),
        (trained, tmp_path / "uneven.npz", query, "give one y for each x"),
        (trained, tmp_path / "shape.npz", query, "support_x has shape (2, 3, 28, 28)"),
        (curves, support, query, "this run takes no images"),
        (tmp_path, support, query, "is not a run's folder"),
    )
    for folder, shown, asked, words in cases:
        assert words in wrong("adapt", "--run_dir", folder, "--support", shown, "--query", asked, "--out", tmp_path / "out.csv")
        assert not (tmp_path / "out.csv").exists()
    assert json.loads((trained / "summary.json").read_text())["status"] == "FINISHED"
