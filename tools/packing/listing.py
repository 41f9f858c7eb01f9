"""Describes any collection of images as one listing, and reads its samples.

A listing names every image and says where its bytes are: in a separate file, in a range of an archive, or in a row of
an array. It is a table, not a list of objects: a million files take about 150 MB. Reading a sample needs nothing but
its row: any worker can read any sample in any order.
"""

import os
import zlib
from dataclasses import dataclass, field, replace
from enum import IntEnum
from pathlib import Path

import numpy as np

from patchmill.pipeline.read.image_headers import is_image_name

SPLIT_NAMES = frozenset(["train", "training", "val", "valid", "validation", "test", "testing", "eval"])


class Method(IntEnum):
    """How a sample's bytes are stored."""

    FILE = 0  # a separate file: container folder / name
    RAW = 1  # `stored` bytes at `offset` of the container
    DEFLATE = 2  # the same, compressed (zip)
    PIXELS = 3  # the same, raw uint8 pixels of Listing.pixel_shape


ENTRY_DTYPE = np.dtype(
    [
        ("container", "<u4"),  # index into Listing.containers
        ("method", "u1"),  # Method
        ("offset", "<u8"),
        ("stored", "<u8"),  # bytes in the container
        ("size", "<u8"),  # bytes of the encoded image, which shards are planned by
        ("crc32", "<u4"),  # of the image, where the archive knows it (DEFLATE and RAW in zips); else 0
        ("label", "<i4"),  # index into Listing.classes; -1 unknown
    ]
)


class SourceDamage(ValueError):
    """The container no longer has the bytes of a sample."""


@dataclass(frozen=True)
class Listing:
    """Every image of a collection: `names[i]`, `entries[i]` and, where there are any, `captions[i]`.

    Names need not be unique; they decide order and shuffle. `ignored` has (name, reason) of files that are not images
    by their names; `notes` are lines to show the user.
    """

    names: list[str]
    entries: np.ndarray
    containers: list[str]
    classes: list[str] = field(default_factory=list)
    captions: list[str] | None = None
    pixel_shape: tuple[int, ...] = ()
    ignored: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)

    def take(self, rows: np.ndarray) -> "Listing":
        """These rows in this order, without `ignored` and `notes`, which concern the whole collection."""
        captions = [self.captions[i] for i in rows] if self.captions is not None else None
        return replace(
            self,
            names=[self.names[i] for i in rows],
            entries=self.entries[rows],
            captions=captions,
            ignored=[],
            notes=[],
        )


def make_entries(count: int) -> np.ndarray:
    """`count` zeroed entries without labels."""
    entries = np.zeros(count, ENTRY_DTYPE)
    entries["label"] = -1
    return entries


def read_sample(listing: Listing, row: int) -> bytes:
    """The bytes of one sample. Raises SourceDamage when its container has changed, OSError when it cannot be read."""
    entry = listing.entries[row]
    container = listing.containers[entry["container"]]
    if entry["method"] == Method.FILE:
        with open(os.path.join(container, listing.names[row]), "rb") as file:
            return file.read()
    with open(container, "rb") as file:
        file.seek(int(entry["offset"]))
        data = file.read(int(entry["stored"]))
    if len(data) != entry["stored"]:
        raise SourceDamage(f"{container} was cut short since it was listed")
    if entry["method"] == Method.DEFLATE:
        try:
            data = zlib.decompress(data, -15, int(entry["size"]))
        except zlib.error as error:
            raise SourceDamage(f"damaged in its archive: {error}") from None
    if entry["crc32"] and zlib.crc32(data) != entry["crc32"]:
        raise SourceDamage("damaged in its archive: its checksum is wrong")
    return data


def is_hidden(name: str) -> bool:
    """Whether a file belongs to the operating system (`.DS_Store`, `__MACOSX/`); such files are not listed."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def list_folder(root: Path) -> Listing:
    """Lists a folder of images: class folders (the ImageFolder layout) or flat; follows each linked folder once."""
    if not root.exists():
        raise FileNotFoundError(f"no folder {root}: give a folder of images")
    found: list[tuple[str, int]] = []
    ignored: list[tuple[str, str]] = []
    seen: set[tuple[int, int]] = set()
    folders = [""]
    while folders:
        folder = folders.pop()
        with os.scandir(root / folder) as children:
            for child in children:
                name = f"{folder}{child.name}"
                if is_hidden(child.name):
                    continue
                if child.is_dir():
                    status = child.stat()
                    if (status.st_dev, status.st_ino) not in seen:
                        seen.add((status.st_dev, status.st_ino))
                        folders.append(name + "/")
                elif not is_image_name(name):
                    ignored.append((name, "not the name of an image"))
                else:
                    found.append((name, _file_size(child)))
    found.sort()
    entries = make_entries(len(found))
    entries["size"] = entries["stored"] = [size for _, size in found]
    names = [name for name, _ in found]
    entries["label"], classes, notes = labels_from_folders(names)
    return Listing(names, entries, [str(root)], classes, ignored=sorted(ignored), notes=notes)


def _file_size(child: os.DirEntry) -> int:
    """Bytes of a file; 0 for a dangling link, which is reported when it is read."""
    try:
        return child.stat().st_size
    except OSError:
        return 0


def labels_from_folders(names: list[str]) -> tuple[np.ndarray, list[str], list[str]]:
    """(labels int32, classes, notes): the class of `dog/x/1.jpg` is `dog`; images outside folders have none.

    A folder around everything is not a class, unless it has no subfolders. Folders that are all named like splits
    (train, val, test) are not classes either; their subfolders are.
    """
    depth = len(common_folder(names))
    tops = {parts[0] if len(parts) > 1 else None for parts in (name[depth:].split("/", 2) for name in names)}
    within_splits = tops <= SPLIT_NAMES and all(name.count("/", depth) >= 2 for name in names)
    notes = []
    if within_splits and len(tops) > 1:
        together = ", ".join(sorted(str(top) for top in tops))
        notes.append(f"the splits {together} are packed into one dataset; --splits keeps them apart")
    level = 1 if within_splits else 0
    parts_of = (name[depth:].split("/", level + 1) for name in names)
    folders = [parts[level] if len(parts) > level + 1 else "" for parts in parts_of]
    classes = sorted(set(folders) - {""})
    number = {name: i for i, name in enumerate(classes)} | {"": -1}
    return np.array([number[folder] for folder in folders], np.int32), classes, notes


def numbered_labels(labels: list[str]) -> tuple[np.ndarray, list[str]]:
    """(int32 labels, classes) of written labels: numbers are indices, other texts are names; "" and -1 are unknown."""
    labels = ["" if label == "-1" else label for label in labels]
    known = {label for label in labels if label}
    if all(label.isascii() and label.isdigit() and len(label) < 7 for label in known):
        count = max((int(label) for label in known), default=-1) + 1
        return np.array([int(label) if label else -1 for label in labels], np.int32), [str(i) for i in range(count)]
    classes = sorted(known)
    number = {name: i for i, name in enumerate(classes)} | {"": -1}
    return np.array([number[label] for label in labels], np.int32), classes


def common_folder(names: list[str]) -> str:
    """The longest folder prefix (`a/b/`, or empty) that all names share and below which each still has a folder."""
    if not names:
        return ""
    parents = [name.rpartition("/")[0].rpartition("/")[0].split("/") for name in names]
    shared = []
    for low, high in zip(min(parents), max(parents), strict=False):  # what the extremes share, all share
        if low != high:
            break
        shared.append(low)
    return "".join(part + "/" for part in shared if part)
