"""Folders of images as tasks: what is found in them, how it is split and drawn, and what is refused."""
from __future__ import annotations

import csv
import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import class_folders, picture
from PIL import Image
from processes import run, succeed, wrong
from test_data import same
from torch.utils._pytree import tree_leaves

from alpha_maml import load
from alpha_maml.data import images, store
from alpha_maml.data.folder import Folder, find
from alpha_maml.data.tasks import SPLITS, TaskSizes
from alpha_maml.errors import InputError
from alpha_maml.trainer.runs.folder import read_json
from alpha_maml.trainer.runs.metrics import read_metrics

CPU = torch.device("cpu")
TRAIN = ("train", "--data.name", "folder", "--data.size", 16, "--model.name", "conv4", "--model.channels", 8, "--task.ways", 3,
         "--task.shots", 1, "--task.queries", 2, "--task.batch", 4, "--iterations", 3, "--evaluation.tasks", 8,
         "--tracking.uri", "disabled")


def source(root: Path, cache: Path, sizes: TaskSizes, resident: bool | None = None, warn=print, side: int = 16) -> Folder:
    return Folder(str(root), side, True, resident, cache, sizes, 0, torch.float32, CPU, warn)


def names(root: Path) -> dict[str, list[str]]:
    return {split: [c.name for c in find(root)[0] if c.split == split] for split in SPLITS}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """25 classes of 6 images: 16, 4 and 5 of them a split."""
    return class_folders(tmp_path_factory.mktemp("folder") / "root", 25, 6)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 classes, and everything that a class folder must not have."""
    root = class_folders(tmp_path_factory.mktemp("faulty") / "root", 97, 3)
    for name in ("Ägypten", "漢字 und\nmehr"):
        for i in range(3):
            picture(root / name / f"{i}-é.png", i)
    (root / "c000/0.png").write_bytes(b"no image")
    (root / "c001/1.png").write_bytes((root / "c001/1.png").read_bytes()[:200])
    (root / "Ägypten/2-é.png").write_bytes(b"")
    picture(root / "c002/2.png", 0, side=40)
    picture(root / os.fsdecode(b"no UTF-8 \xff") / "0.png", 0)
    (root / "empty").mkdir()
    (root / "c003/notes.txt").write_text("no image")
    picture(root / "stray.png", 0)
    (root / "c004/2.png").unlink()
    (root / ".hidden").mkdir()
    return root


def test_a_faulty_folder_loads_with_each_fault_named_once_and_counted(faulty: Path, tmp_path: Path):
    """Through the command, by two ranks; classes of fewer than three images are left out."""
    command = (*TRAIN, "--data.root", faulty)
    result = succeed(*command, "--run_dir", tmp_path / "a", ranks=2, XDG_CACHE_HOME=str(tmp_path / "cache"))
    expected = ("c000/0.png cannot be decoded (it is no image)", "c001/1.png cannot be decoded (image file is truncated)",
                "Ägypten/2-é.png cannot be decoded", "c002/2.png has 40 x 40 pixels, the others 16 x 16",
                "empty holds no image", "c003/notes.txt is no image", "stray.png is not in the folder of a class",
                *(f"class {name!r} of split" for name in ("c000", "c001", "c004", "Ägypten", "no UTF-8 \udcff")))
    for words in expected:
        assert result.stderr.count(words) == 1, (words, result.stderr)
    counted = ("broken images: 3", "images of another size: 1", "empty classes: 1", "files that are no images: 1",
               "images outside a class: 1", "classes with too few images: 5")
    (summary,) = [line for line in result.stderr.splitlines() if "broken images: " in line]
    assert all(words in summary for words in counted)
    assert "decoding 297 images" in result.stderr and len(result.stderr.splitlines()) == len(expected) + 2
    (listed,) = (tmp_path / "cache").rglob("left_out.txt")
    assert str(listed) in summary and len(listed.read_text().splitlines()) == 7
    again = succeed(*command, "--run_dir", tmp_path / "b", ranks=2, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert len(again.stderr.splitlines()) == 6, "what a task lacks, and the summary"
    first, second = (read_json(tmp_path / name / "summary.json") for name in "ab")
    assert first["loss_last"] == second["loss_last"]


def test_the_second_start_decodes_nothing(faulty: Path, tmp_path: Path, monkeypatch, capsys):
    first = source(faulty, tmp_path, TaskSizes(3, 1, 2))
    assert "decoding" in capsys.readouterr().err

    def never(*_: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(images, "read", never)
    monkeypatch.setattr(store, "_made", never)
    second = source(faulty, tmp_path, TaskSizes(3, 1, 2))
    assert same(first.batch("train", 0, torch.arange(2)), second.batch("train", 0, torch.arange(2)))
    assert isinstance(second.images, np.memmap) and second.identity() == first.identity()


def test_classes_are_split_by_name_alone(root: Path, tmp_path: Path):
    found = names(root)
    assert {split: len(found[split]) for split in SPLITS} == {"train": 16, "val": 4, "test": 5}
    assert sorted(sum(found.values(), [])) == sorted(p.name for p in root.iterdir())
    assert found["train"] != sorted(found["train"])[:16]
    shutil.copytree(root, tmp_path / "copy")
    (tmp_path / "copy/c000/0.png").unlink()
    assert names(tmp_path / "copy") == found
    assert {s: len(n) for s, n in names(class_folders(tmp_path / "hundred", 100, 1)).items()} == {"train": 64, "val": 16,
                                                                                                  "test": 20}


def test_folders_in_folders_hidden_ones_and_links(tmp_path: Path):
    class_folders(tmp_path / "other", 1, 2)
    class_folders(tmp_path / "root/alphabet", 2, 2)
    picture(tmp_path / "root/.hidden/0.png", 0)
    (tmp_path / "root/linked").symlink_to(tmp_path / "other/c000")
    (tmp_path / "root/alphabet/loop").symlink_to(tmp_path / "root")
    (tmp_path / "root/alphabet/c000/gone.png").symlink_to(tmp_path / "nothing")
    classes, notes = find(tmp_path / "root")
    assert sorted(c.name for c in classes) == ["alphabet/c000", "alphabet/c001", "linked"]
    assert [path for path, _, _ in notes] == ["alphabet/c000/gone.png"]


def test_links_among_folders_are_followed_once(tmp_path: Path):
    """Twelve folders, each with links to all: a walk along every path would not end."""
    root = class_folders(tmp_path / "root", 12, 1)
    for a in sorted(root.iterdir()):
        for b in sorted(root.iterdir()):
            (a / f"to_{b.name}").symlink_to(b)
    classes, _ = find(root)
    assert sum(len(c.files) for c in classes) == 12


@pytest.mark.parametrize("row", ("../outside", "/etc", "a/../../outside", ".", ""))
def test_lists_name_nothing_outside_the_root(row: str, tmp_path: Path):
    class_folders(tmp_path / "root", 3, 1)
    picture(tmp_path / "outside/0.png", 0)
    for split, name in zip(SPLITS, (row, "c001", "c002")):
        (tmp_path / f"root/{split}.csv").write_text(f"{name},x\n")
    with pytest.raises(InputError, match="train.csv, row 1 names .* which must be a path below the root"):
        find(tmp_path / "root")
    for split, name in zip(SPLITS, (f"../{row}/0.png", "c001", "c002")):
        (tmp_path / f"root/{split}.csv").write_text(f"filename,label\n{name},{split}\n")
    with pytest.raises(InputError, match="train.csv, row 2 names"):
        find(tmp_path / "root")


def test_a_folder_for_each_split(tmp_path: Path):
    for split, count in zip(SPLITS, (3, 1, 2)):
        class_folders(tmp_path / split, count, 2)
    assert names(tmp_path) == {"train": ["c000", "c001", "c002"], "val": ["c000"], "test": ["c000", "c001"]}


def test_the_lists_of_mini_imagenet(tmp_path: Path):
    for split, label in zip(SPLITS, "abc"):
        for i in range(2):
            picture(tmp_path / f"images/{label}{i}.jpg", i)
        files = (f"{label}0.jpg", f"{label}1.jpg", f"{label}1.jpg", "gone.jpg")
        (tmp_path / f"{split}.csv").write_text("filename,label\n" + "".join(f"{file},n{label}\n" for file in files))
    classes, notes = find(tmp_path)
    assert [(c.split, c.name, [f.path for f in c.files]) for c in classes] == [
        (s, f"n{x}", [f"images/{x}0.jpg", f"images/{x}1.jpg"]) for s, x in zip(SPLITS, "abc")]
    assert [(path, kind) for path, kind, _ in notes] == [("images/gone.jpg", "missing images")] * 3


@pytest.mark.parametrize(("folder", "lists", "row"), (("", "{}.csv", "{},n02098550\n"), ("data", "splits/x/{}.txt", "{}\n")),
                         ids=("tiered-ImageNet", "CIFAR-FS"))
def test_lists_of_classes(folder: str, lists: str, row: str, tmp_path: Path):
    class_folders(tmp_path / folder, 6, 2)
    for i, split in enumerate(SPLITS):
        path = tmp_path / lists.format(split)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(row.format(f"c00{2 * i}") + row.format(f"gone{i}"))
    assert names(tmp_path) == {split: [f"c00{2 * i}", f"gone{i}"] for i, split in enumerate(SPLITS)}
    assert [c for c in find(tmp_path)[0] if c.files][0].files[0].path.endswith("c000/0.png")
    assert [kind for _, kind, _ in find(tmp_path)[1]] == ["missing classes"] * 3


def test_tasks_hold_distinct_images_of_classes_of_their_split(root: Path, tmp_path: Path):
    tasks, own = source(root, tmp_path, TaskSizes(4, 2, 3)), names(root)
    known = {np.asarray(Image.open(p)).transpose(2, 0, 1).tobytes(): (p.parent.name, p.name) for p in root.rglob("*.png")}
    seen = set()
    for split in SPLITS:
        batch = tasks.batch(split, 3, torch.arange(6))
        assert batch.support_x.shape == (6, 8, 3, 16, 16) and batch.query_x.shape == (6, 12, 3, 16, 16)
        assert batch.support_y[0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and batch.query_y[0].tolist() == [0] * 3 + [1] * 3 + [
            2] * 3 + [3] * 3
        for support, query in zip(batch.support_x, batch.query_x):
            found = [known[(x * 255).round().to(torch.uint8).numpy().tobytes()]
                     for n in range(4) for x in (*support[2 * n : 2 * n + 2], *query[3 * n : 3 * n + 3])]
            classes = [name for name, _ in found][::5]
            assert len(set(found)) == 20 and len(set(classes)) == 4, "distinct images, distinct classes"
            assert [name for name, _ in found] == [c for c in classes for _ in range(5)] and set(classes) <= set(own[split])
            seen |= set(found)
    assert len(seen) > 100


def test_a_task_depends_on_its_index_alone_and_not_on_where_the_images_are(root: Path, tmp_path: Path):
    tasks, resident = (source(root, tmp_path, TaskSizes(4, 1, 2), where) for where in (None, True))
    whole = tasks.batch("train", 9, torch.arange(7))
    parts = [tasks.batch("train", 9, i) for i in torch.arange(7).tensor_split(3)]
    assert same(whole, [torch.cat(x) for x in zip(*map(tree_leaves, parts))])
    assert same(whole, resident.batch("train", 9, torch.arange(7)))
    assert isinstance(tasks.images, np.memmap) and type(resident.images) is torch.Tensor
    assert not torch.equal(whole.support_x, tasks.batch("train", 10, torch.arange(7)).support_x)


def test_world_sizes_agree_and_mixed_tasks_train(root: Path, tmp_path: Path):
    mixed = (*TRAIN, "--data.root", root, "--task.ways", 4, "--task.shots", 3, "--task.min_ways", 2, "--task.min_shots", 1,
             "--data.size", 32, "--precision", "float64", "--iterations", 8)
    for ranks in (0, 3):
        succeed(*mixed, "--run_dir", tmp_path / str(ranks), ranks=ranks, XDG_CACHE_HOME=str(tmp_path / "cache"))
    one, three = (read_metrics(tmp_path / name) for name in ("0", "3"))
    assert [line["loss/train"] for line in one] == pytest.approx([line["loss/train"] for line in three], rel=1e-9)


def test_adapt_answers_for_a_folder(root: Path, tmp_path: Path):
    succeed(*TRAIN, "--data.root", root, "--iterations", 20, "--run_dir", tmp_path / "run",
            XDG_CACHE_HOME=str(tmp_path / "cache"))
    shown, asked = tmp_path / "support", tmp_path / "query"
    for name in names(root)["test"][:3]:
        shutil.copytree(root / name, asked / name)
        (shown / name).mkdir(parents=True)
        (asked / name / "0.png").rename(shown / name / "0.png")
    result = succeed("adapt", "--run_dir", tmp_path / "run", "--support", shown, "--query", asked)
    rows = list(csv.DictReader(io.StringIO(result.stdout)))

    def stack(folder: Path) -> np.ndarray:
        return np.stack([np.asarray(Image.open(f)).transpose(2, 0, 1) for f in sorted(folder.rglob("*.png"))]) / 255

    learner = load(tmp_path / "run").fit(stack(shown), sorted(p.name for p in shown.iterdir()))
    assert [row["label"] for row in rows] == list(learner.predict(stack(asked)))
    found = np.array([[float(row[f"p_{c}"]) for c in learner.classes_] for row in rows])
    assert found.shape == (15, 3) and np.allclose(found, learner.predict_proba(stack(asked)), atol=1e-5)


REFUSED = {  # what is done to a copy of the root, further words of the command, what the line says
    "no root": (lambda p: shutil.rmtree(p), (), "data.root: {root} is not a folder"),
    "a file": (lambda p: (shutil.rmtree(p), p.write_text("")), (), "is not a folder"),
    "empty": (lambda p: (shutil.rmtree(p), p.mkdir()), (), "holds no image of a class; give"),
    "only text": (lambda p: [f.rename(f.with_suffix(".txt")) for f in p.rglob("*.png")], (),
                  "holds no image of a class (c000/0.txt is no image"),
    "all broken": (lambda p: [f.write_bytes(b"") for f in p.rglob("*.png")], (), "holds no image that can be decoded"),
    "few classes": (lambda p: [shutil.rmtree(f) for f in sorted(p.iterdir())[8:]], (), "task.ways: 3 is more than the 1"),
    "few images": (lambda p: None, ("--task.queries", 6), "0 classes of split train that have the 7 examples"),
    "a split missing": (lambda p: [class_folders(p / s, 3, 3) for s in ("train", "val")], (), "{root}/test cannot be read"),
    "a list of nothing": (lambda p: [(p / f"{s}.csv").write_text(f"filename,label\nx.jpg,{s}\n") for s in SPLITS], (),
                          "holds no image of a class (images/x.jpg is in train.csv and not there)"),
    "a list missing": (lambda p: (p / "train.csv").write_text("c000\n"), (), "{root}/val.csv does not exist"),
    "lists that overlap": (lambda p: [(p / f"{s}.csv").write_text("c000\n") for s in SPLITS], (), "is in train.csv and in val"),
    "a list of columns": (lambda p: [(p / f"{s}.csv").write_text("filename,label\na\n") for s in SPLITS], (),
                          "train.csv, row 2 has 1 columns"),
    "a list of bytes": (lambda p: [(p / f"{s}.csv").write_bytes(b"\xff\xfe\x00") for s in SPLITS], (), "is not CSV in UTF-8"),
    "small images": (lambda p: None, ("--data.size", 8, "--model.name", "conv4_pooled"), "too small for four poolings"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_a_task_is_one_line_and_exit_2(case: str, root: Path, tmp_path: Path):
    spoil, words, said = REFUSED[case]
    shutil.copytree(root, tmp_path / "root")
    spoil(tmp_path / "root")
    result = run(*TRAIN, *words, "--data.root", tmp_path / "root", "--run_dir", tmp_path / "run",
                 XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    *named, line = result.stderr.splitlines()
    assert said.format(root=tmp_path / "root") in line
    assert all(" left out" in other or "decoding" in other for other in named)


def test_a_folder_without_a_root_is_refused(tmp_path: Path):
    assert "data.root: null, and data.name folder needs one" in wrong(*TRAIN, "--run_dir", tmp_path / "run")
