"""Lists the images of zip and tar archives; packing reads them from there, nothing is extracted.

Only offsets are kept: a worker reads one image with one seek. Names inside an archive stay names and never become
paths. A tar with labels or captions next to its images (`.cls`, `.txt`, `.json`) is a WebDataset; any other archive is
a tree of folders.
"""

import bz2
import gzip
import json
import lzma
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from patchmill.pipeline.read.image_headers import is_image_name
from patchmill.pipeline.read.tar import TarDamage, TarMember, split_key, walk_tar
from patchmill.tools.packing.listing import (
    ENTRY_DTYPE,
    Listing,
    Method,
    is_hidden,
    labels_from_folders,
    make_entries,
    numbered_labels,
)

COMPRESSED_TARS: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".tgz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
}
SIDECARS = frozenset(["cls", "txt", "json"])
ENCRYPTED = 0x1  # zip flag bit


def list_zip(path: Path) -> Listing:
    """Lists the images of a zip archive. Raises ValueError when it is not a zip or is cut short."""
    names, rows, ignored = [], [], []
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            for info in archive.infolist():
                if info.is_dir() or is_hidden(info.filename):
                    continue
                if not is_image_name(info.filename):
                    ignored.append((info.filename, "not the name of an image"))
                elif info.flag_bits & ENCRYPTED:
                    ignored.append((info.filename, "encrypted"))
                elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    ignored.append((info.filename, f"zip compression {info.compress_type} is not supported"))
                else:
                    names.append(info.filename)
                    method = Method.RAW if info.compress_type == zipfile.ZIP_STORED else Method.DEFLATE
                    offset = _data_offset(file, info.header_offset)
                    rows.append((0, method, offset, info.compress_size, info.file_size, info.CRC, -1))
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable zip archive: {error}") from None
    order = sorted(range(len(names)), key=names.__getitem__)
    names, entries = [names[i] for i in order], np.array(rows, ENTRY_DTYPE)[order]
    entries["label"], classes, notes = labels_from_folders(names)
    return Listing(names, entries, [str(path)], classes, ignored=sorted(ignored), notes=notes)


def list_tars(paths: list[Path]) -> Listing:
    """Lists the images of tars: a WebDataset where images have labels or captions next to them, else trees of folders.

    Duplicate keys and second images of a sample are left out with a reason. Raises TarDamage that names tar and byte.
    """
    found = [_scan_tar(i, path) for i, path in enumerate(paths)]
    images = [image for tar in found for image in tar.images]
    ignored = [entry for tar in found for entry in tar.ignored]
    entries = make_entries(len(images))
    entries["container"] = [image.container for image in images]
    entries["method"] = Method.RAW
    entries["offset"] = [image.member.offset for image in images]
    entries["stored"] = entries["size"] = [image.member.size for image in images]
    inner = [image.member.name for image in images]
    names = inner
    if len(paths) > 1:
        names = [f"{paths[image.container].name}/{image.member.name}" for image in images]
    containers = [str(path) for path in paths]
    if not any(image.labelled for image in images):
        entries["label"], classes, notes = labels_from_folders(inner)
        return Listing(names, entries, containers, classes, ignored=sorted(ignored), notes=notes)
    entries["label"], classes = numbered_labels([image.label for image in images])
    captions = [image.caption for image in images]
    return Listing(names, entries, containers, classes, captions if any(captions) else None, ignored=ignored)


def decompressed(path: Path, folder: Path) -> Path:
    """Decompresses a tar into `folder` (without extracting it): only a plain tar can be read by offset."""
    plain = folder / (path.name.removesuffix(path.suffix).removesuffix(".tar") + ".tar")
    folder.mkdir(parents=True, exist_ok=True)
    temporary = plain.with_name(plain.name + ".tmp")
    try:
        opener = COMPRESSED_TARS[path.suffix]
        with opener(path, "rb") as source, temporary.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from None
    temporary.replace(plain)
    return plain


@dataclass(slots=True)
class _TarImage:
    container: int
    member: TarMember
    labelled: bool = False
    label: str = ""
    caption: str = ""


@dataclass(frozen=True, slots=True)
class _TarContents:
    images: list[_TarImage]
    ignored: list[tuple[str, str]]


def _scan_tar(container: int, path: Path) -> _TarContents:
    """The images of one tar, with the label and caption under the same key."""
    contents = _TarContents([], [])
    by_key: dict[str, _TarImage] = {}
    with path.open("rb") as file:
        try:
            members = list(walk_tar(file))
        except TarDamage as damage:
            raise TarDamage(f"{path} {damage}: download it again, or remove it") from None
        for member in members:
            if is_hidden(member.name.removeprefix("./")) or not is_image_name(member.name):
                continue
            key = member.name.rpartition(".")[0]
            if key in by_key:
                contents.ignored.append((member.name, "a second image under the same key"))
            else:
                by_key[key] = _TarImage(container, member)
                contents.images.append(by_key[key])
        _drop_second_images(contents, by_key)
        for member in members:
            key, _, extension = member.name.rpartition(".")
            if extension in SIDECARS and key in by_key:
                _attach(by_key[key], extension, member.read(file))
            elif not is_image_name(member.name) and not is_hidden(member.name.removeprefix("./")):
                contents.ignored.append((member.name, "not the name of an image"))
    return contents


def _drop_second_images(contents: _TarContents, by_key: dict[str, _TarImage]) -> None:
    """Keeps `1.jpg` and drops `1.seg.png`: both are one sample to WebDataset, and only the first is the picture."""
    for image in list(contents.images):
        split = split_key(image.member.name)
        if split and "." in split[1] and split[0] in by_key:
            contents.images.remove(image)
            contents.ignored.append((image.member.name, "a second image of the same sample"))


def _attach(image: _TarImage, extension: str, content: bytes) -> None:
    image.labelled = True
    text = content.decode("utf-8", "replace").strip()
    if extension == "cls":
        image.label = text
    elif extension == "txt":
        image.caption = text
    else:
        try:
            fields = json.loads(text)
        except json.JSONDecodeError:
            return
        if isinstance(fields, dict):
            image.caption = image.caption or str(fields.get("caption") or "")
            image.label = image.label or str(fields.get("label", ""))


def _data_offset(file: BinaryIO, header_offset: int) -> int:
    """Where a zip member's bytes begin. The lengths in its local header may differ from the central directory's."""
    file.seek(header_offset)
    header = file.read(30)
    if header[:4] != b"PK\x03\x04":
        raise ValueError(f"no local header at byte {header_offset}")
    return header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
