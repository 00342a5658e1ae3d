"""Images of one's own in folders, or by the split lists of mini-ImageNet, tiered-ImageNet and CIFAR-FS (docs/data.md)."""
from __future__ import annotations

import csv
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from alpha_maml.data import Context, Description, Settings, store
from alpha_maml.data.images import SUFFIXES, resized
from alpha_maml.data.losses.cross_entropy import cross_entropy
from alpha_maml.data.store import Class, File, Note
from alpha_maml.data.tasks import SPLITS, TaskBatch, TaskSizes, classification_batch, draw_examples, usable_classes
from alpha_maml.errors import InputError, reading

SHARES = (0.64, 0.16)  # of the classes, train and val where no split is given; the rest is test: mini-ImageNet's own
RESIDENT = 0.5  # of a GPU's free memory that the images may fill by themselves
PART = 4096  # images copied there at a time


def find(root: Path) -> tuple[list[Class], list[Note]]:
    """The classes under `root` with their files, and what is there besides. Raises InputError where there is no data set."""
    notes: list[Note] = []
    with reading("data.root"):
        if not root.is_dir():
            raise InputError(f"data.root: {root} is not a folder; give the one that holds the images, see docs/data.md")
        lists = _split_lists(root)
        if lists:
            classes = _listed(root, lists, notes)
        elif (root / "train").is_dir() and any((root / split).is_dir() for split in ("val", "test")):
            classes = [Class(split, name, files) for split in SPLITS for name, files in _folders(root, split, notes)]
        else:
            classes = _shared_out(_folders(root, "", notes))
    if not any(c.files for c in classes):
        first = f" ({notes[0][0]} {notes[0][2]})" if notes else ""
        raise InputError(f"data.root: {root} holds no image of a class{first}; give a folder that does, see docs/data.md")
    return classes, notes


def _shared_out(found: list[tuple[str, list[File]]]) -> list[Class]:
    """Every class in a split: a fixed shuffle of the sorted names, cut by SHARES."""
    order = np.random.RandomState(1).permutation(len(found))  # the legacy generator's stream is frozen
    train, val = (round(share * len(found)) for share in SHARES)
    return [Class(SPLITS[(place >= train) + (place >= train + val)], *found[i]) for place, i in enumerate(order)]


def _folders(root: Path, below: str, notes: list[Note]) -> list[tuple[str, list[File]]]:
    """Every folder under root/below that holds images, by its path below that, with the images."""
    found = []
    for folder, files, leaf in _walk(root, below, notes):
        name = os.path.relpath(folder or ".", below or ".")
        if name == ".":
            notes.extend((f.path, "images outside a class", "is not in the folder of a class; it is left out") for f in files)
        elif files:
            found.append((name, files))
        elif leaf:
            notes.append((folder, "empty classes", "holds no image; it is left out"))
    return found


def _walk(root: Path, folder: str, notes: list[Note]) -> Iterator[tuple[str, list[File], bool]]:
    """root/folder and all folders below it, by name: the path below the root, the images in it, and whether there is no
    folder below. Hidden ones are passed over, links are followed, but to no folder twice: they may lead in circles."""
    seen, left = set(), [folder]
    while left:
        folder = left.pop()
        status = os.stat(os.path.join(root, folder))
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        files, inner = [], []
        below = folder and f"{folder}/"
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in sorted(entries, key=attrgetter("name")):
                name = entry.name
                path = below + name
                if name.startswith("."):
                    continue
                if entry.is_dir():
                    inner.append(path)
                elif entry.is_file() and name.lower().endswith(SUFFIXES):
                    files.append(_file(path, entry.stat()))
                else:
                    notes.append((path, "files that are no images", "is no image by its name; it is left out"))
        yield folder, files, not inner
        left += reversed(inner)


def _file(path: str, status: os.stat_result) -> File:
    return File(path, status.st_size, status.st_mtime_ns)


def _split_lists(root: Path) -> dict[str, Path]:
    """The lists train, val and test in the root or a folder of root/splits, as .csv or .txt."""
    for folder in (root, *sorted(root.glob("splits/*"))):
        for suffix in (".csv", ".txt"):
            paths = {split: folder / f"{split}{suffix}" for split in SPLITS}
            missing = [path for path in paths.values() if not path.is_file()]
            if len(missing) < len(SPLITS):
                if missing:
                    raise InputError(f"data.root: {missing[0]} does not exist; put it beside the other split lists")
                return paths
    return {}


def _listed(root: Path, lists: dict[str, Path], notes: list[Note]) -> list[Class]:
    """The classes that the split lists name: rows filename, label of images under root/images, or rows that begin with a
    class, a folder of root/data or of the root."""
    classes, seen = [], {}
    for split, path in lists.items():
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                rows = [row for row in csv.reader(file) if row]
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"data.root: {path} is not CSV in UTF-8 ({error}); correct it") from None
        by_image = rows[:1] == [["filename", "label"]]
        found: dict[str, list[File]] = {}
        for number, row in enumerate(rows[1:] if by_image else rows, 2 if by_image else 1):
            if by_image and len(row) != 2:
                raise InputError(f"data.root: {path}, row {number} has {len(row)} columns, not filename and label; correct it")
            label = row[1] if by_image else row[0].strip()
            if os.path.normpath(row[0].strip()).split(os.sep)[0] in ("..", ".", "") or not row[0].isprintable():
                raise InputError(f"data.root: {path}, row {number} names {row[0]!r}, which must be a path below the root; "
                                 "correct it")
            if seen.setdefault(label, split) != split:
                raise InputError(f"data.root: class {label!r} is in {lists[seen[label]].name} and in {path.name}; a class "
                                 "belongs to one split, remove it from the other")
            if not by_image:
                found[label] = _class_folder(root, label, path.name, notes)
            else:
                image = os.path.join("images", row[0])
                try:
                    status = os.stat(os.path.join(root, image))
                except OSError:
                    status = None
                if status and stat.S_ISREG(status.st_mode):
                    found.setdefault(label, []).append(_file(image, status))
                else:
                    notes.append((image, "missing images", f"is in {path.name} and not there"))
        classes += [Class(split, label, list(dict.fromkeys(files))) for label, files in found.items()]
    return classes


def _class_folder(root: Path, label: str, listed_in: str, notes: list[Note]) -> list[File]:
    for folder in (os.path.join("data", label), label):
        if (root / folder).is_dir():
            files = [file for _, files, _ in _walk(root, folder, notes) for file in files]
            if not files:
                notes.append((folder, "empty classes", "holds no image; it is left out"))
            return files
    notes.append((label, "missing classes", f"is in {listed_in} and no folder here or in data"))
    return []


class Folder:
    """N-way S-shot tasks of images, drawn and normalised; they stay in a memory-mapped file of which only the drawn ones are
    read, or on `device` (`resident`; None: on a GPU of which they fill at most half of the free memory. On a CPU the ranks
    share the file's pages in memory anyway).

    support_x [T, N*S, C, side, side] in [0, 1], C = 3 in colour and 1 in grey, support_y [T, N*S] int64; queries likewise.
    `warn` takes a line for the user. Raises InputError where no task can be formed.
    """

    def __init__(self, root: str, side: int, colour: bool, resident: bool | None, cache: Path, sizes: TaskSizes, seed: int,
                 dtype: torch.dtype, device: torch.device, warn: Callable[[str], None]):
        self.outputs, self.loss, self.sizes, self.seed, self.dtype = (
            sizes.ways, sizes.cross_entropy(), sizes, seed, dtype)
        decoded = store.load(Path(root), *find(Path(root)), side, colour, cache)
        self.images, self.digest, self.device = decoded.images, decoded.digest, device
        self.input_shape = decoded.images.shape[1:]
        if resident is None and device.type == "cuda":
            resident = decoded.images.nbytes <= RESIDENT * torch.cuda.mem_get_info(device)[0]
        self.on_device = bool(resident)
        if resident:
            self.images = torch.empty(decoded.images.shape, dtype=torch.uint8, device=device)
            for start in range(0, len(self.images), PART):
                self.images[start : start + PART] = torch.from_numpy(np.array(decoded.images[start : start + PART]))
        faults = Counter(kind for _, kind, _ in decoded.notes)
        starts = np.cumsum([0, *(count for _, _, count in decoded.classes)])
        self.classes = {}  # split -> the first image of each class, and how many it has
        for split in SPLITS:
            place = [i for i, (own, _, _) in enumerate(decoded.classes) if own == split]
            names, counts = [decoded.classes[i][1] for i in place], [decoded.classes[i][2] for i in place]
            kept = usable_classes(names, counts, split, sizes, f"data.root: {root}", warn)
            faults["classes with too few images"] += len(names) - len(kept)
            self.classes[split] = tuple(torch.tensor([values[i] for i in kept], device=device if resident else None)
                                        for values in (starts[place], counts))
        if faults.total():
            warn(f"data.root: {root}: " + ", ".join(f"{kind}: {count}" for kind, count in faults.items() if count)
                 + f"; files by name in {decoded.folder / store.LEFT_OUT}")

    @classmethod
    def build(cls, settings: Settings, sizes: TaskSizes, context: Context) -> Folder:
        if settings.root is None:
            raise InputError("data.root: null, and data.name folder needs one; give the folder that holds the images")
        return cls(settings.root, settings.size, settings.colour, settings.resident, context.cache, sizes, context.seed,
                   context.dtype, context.device, context.warn)

    @classmethod
    def describe(cls, settings: Settings, ways: int) -> Description:
        return Description((3 if settings.colour else 1, settings.size, settings.size), ways, cross_entropy, False,
                           lambda image: resized(image, settings.size, settings.colour) / 255.0)

    def batch(self, split: str, iteration: int | Tensor, indices: Tensor) -> TaskBatch:
        ways, shots = self.sizes.at(self.seed, split, iteration)
        first, counts = self.classes[split]
        classes, places = draw_examples(self.seed, split, iteration, indices.to(first.device), counts, ways,
                                        shots + self.sizes.queries)
        rows = first[classes][..., None] + places  # [T, N, S+Q]
        if isinstance(self.images, Tensor):
            pixels = self.images[rows]
        else:
            pixels = torch.from_numpy(self.images[rows.numpy()]).to(self.device)
        return classification_batch(pixels.to(self.dtype).div_(255), shots)

    def identity(self) -> dict[str, str]:
        return {"name": "folder", "digest": self.digest[:36]}
