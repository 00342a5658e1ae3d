"""Bad files of data: Omniglot's archives, images, split lists, .npz archives."""
from __future__ import annotations

import functools
import io
import os
import stat
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import fuzz
import numpy as np
import run_areas
from hypothesis import strategies as st
from hypothesis.strategies import DataObject
from pictures import chunk, claiming
from PIL import Image

from alpha_maml.data import examples, folder, images, omniglot, store

NAMES = ("../../owned.png", "/owned.png", "a/../../owned.png", "C:\\owned.png", "a\\..\\b.png", "é.png", "a" * 300 + ".png",
         ".png", "a.png/")
KINDS = ("whole", "whole", "tiny", "huge", "mode", "animated", "damaged", "text", "empty", "binary", "eps", "svg", "bomb")
MODES = (("PNG", "RGBA"), ("PNG", "LA"), ("PNG", "P"), ("PNG", "1"), ("PNG", "I;16"), ("JPEG", "CMYK"), ("TIFF", "F"),
         ("TIFF", "LAB"), ("BMP", "L"), ("WEBP", "RGB"))


@functools.cache
def picture(kind: str = "PNG", size: tuple[int, int] = (105, 105), frames: int = 1, mode: str = "L") -> bytes:
    stream = io.BytesIO()
    more = [Image.new(mode, size, 10 * i) for i in range(1, frames)]
    Image.new(mode, size).save(stream, kind, **({"save_all": True, "append_images": more} if frames > 1 else {}))
    return stream.getvalue()


@functools.cache
def compressed() -> bytes:
    return zlib.compress(bytes(100_000_000))


@st.composite
def pictures(draw) -> bytes:
    """The bytes of an image, or of what claims to be one."""
    kind = draw(st.sampled_from(KINDS))
    if kind == "tiny":
        return picture("PNG", (draw(st.integers(1, 2)), draw(st.sampled_from((1, 2, 5000)))))
    if kind == "huge":
        return claiming(*(draw(st.sampled_from((0, 1, 9_000, 20_000, 2**31 - 1))) for _ in range(2)), bytes(1000))
    if kind == "mode":
        form, mode = draw(st.sampled_from(MODES))
        return picture(form, (9, 9), 1, mode)
    if kind == "animated":
        return picture(draw(st.sampled_from(("GIF", "PNG", "WEBP", "TIFF"))), (12, 12), 3)
    if kind == "damaged":
        form, frames = draw(st.sampled_from((("PNG", 1), ("JPEG", 1), ("GIF", 3), ("TIFF", 1), ("WEBP", 3))))
        return run_areas.damaged(draw(st.data()), picture(form, (12, 12), frames))
    if kind == "bomb":  # a compressed text of 100 MB beside the pixels
        whole = picture()
        return whole[:33] + chunk(b"zTXt", b"Comment\0\0" + compressed()) + whole[33:]
    return {"whole": picture(), "text": b"no image", "empty": b"", "binary": draw(st.binary(max_size=60)),
            "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "svg": b"<svg/>"}[kind]


def archive_case(data: DataObject, folder: Path) -> str:
    path = folder / "images_background.zip"
    way = data.draw(st.sampled_from((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)))
    with zipfile.ZipFile(path, "w", way) as archive:
        for character in range(data.draw(st.integers(0, 2))):
            for number in range(omniglot.DRAWINGS):
                archive.writestr(f"a/c{character}/{number:02}.png", picture())
        for name in data.draw(st.lists(st.sampled_from((*NAMES, "a/c0/00.png", "a/c9/00.png")), max_size=2, unique=True)):
            entry = zipfile.ZipInfo(name)
            how = data.draw(st.sampled_from(("picture", "link", "bomb", "many")))
            if how == "link":
                entry.external_attr = (stat.S_IFLNK | 0o777) << 16
            content = {"picture": data.draw(pictures()), "link": b"/etc/passwd", "bomb": bytes(10**7), "many": b""}[how]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a name that is there twice
                archive.writestr(entry, content, zipfile.ZIP_DEFLATED if how == "bomb" else None)
    if data.draw(st.booleans()):
        path.write_bytes(run_areas.damaged(data, path.read_bytes()))
    if data.draw(st.integers(0, 3)) == 0:  # what a bomb says of itself, in the central directory
        content = path.read_bytes()
        place = content.rfind(b"PK\x01\x02")
        if place >= 0:
            size = struct.pack("<I", data.draw(st.sampled_from((0, 1, 60_000, 2**31))))
            path.write_bytes(content[:place + 24] + size + content[place + 28:])
    before = sorted(folder.iterdir())
    outcome = fuzz.called(omniglot.decode_archive, path)
    both = folder / "images_evaluation.zip"
    how = data.draw(st.sampled_from(("none", "same", "folder", "link", "loop")))
    if how == "same":
        both.write_bytes(path.read_bytes())
    elif how == "folder":
        both.mkdir()
    elif how != "none":
        both.symlink_to(both if how == "loop" else "/dev/zero")
    assert fuzz.called(omniglot.load_images, str(folder), folder / "cache") == fuzz.REFUSED
    assert [p for p in sorted(folder.iterdir()) if p.name not in ("cache", both.name)] == before, "something was extracted"
    assert [p.name for p in (folder / "cache").iterdir()] == ["omniglot.lock"], "a partial cache"
    return outcome


def folder_of(data: DataObject, root: Path) -> None:
    """Up to three classes of pictures."""
    for c in range(data.draw(st.integers(0, 3))):
        place = root / data.draw(st.sampled_from((f"c{c}", f"é{c}", f"c{c}/deeper", f" {c}", f"x\n{c}")))
        place.mkdir(parents=True, exist_ok=True)
        for i in range(data.draw(st.integers(0, 3))):
            suffix = data.draw(st.sampled_from((".png", ".jpg", ".gif", ".tif", ".webp", ".bmp", ".PNG", ".txt", "")))
            (place / f"{i}{suffix}").write_bytes(data.draw(pictures()))
        if data.draw(st.integers(0, 4)) == 0:
            (place / "link.png").symlink_to(data.draw(st.sampled_from(("link.png", "..", "/dev/zero", "none", "0.png"))))


def decoded(root: Path, cache: Path) -> None:
    found = store.load(root, *folder.find(root), 8, True, cache)
    assert len(found.images) == sum(count for _, _, count in found.classes)


JOURNALS = (b"[]\n", b"{}\n", b'{"bytes": -1}\n', b'{"bytes": 1e9, "checksum": 0, "results": []}\n', b"1\n")


def image_case(data: DataObject, place: Path) -> str:
    root, cache = place / "images", place / "cache"
    root.mkdir()
    folder_of(data, root)
    outcome = fuzz.called(decoded, root, cache)
    made = [p for p in cache.iterdir() if p.is_dir() and not p.name.endswith(".partial")] if cache.is_dir() else []
    assert len(made) == (outcome == fuzz.RAN)
    fuzz.called(examples.read, root, "--support", lambda image: images.resized(image, 8, True))
    if made and data.draw(st.booleans()):  # a damaged store is made anew
        victim = data.draw(st.sampled_from(sorted(made[0].iterdir())))
        victim.write_bytes(run_areas.damaged(data, victim.read_bytes()))
        assert fuzz.called(decoded, root, cache) == fuzz.RAN
    elif made:  # as a killed process leaves it, but for the journal
        partial = made[0].rename(made[0].with_name(f"{made[0].name}.partial"))
        (partial / store.JOURNAL).write_bytes(data.draw(st.binary(max_size=20) | st.sampled_from(JOURNALS)))
        assert fuzz.called(decoded, root, cache) == fuzz.RAN
    return outcome


CELLS = st.sampled_from(("c0", "c1", "c2", "0.png", "1.png", "none", "", ".", "..", "../images", "/etc", "/etc/passwd",
                         "../../x", "a" * 300, "é", " c0", "c0/", "filename", "label")) | st.text(max_size=6)
ODD = (b"\xff\xfe", b"\x00", b'"', b"a," * 200_000, b"x" * 200_000, b"\r\r\n", b"\xef\xbb\xbf")


def split_case(data: DataObject, place: Path) -> str:
    root = place / "images"
    for name in ("images", "c0", "data/c1", "c2", "../outside"):
        (root / name).mkdir(parents=True)
        (root / name / "0.png").write_bytes(picture())
    suffix, by_image = data.draw(st.sampled_from((".csv", ".txt"))), data.draw(st.booleans())
    for split in ("train", "val", "test"):
        if data.draw(st.integers(0, 19)) == 19:
            continue
        whole = {"train": "c0", "val": "c1", "test": "c2"}[split]
        rows = [["0.png", f"{split}s"], ["0.png", f"{split}s"]] if by_image else [[whole], [whole, "n02"]]
        if data.draw(st.booleans()):
            rows += data.draw(st.lists(st.lists(CELLS, min_size=2 * by_image, max_size=2), max_size=3))
        rows = [["filename", "label"], *rows] if by_image else rows
        text = "\n".join(",".join(row) for row in rows).encode("utf-8", "surrogatepass")
        if data.draw(st.integers(0, 9)) == 9:
            text = data.draw(st.sampled_from(ODD)) + text
        (root / f"{split}{suffix}").write_bytes(text)
    return fuzz.called(found_inside, root)


def found_inside(root: Path) -> None:
    classes, _ = folder.find(root)
    for c in classes:
        for file in c.files:
            assert (root / file.path).resolve().is_relative_to(root.resolve()), file.path


SHAPES = ("(5, 1)", "(10000000000, 1)", "(-1, 1)", "()", "(2**9,)", "(5,) * 9", "x", "(99999999999999999999,)")
TYPES = ("<f8", "<f2", "|O", "|V9", "<U9", "<c8", "<M8[s]", ">f8", "x")


def npz_case(data: DataObject, place: Path) -> str:
    run = run_areas.copied()
    run_areas.write_examples(place)
    target = place / data.draw(st.sampled_from(("s.npz", "q.npz")))
    how = data.draw(st.sampled_from(("bytes", "arrays", "arrays", "arrays", "header", "entries")))
    if how == "bytes":
        target.write_bytes(run_areas.damaged(data, target.read_bytes()))
    elif how == "arrays":
        names = data.draw(st.sampled_from(("xy", "xy", "xyz", "x", "y", "")))
        np.savez(target, **{name: data.draw(arrays()) for name in names})
    else:
        shape, kind = data.draw(st.sampled_from(SHAPES)), data.draw(st.sampled_from(TYPES))
        text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}"
        if data.draw(st.integers(0, 4)) == 0:
            text = data.draw(st.text(max_size=20) | st.sampled_from(("(" * 3000, "__import__('os').system('touch owned')")))
        head = text.encode().ljust(117) + b"\n"
        with zipfile.ZipFile(target, "w") as archive:
            name = "x.npy" if how == "header" else data.draw(st.sampled_from(("../x.npy", "x", "/x.npy", "x.npy")))
            archive.writestr(name, b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + bytes(40))
            if data.draw(st.booleans()):
                archive.writestr("y.npy", data.draw(st.sampled_from((b"", b"x", pickled()))))
    out = place / "out.csv"
    outcome = fuzz.commanded(["adapt", f"--run_dir={run}", "--support=s.npz", "--query=q.npz", f"--out={out}"], out)
    assert not (place / "owned").exists()
    return outcome


@st.composite
def arrays(draw) -> np.ndarray:
    kind = draw(st.sampled_from(("f8", "f8", "f4", "f2", "g", ">f4", "i8", "u2", "u8", "?", "c8", "M8[s]", "U3", "V4", "O")))
    shape = draw(st.sampled_from(((5, 1), (5, 1), (5,), (5, 2), (0, 1), (), (1, 5), (5, 1, 1), (3, 1))))
    values = np.arange(int(np.prod(shape))).reshape(shape)
    if kind[0] in "OV":
        return np.zeros(shape, "V4" if kind[0] == "V" else object)
    values = values.astype(kind)
    if kind in ("f8", "g") and values.size and draw(st.booleans()):
        values.flat[0] = draw(st.sampled_from((np.nan, np.inf, 1e300, -1e38)))
    return values


def pickled() -> bytes:
    """An array file whose content is a pickle that runs a command."""
    import pickle

    class Payload:
        def __reduce__(self):
            return os.system, ("touch owned",)

    head = b"{'descr': '|O', 'fortran_order': False, 'shape': (5,), }".ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + pickle.dumps(Payload())


AREAS = [
    fuzz.Area("archives", "names that lead outside, links, bombs, sizes that lie, truncated, damaged, renamed, a folder or a "
              "device in their place", 6, archive_case),
    fuzz.Area("images", "empty, 1 x 1, claims of 20,000 x 20,000, animated, odd modes, wrong suffix, damaged, PostScript, text "
              "bombs, links in circles; damage to the decoded store", 5, image_case),
    fuzz.Area("split lists", "no, odd and quoted text, classes twice or missing, names that lead outside, missing lists", 6,
              split_case),
    fuzz.Area("support and query files", "damaged archives, arrays of any shape and type, headers that lie, pickles", 5,
              npz_case),
]
