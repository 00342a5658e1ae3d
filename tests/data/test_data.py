"""Tasks: reproducible by index, distributed as they should be, and Omniglot from its real archives."""
from __future__ import annotations

import io
import math
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._pytree import tree_leaves

from alpha_maml.data.losses.cross_entropy import cross_entropy, cross_entropy_of_present
from alpha_maml.data.losses.mean_squared_error import mean_squared_error
from alpha_maml.data.omniglot import ARCHIVES, SPLIT_BOUNDS, Omniglot, load_images
from alpha_maml.data.sinusoid import Sinusoid
from alpha_maml.data.tasks import TaskSizes, draw, draw_distinct, draw_subset
from alpha_maml.errors import InputError

CPU = torch.device("cpu")


def test_draws_are_splitmix64():
    """Against the reference generator in Python's unbounded integers."""
    mask = 2**64 - 1

    def mix(z: int) -> int:
        z = (z + 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    state = 0
    for part in (12345, 2, 77, 5, 3):  # seed, split "test", iteration, index, stream
        state = mix(state ^ part)
    expected = [(mix((state + i * 0x9E3779B97F4A7C15) & mask) >> 11) * 2.0**-53 for i in range(6)]
    assert draw(12345, "test", 77, torch.tensor([4, 5]), 3, 6)[1].tolist() == expected


def test_draws_are_uniform_and_independent_between_tasks_iterations_and_streams():
    indices = torch.arange(64)
    values = torch.stack([draw(0, "train", i, indices, s, 100) for i in range(5) for s in range(3)])
    assert abs(float(values.mean()) - 0.5) < 0.004 and abs(float(values.var()) - 1 / 12) < 0.002
    rows = values.flatten(0, 1) - 0.5
    assert len(rows.unique(dim=0)) == len(rows)
    assert float((rows @ rows.T / 100 * 12).fill_diagonal_(0).abs().max()) < 0.6  # of 460,000 correlations, sd 0.1


def test_subsets_are_distinct_and_every_position_is_as_likely():
    chosen = draw_subset(draw(1, "train", 0, torch.arange(4000), 0, 10), 3)
    assert all(len(set(row.tolist())) == 3 for row in chosen)
    counts = torch.stack([torch.bincount(chosen[:, place], minlength=10) for place in range(3)])
    assert float((counts - 400).abs().max()) < 5 * math.sqrt(400)


def test_distinct_places_are_distinct_uniform_and_independent_in_their_order():
    """All 5 x 4 x 3 orders of three out of five are as likely; counts may differ from row to row."""
    chosen = draw_distinct(draw(1, "train", 0, torch.arange(60_000), 0, 3), torch.full((60_000,), 5))
    counts = torch.bincount(chosen @ torch.tensor([25, 5, 1]), minlength=125)
    possible = torch.tensor([len({i // 25, i // 5 % 5, i % 5}) == 3 for i in range(125)])
    assert counts[~possible].sum() == 0 and float((counts[possible] - 1000).abs().max()) < 5 * math.sqrt(1000)
    sizes = torch.tensor([[4, 10**12], [7, 4]])
    chosen = draw_distinct(draw(1, "val", 0, torch.arange(2), 0, 8).view(2, 2, 4), sizes)
    assert chosen[0, 0].sort().values.tolist() == chosen[1, 1].sort().values.tolist() == [0, 1, 2, 3]
    assert int(chosen.min()) >= 0 and bool((chosen < sizes[..., None]).all()) and int(chosen[0, 1].max()) > 10**10


def test_ways_and_shots_of_an_iteration_are_uniform_in_their_ranges():
    sizes = TaskSizes(5, 4, 3, 2, 3)
    drawn = [sizes.at(0, "train", i) for i in range(4000)]
    assert set(drawn) == {(n, s) for n in (2, 3, 4, 5) for s in (3, 4)}
    counts = [drawn.count(pair) for pair in set(drawn)]
    assert max(abs(count - 500) for count in counts) < 5 * math.sqrt(500)
    assert sizes.at(0, "train", 7) == drawn[7] and {sizes.at(0, "val", i) for i in range(99)} == {(5, 4)}
    assert {sizes.largest().at(0, "train", i) for i in range(99)} == {(5, 4)}


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True))


def test_a_task_depends_on_its_index_alone(omniglot_root: str, tmp_path_factory):
    cache = tmp_path_factory.getbasetemp().parent / "cache"
    for source in (Sinusoid(TaskSizes(1, 5, 5), 0, torch.float64),
                   Omniglot(omniglot_root, cache, TaskSizes(5, 2, 3), 0, torch.float32, CPU)):
        whole = source.batch("train", 9, torch.arange(7))
        parts = [source.batch("train", 9, i) for i in torch.arange(7).tensor_split(3)]
        assert same(whole, [torch.cat(x) for x in zip(*map(tree_leaves, parts))])
        assert not torch.equal(whole.support_x, source.batch("train", 10, torch.arange(7)).support_x)
        assert not torch.equal(whole.support_x, source.batch("val", 9, torch.arange(7)).support_x)


def test_sinusoids_are_those_of_maml():
    x_s, y_s, x_q, y_q = Sinusoid(TaskSizes(1, 10, 15), 0, torch.float64).batch("train", 0, torch.arange(500)).tensors()
    assert x_s.shape == y_s.shape == (500, 10, 1) and x_q.shape == y_q.shape == (500, 15, 1)
    assert x_s.min() >= -5 and x_s.max() <= 5 and 4.9 < y_s.abs().max() <= 5
    for task in range(3):  # support and query lie on one A sin(x - phase)
        design = torch.cat([x_s[task].sin(), x_s[task].cos()], 1)
        weights = torch.linalg.lstsq(design, y_s[task]).solution
        assert torch.allclose(torch.cat([x_q[task].sin(), x_q[task].cos()], 1) @ weights, y_q[task])
        assert 0.1 <= float(weights.norm()) <= 5 and float(weights[1]) <= 1e-9  # phase in [0, pi]


@pytest.fixture(scope="module")
def omniglot(omniglot_root: str, tmp_path_factory) -> Omniglot:
    cache = tmp_path_factory.getbasetemp().parent / "cache"
    return Omniglot(omniglot_root, cache, TaskSizes(20, 3, 2), 0, torch.float32, CPU)


def test_omniglot_has_its_shapes_and_mamls_splits(omniglot: Omniglot):
    assert omniglot.images.shape == (1623, 20, 28, 28) and omniglot.images.dtype == torch.uint8
    assert {name: stop - start for name, (start, stop) in SPLIT_BOUNDS.items()} == {"train": 1100, "val": 100, "test": 423}
    x_s, y_s, x_q, y_q = omniglot.batch("train", 0, torch.arange(6)).tensors()
    assert x_s.shape == (6, 60, 1, 28, 28) and x_q.shape == (6, 40, 1, 28, 28)
    assert y_s[0].tolist() == [n for n in range(20) for _ in range(3)]
    assert y_q[0].tolist() == [n for n in range(20) for _ in range(2)]
    assert 0 == x_s.min() and x_s.max() <= 1 and 0.03 < x_s.mean() < 0.15, "ink must be 1 on paper 0"


def test_omniglot_tasks_hold_distinct_classes_of_their_split_at_one_rotation_each(omniglot: Omniglot):
    seen, turns_seen = set(), set()
    known = {omniglot.images[c, d].numpy().tobytes(): (c, d) for c in range(1623) for d in range(20)}
    for split, (start, stop) in SPLIT_BOUNDS.items():
        batch = omniglot.batch(split, 3, torch.arange(4))
        for task in range(4):
            classes = []
            for n in range(20):
                x = torch.cat([batch.support_x[task, 3 * n : 3 * n + 3], batch.query_x[task, 2 * n : 2 * n + 2]])[:, 0]
                pixels = (x * 255).round().to(torch.uint8).numpy()
                matches = [(k, [known.get(np.rot90(p, -k).tobytes()) for p in pixels]) for k in range(4)]
                (turn, found), = [(k, m) for k, m in matches if None not in m]
                assert len({c for c, _ in found}) == 1 and len({d for _, d in found}) == 5, "one class, five drawings"
                classes.append(found[0][0])
                turns_seen.add(turn)
            assert len(set(classes)) == 20 and all(start <= c < stop for c in classes)
            seen |= {(split, c) for c in classes}
    assert len(seen) > 120 and turns_seen == {0, 1, 2, 3}


def test_a_damaged_cache_is_decoded_again(omniglot_root: str, tmp_path: Path, monkeypatch):
    decoded = []
    monkeypatch.setattr("alpha_maml.data.omniglot.decode_archive",
                        lambda path: decoded.append(path) or {f"{path.name}{i}": np.full((20, 28, 28), i % 251, np.uint8)
                                                              for i in range(964 if "back" in path.name else 659)})
    images, digest = load_images(omniglot_root, tmp_path)
    assert load_images(omniglot_root, tmp_path)[1] == digest and len(decoded) == 2
    store = next(tmp_path.glob("*.npy"))
    store.write_bytes(store.read_bytes()[:-7])
    again, same_digest = load_images(omniglot_root, tmp_path)
    assert len(decoded) == 4 and same_digest == digest and np.array_equal(images, again)


def png(size: tuple[int, int] = (105, 105)) -> bytes:
    buffer = io.BytesIO()
    Image.new("1", size).save(buffer, "PNG")
    return buffer.getvalue()


def archive(path: Path, entries: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries.items():
            file.writestr(name, content)


def damaged(path: Path) -> bytes:
    """An archive whose first entry is no deflated stream."""
    archive(path, {"a/b/1.png": png()})
    content = path.read_bytes()
    start = 30 + len("a/b/1.png")
    return content[:start] + b"\xff" * 8 + content[start + 8:]


DAMAGE = {
    "missing": (lambda p: p.unlink(), "does not exist"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]), "not a whole Omniglot archive"),
    "empty": (lambda p: p.write_bytes(b""), "not a whole Omniglot archive"),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), "does not exist"),
    "no drawings": (lambda p: archive(p, {"a.txt": b"x"}), "964 characters, Omniglot has 1623|659 characters"),
    "few drawings": (lambda p: archive(p, {f"a/b/{i}.png": png() for i in range(19)}), "19 drawings of a/b, not 20"),
    "no pictures": (lambda p: archive(p, {"a/b/1.png": b"not a picture"}), "not a whole Omniglot archive"),
    "other sizes": (lambda p: archive(p, {"a/b/1.png": png((106, 105))}), "106 x 105, not 105 x 105"),
    "damaged": (lambda p: p.write_bytes(damaged(p)), "not a whole Omniglot archive"),
    "huge": (lambda p: os.truncate(p, 2**40), "1099511627776 bytes, Omniglot's have fewer"),
    "a bomb": (lambda p: archive(p, {"a/b/1.png": bytes(10**8)}), "100000000 bytes"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_wrong_archives_are_one_line(damage: str, omniglot_root: str, tmp_path: Path):
    for name in ARCHIVES:
        shutil.copy(Path(omniglot_root) / name, tmp_path)
        (tmp_path / name).chmod(0o644)
    spoil, words = DAMAGE[damage]
    spoil(tmp_path / "images_evaluation.zip")
    if damage != "no drawings":  # the good one need not be decoded
        archive(tmp_path / "images_background.zip", {})
    with pytest.raises(InputError, match=words) as caught:
        load_images(str(tmp_path), tmp_path / "cache")
    assert "data.root" in str(caught.value) and "\n" not in str(caught.value) and "fetch both archives" in str(caught.value)
    assert not list((tmp_path / "cache").glob("*.npy*")), "nothing under the final name"


def test_a_cache_that_cannot_be_made_is_one_line(tmp_path: Path):
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(InputError, match="data.root: .*cache cannot be read .File exists"):
        load_images(None, tmp_path / "cache")


@pytest.mark.parametrize(("sizes", "words"), (((101, 1, 1), "task.ways: 101"), ((5, 11, 10), "task.shots .* 11 \\+ 10")))
def test_tasks_that_cannot_be_formed_are_one_line(sizes: tuple, words: str, tmp_path: Path):
    with pytest.raises(InputError, match=words):
        Omniglot(None, tmp_path, TaskSizes(*sizes), 0, torch.float32, CPU)


def test_mixed_tasks_are_the_same_in_any_shard_and_full_in_validation(omniglot_root: str, tmp_path_factory):
    cache = tmp_path_factory.getbasetemp().parent / "cache"
    mixed = Omniglot(omniglot_root, cache, TaskSizes(5, 3, 2, 2, 1), 0, torch.float32, CPU)
    waves = Sinusoid(TaskSizes(1, 9, 5, None, 2), 0, torch.float64)
    for iteration in range(6):
        ways, shots = mixed.sizes.at(0, "train", iteration)
        whole = mixed.batch("train", iteration, torch.arange(7))
        assert whole.support_x.shape == (7, ways * shots, 1, 28, 28) and whole.query_x.shape == (7, ways * 2, 1, 28, 28)
        assert whole.support_y.unique().tolist() == list(range(ways)) == whole.query_y.unique().tolist()
        parts = [mixed.batch("train", iteration, i) for i in torch.arange(7).tensor_split(3)]
        assert same(whole, [torch.cat(x) for x in zip(*map(tree_leaves, parts))])
        _, shots = waves.sizes.at(0, "train", iteration)
        assert waves.batch("train", iteration, torch.arange(2)).support_x.shape == (2, shots, 1)
    assert mixed.batch("val", 3, torch.arange(2)).support_x.shape == (2, 15, 1, 28, 28)
    assert waves.batch("val", 3, torch.arange(2)).support_x.shape == (2, 9, 1)


def test_absent_classes_take_no_part_in_the_loss():
    """Against the loss of the first logits alone; with its first and second derivatives, inside vmap."""
    logits = torch.randn(4, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 9
    labels = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 0, 1, 1, 2, 2], [2, 2, 1, 1, 0, 0], [0, 1, 2, 2, 2, 2]])

    def derivatives(loss, width: int):
        def one(x, y):
            return loss(x[:, :width], y)[0]

        def along(x, y):
            return (torch.func.grad(one)(x, y) * x.sin()).sum()

        return [torch.func.vmap(f)(logits, labels) for f in (one, torch.func.grad(one), torch.func.grad(along))]

    for found, expected in zip(derivatives(cross_entropy_of_present, 5), derivatives(cross_entropy, 3)):
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-14)
    tempting = torch.tensor([[0.0, 1.0, 9.0], [1.0, 0.0, 9.0]])
    _, metrics = cross_entropy_of_present(tempting, torch.tensor([1, 0]))
    assert float(metrics["accuracy"]) == 1, "an absent class is never the answer"
    assert same(cross_entropy_of_present(tempting, torch.tensor([1, 2])), cross_entropy(tempting, torch.tensor([1, 2])))
    full, none = TaskSizes(3, 1, 1), TaskSizes(3, 1, 1, 3)
    assert full.cross_entropy() is none.cross_entropy() is cross_entropy


def test_losses():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0]], dtype=torch.float64)
    loss, metrics = cross_entropy(logits, torch.tensor([0, 1, 1]))
    assert float(loss) == pytest.approx(sum(math.log(1 + math.exp(x)) for x in (-2, -1, 2)) / 3)
    assert float(metrics["accuracy"]) == pytest.approx(2 / 3)
    loss, metrics = mean_squared_error(torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [0.0]]))
    assert float(loss) == 5.0 and metrics == {}
