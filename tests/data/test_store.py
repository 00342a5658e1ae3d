"""The store of decoded images: decoded once, right, shared, checked, and taken up again where a kill left it."""
from __future__ import annotations

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from pictures import claiming, class_folders, listing, picture
from PIL import Image
from processes import ROOT

from alpha_maml.data import images, store
from alpha_maml.errors import InputError


def loaded(root: Path, cache: Path, side: int = 16, colour: bool = True) -> store.Store:
    return store.load(root, listing(root), [], side, colour, cache)


def never(*_: object) -> None:
    raise AssertionError("decoded again")


def test_holds_every_image_class_after_class_and_is_decoded_once(tmp_path: Path, monkeypatch):
    root = class_folders(tmp_path / "root", 3, 4)
    found = loaded(root, tmp_path / "cache")
    assert isinstance(found.images, np.memmap) and found.images.dtype == np.uint8 and found.images.shape == (12, 3, 16, 16)
    assert found.classes == [("train", f"c00{c}", 4) for c in range(3)] and found.notes == []
    for position, path in enumerate(sorted(root.rglob("*.png"))):
        assert np.array_equal(found.images[position], np.asarray(Image.open(path)).transpose(2, 0, 1))
    monkeypatch.setattr(images, "read", never)
    again = loaded(root, tmp_path / "cache")
    assert np.array_equal(again.images, found.images) and again[1:] == found[1:]
    assert not found.images.flags.writeable


def test_size_colour_and_a_changed_file_make_another_store(tmp_path: Path):
    root = class_folders(tmp_path / "root", 2, 2)
    first = loaded(root, tmp_path / "cache")
    assert loaded(root, tmp_path / "cache", side=8).images.shape == (4, 3, 8, 8)
    grey = loaded(root, tmp_path / "cache", colour=False).images
    with Image.open(root / "c000/0.png") as image:
        assert grey.shape == (4, 1, 16, 16) and np.array_equal(grey[0, 0], np.asarray(image.convert("L")))
    picture(root / "c000/0.png", 99)
    assert loaded(root, tmp_path / "cache").digest != first.digest
    assert len(list((tmp_path / "cache").glob("folder-*/index.json"))) == 4


@pytest.mark.parametrize("damage", (
    lambda folder: (folder / "images.u8").write_bytes((folder / "images.u8").read_bytes()[:-1]),
    lambda folder: (folder / "images.u8").write_bytes(b"?" + (folder / "images.u8").read_bytes()[1:]),
    lambda folder: (folder / "index.json").write_text((folder / "index.json").read_text().replace("c000", "c009")),
    lambda folder: (folder / "index.json").write_text("{"),
    lambda folder: (folder / "images.u8").unlink(),
), ids=("shorter", "another byte", "another index", "no index", "no images"))
def test_a_damaged_store_is_made_again(damage, tmp_path: Path, capsys):
    root = class_folders(tmp_path / "root", 2, 2)
    first = loaded(root, tmp_path / "cache")
    content = np.array(first.images)
    damage(first.folder)
    again = loaded(root, tmp_path / "cache")
    assert "is damaged; its images are decoded again" in capsys.readouterr().err
    assert again.digest == first.digest and np.array_equal(again.images, content)


def test_what_is_wrong_with_files_is_named_once_and_the_rest_is_there(tmp_path: Path, capsys):
    root = class_folders(tmp_path / "root", 3, 20)
    for name, content in (("c000/0.png", b"no image"), ("c000/1.png", (root / "c000/1.png").read_bytes()[:300]),
                          ("c001/2.png", b""), ("c001/3.png", claiming(20_000, 20_000)), ("c001/4.png", claiming(9_000, 9_000)),
                          ("c001/5.png", claiming(50_000, 50_000))):
        (root / name).write_bytes(content)
    picture(root / "c002/6.png", 0, side=24)
    found = loaded(root, tmp_path / "cache")
    assert [count for _, _, count in found.classes] == [18, 16, 20] and len(found.images) == 54
    errors = capsys.readouterr().err
    for name in ("c000/0.png", "c000/1.png", "c001/2.png", "c001/3.png", "c001/4.png", "c001/5.png"):
        assert errors.count(f"{root / name} cannot be decoded") == 1 and f"{root / name} cannot be decoded" in \
            (found.folder / "left_out.txt").read_text()
    assert "c001/4.png cannot be decoded (it has 9000 x 9000 pixels, at most 67108864 are read)" in errors
    assert f"{root}/c002/6.png has 24 x 24 pixels, the others 16 x 16; it is resized like them" in errors
    assert [kind for _, kind, _ in found.notes] == ["broken images"] * 6 + ["images of another size"]
    loaded(root, tmp_path / "cache")
    assert capsys.readouterr().err == ""


def test_images_are_upright_and_of_every_mode(tmp_path: Path):
    left = Image.fromarray(np.repeat(np.linspace(0, 255, 16)[None], 16, 0).astype(np.uint8))  # dark on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees: shown, its left is at the top
    for number, image in enumerate((left, left.convert("RGB"), left.convert("RGBA"), left.convert("P"), left.convert("CMYK"))):
        buffer = io.BytesIO()
        image.save(buffer, "TIFF")
        buffer.seek(0)
        with Image.open(buffer) as image:
            assert np.abs(images.resized(image, 8, False)[0].astype(int) - images.resized(left, 8, False)[0]).max() < 9, number
    left.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    turned = images.read(tmp_path / "turned.jpg", lambda image: images.resized(image, 16, True))
    assert turned.shape == (3, 16, 16) and (turned[:, 0] < 40).all() and (turned[:, -1] > 215).all()


def test_what_no_image_can_be_decoded_of_or_kept_is_one_line(tmp_path: Path, monkeypatch):
    root = class_folders(tmp_path / "root", 1, 2)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be kept in .*; make it writable"):
        loaded(root, tmp_path / "file")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("usage", (), {"free": 1000}))
    with pytest.raises(InputError, match="data.size: 16 makes 0.0 GB of 2 images"):
        loaded(root, tmp_path / "cache")
    monkeypatch.undo()
    for path in root.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match="holds no image that can be decoded"):
        loaded(root, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*/index.json"))


def test_more_images_than_memory(tmp_path: Path):
    """A store of twice this machine's memory opens in little of it, and two of its images are read."""
    side, chunk = 84, bytes(store.CHUNK * 3 * 84 * 84)
    count = 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(chunk)
    with (tmp_path / "images.u8").open("wb") as file:
        file.truncate(count * len(chunk))  # a hole: it takes no room on the disk
    index = {"classes": [["train", "a", count * store.CHUNK]], "notes": [], "chunks": [[len(chunk), zlib.crc32(chunk)]] * count}
    (tmp_path / "index.json").write_text(json.dumps({"index": index, "digest": store._digest(index)}))
    held, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    found = store._opened(tmp_path, (3, side, side))
    assert found is not None and found.images[[5, count * store.CHUNK - 1]].max() == 0
    assert time.monotonic() - begun < 5 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held < 1e6


ONE = ("import sys; from pathlib import Path; from pictures import listing; from data import store; root = Path(sys.argv[1]);"
       "print(store.load(root, listing(root), [], 64, True, Path(sys.argv[2])).digest)")


def start(root: Path, cache: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", ONE, str(root), str(cache)], cwd=ROOT / "tests", text=True,
                            env={"PYTHONPATH": str(ROOT), "PATH": ""}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4,000 images of 20 classes: the same ones again under other names."""
    root = tmp_path_factory.mktemp("many")
    for c in range(20):
        source = picture(root / f"c{c:02d}" / "000.png", c, side=96).read_bytes()
        for i in range(200):
            (root / f"c{c:02d}" / f"{i:03d}.png").write_bytes(source)
    return root


def test_a_killed_process_is_taken_up_where_it_stopped(many: Path, tmp_path: Path):
    process, end = start(many, tmp_path / "cut"), time.monotonic() + 60
    while sum(path.read_bytes().count(b"\n") for path in (tmp_path / "cut").glob("*/journal.jsonl")) < 3:
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (partial,) = (tmp_path / "cut").glob("folder-*.partial")
    assert not list((tmp_path / "cut").glob("folder-*/index.json")), "something under the final name"
    with (partial / "journal.jsonl").open("a") as file:
        file.write('{"bytes": 3')  # as a kill within a write leaves it
    with (partial / "images.u8").open("ab") as file:
        file.write(b"half a chunk")
    output, errors = start(many, tmp_path / "cut").communicate(timeout=60)
    left = int(errors.split("decoding ")[1].split()[0])
    assert left <= 4000 - 3 * store.CHUNK and left % store.CHUNK == 4000 % store.CHUNK
    whole, _ = start(many, tmp_path / "whole").communicate(timeout=60)
    assert output == whole != "" and not partial.exists()
    left, right = (next(folder.glob("*/images.u8")).read_bytes() for folder in (tmp_path / "cut", tmp_path / "whole"))
    assert left == right and len(left) == 4000 * 3 * 64 * 64


def test_a_damaged_chunk_of_an_unfinished_store_is_decoded_again(tmp_path: Path, monkeypatch):
    root = class_folders(tmp_path / "root", 2, 6)
    monkeypatch.setattr(store, "CHUNK", 2)
    partial = tmp_path / "partial"
    partial.mkdir()
    files = [file.path for c in listing(root) for file in c.files]
    whole = store._decoded(root, files, (3, 16, 16), partial)
    content = (partial / "images.u8").read_bytes()
    (partial / "images.u8").write_bytes(content[:2000] + b"?" + content[2001:])
    assert len(store._whole_chunks(partial)) == 1
    again = store._decoded(root, files, (3, 16, 16), partial)
    assert [c["checksum"] for c in again] == [c["checksum"] for c in whole]
    assert (partial / "images.u8").read_bytes() == content


@pytest.mark.parametrize("line", (b"[]", b"{}", b"1", b"\xff", b'{"bytes": -1, "results": []}', b'{"bytes": 2, "results": 1}',
                                  b'{"bytes": 0.0, "checksum": 0, "results": []}',
                                  b'{"bytes": 0, "checksum": 0, "results": [[1]]}'))
def test_a_journal_of_anything_is_begun_anew(line: bytes, tmp_path: Path):
    (tmp_path / "journal.jsonl").write_bytes(line + b"\n")
    assert store._whole_chunks(tmp_path) == []


def test_two_processes_share_one_store(many: Path, tmp_path: Path):
    both = [start(many, tmp_path) for _ in range(2)]
    (first, one), (second, other) = (process.communicate(timeout=120) for process in both)
    assert first == second != "" and (one + other).count("decoding 4000 images") == 1
    assert len(list(tmp_path.glob("folder-*"))) == 2, "the store and its lock"
