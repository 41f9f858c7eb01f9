"""Lists images that file lists, Parquet files and NumPy arrays name or hold.

A table with a `path` column (CSV, JSONL, Parquet) lists files; relative paths start at the table's folder. Parquet
whose image column holds bytes (Hugging Face datasets write `{bytes, path}`) is copied once into a plain file next to
the output: a global shuffle reads rows in an order that Parquet cannot serve. Pickles are not read.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from patchmill.tools.packing.listing import Listing, Method, make_entries, numbered_labels

PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "image_path", "image")
LABEL_COLUMNS = ("label", "class", "target", "fine_label", "labels")
CAPTION_COLUMNS = ("caption", "text")
IMAGE_COLUMNS = ("image", "img", "jpg", "png", "bytes")
ARRAY_NAMES = ("images", "x", "data", "x_train", "arr_0")
LABEL_NAMES = ("labels", "y", "label", "targets", "y_train", "arr_1")


@dataclass(frozen=True)
class Columns:
    """Names of the columns to read; empty takes the first usual name that the table has."""

    path: str = ""
    label: str = ""
    caption: str = ""


def list_table(path: Path, columns: Columns, staging: Path) -> Listing:
    """Lists the images that a .csv, .jsonl or .parquet file names or holds."""
    if path.suffix == ".parquet":
        return list_parquet([path], columns, staging)
    rows = _csv_rows(path) if path.suffix == ".csv" else _jsonl_rows(path)
    return _listed_files(path, list(rows), columns)


def list_parquet(paths: list[Path], columns: Columns, staging: Path) -> Listing:
    """Lists Parquet files of one schema whose rows hold image bytes or name files."""
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError:
        raise ValueError("Parquet needs another package: pip install 'patchmill[parquet]'") from None
    try:
        schema = parquet.read_schema(paths[0])
        image = next((name for name in (columns.path, *IMAGE_COLUMNS) if _holds_bytes(schema, name)), None)
        if image is None:
            rows = [row for path in paths for row in parquet.read_table(path).to_pylist()]
            return _listed_files(paths[0], rows, columns)
        return _spooled(paths, image, schema, columns, staging)
    except ArrowInvalid as error:
        raise ValueError(f"{paths[0].parent} has Parquet files that cannot be read: {error}") from None


def list_array(path: Path, staging: Path) -> Listing:
    """Lists the images of a NumPy array: uint8 [N, H, W], [N, H, W, C] or [N, C, H, W], in .npy or .npz.

    Labels come from the .npz (labels, y, ...), or from `<name>_labels.npy` or `labels.npy` next to an .npy.
    """
    try:
        images, labels = _load_arrays(path)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not an array of images: {error}") from None
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise ValueError(f"{path}: expected images as uint8 [N, H, W, C], found {images.dtype} {images.shape}")
    if images.ndim == 4 and images.shape[3] > 8 >= images.shape[1]:
        images = images.transpose(0, 2, 3, 1)
    if images.ndim == 4 and images.shape[3] > 8:
        raise ValueError(f"{path}: expected at most 8 channels, found {images.shape[3]}")
    if labels is not None and labels.shape != (len(images),):
        raise ValueError(f"{path}: expected one label for each of {len(images)} images, found shape {labels.shape}")
    container, start = _flat_pixels(path, images, staging)
    size = int(np.prod(images.shape[1:]))
    entries = make_entries(len(images))
    entries["method"] = Method.PIXELS
    entries["offset"] = start + size * np.arange(len(images), dtype=np.uint64)
    entries["stored"] = entries["size"] = size
    classes: list[str] = []
    if labels is not None:
        entries["label"], classes = numbered_labels([str(label) for label in labels.tolist()])
    names = [f"{path.stem}/{i:08d}" for i in range(len(images))]
    return Listing(names, entries, [str(container)], classes, pixel_shape=images.shape[1:])


def _listed_files(table: Path, rows: list[dict[str, Any]], columns: Columns) -> Listing:
    if not rows:
        raise ValueError(f"{table} has no rows")
    path_column = _column(table, rows[0], columns.path, PATH_COLUMNS, "--path-column")
    assert path_column is not None
    label_column = _column(table, rows[0], columns.label, LABEL_COLUMNS, "--label-column", needed=False)
    caption_column = _column(table, rows[0], columns.caption, CAPTION_COLUMNS, "--caption-column", needed=False)
    names = [str(row.get(path_column) or "") for row in rows]
    if "://" in names[0]:
        raise ValueError(f"{table} lists URLs: download the images first (img2dataset does), then pack its tars")
    entries = make_entries(len(rows))
    entries["method"] = Method.FILE
    entries["size"] = entries["stored"] = [_size(table.parent / name) for name in names]
    classes: list[str] = []
    if label_column:
        entries["label"], classes = numbered_labels([_text(row.get(label_column)) for row in rows])
    captions = [_text(row.get(caption_column)) for row in rows] if caption_column else None
    return Listing(names, entries, [str(table.parent)], classes, captions)


def _column(
    table: Path, row: dict[str, Any], asked: str, usual: tuple[str, ...], option: str, needed: bool = True
) -> str | None:
    if asked:
        if asked not in row:
            raise ValueError(f"{table} has no column {asked!r} ({option}); it has: {', '.join(row)}")
        return asked
    found = next((name for name in usual if name in row), None)
    if found is None and needed:
        raise ValueError(
            f"{table} has none of the columns {', '.join(usual)}: name one with {option}; it has: {', '.join(row)}"
        )
    return found


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        yield from csv.DictReader(file)


def _jsonl_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: not a JSON object")
            yield row


def _holds_bytes(schema: Any, name: str) -> bool:
    """Whether this column holds image bytes: binary, or Hugging Face's struct of bytes and path."""
    if name not in schema.names:
        return False
    kind = str(schema.field(name).type)
    return kind in ("binary", "large_binary") or kind.startswith("struct<bytes: binary")


def _spooled(paths: list[Path], image: str, schema: Any, columns: Columns, staging: Path) -> Listing:
    """Copies the image bytes of all rows into one file and lists its ranges."""
    from pyarrow import parquet

    first = dict.fromkeys(schema.names)
    label_column = _column(paths[0], first, columns.label, LABEL_COLUMNS, "--label-column", needed=False)
    caption_column = _column(paths[0], first, columns.caption, CAPTION_COLUMNS, "--caption-column", needed=False)
    wanted = [image] + [name for name in (label_column, caption_column) if name]
    names, sizes, labels, captions = [], [], [], []
    staging.mkdir(parents=True, exist_ok=True)
    spool, temporary = staging / "parquet.spool", staging / "parquet.spool.tmp"
    with temporary.open("wb") as file:
        for path in paths:
            row = 0
            for batch in parquet.ParquetFile(path).iter_batches(batch_size=64, columns=wanted):
                for record in batch.to_pylist():
                    cell = record[image]
                    data = (cell.get("bytes") if isinstance(cell, dict) else cell) or b""
                    names.append(f"{path.name}/{row:08d}")
                    sizes.append(file.write(data))
                    labels.append(_text(record[label_column]) if label_column else "")
                    captions.append(_text(record[caption_column]) if caption_column else "")
                    row += 1
    temporary.replace(spool)
    entries = make_entries(len(names))
    entries["method"] = Method.RAW
    entries["stored"] = entries["size"] = sizes
    entries["offset"][1:] = np.cumsum(sizes)[:-1]
    entries["label"], classes = numbered_labels(labels)
    named = _class_names(schema, label_column)
    return Listing(names, entries, [str(spool)], named or classes, captions if caption_column else None)


def _class_names(schema: Any, column: str | None) -> list[str]:
    """The names of a Hugging Face ClassLabel column, from the schema's metadata; empty when there are none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return list(features[column]["names"])
    except (KeyError, TypeError, json.JSONDecodeError):
        return []


def _load_arrays(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    if path.suffix == ".npy":
        beside = [path.with_name(f"{path.stem}_labels.npy"), path.with_name("labels.npy")]
        labels = next((np.load(p, allow_pickle=False) for p in beside if p.is_file() and p != path), None)
        return np.load(path, mmap_mode="r", allow_pickle=False), labels
    with np.load(path, allow_pickle=False) as arrays:
        image = next((name for name in ARRAY_NAMES if name in arrays), None)
        label = next((name for name in LABEL_NAMES if name in arrays), None)
        if image is None:
            raise ValueError(f"none of {', '.join(ARRAY_NAMES)} among {', '.join(arrays.files)}")
        return arrays[image], arrays[label] if label else None


def _flat_pixels(path: Path, images: np.ndarray, staging: Path) -> tuple[Path, int]:
    """(file, offset) where the pixels lie image after image: the .npy itself, or a copy for other layouts."""
    if isinstance(images, np.memmap) and images.flags.c_contiguous:
        return path, images.offset
    staging.mkdir(parents=True, exist_ok=True)
    copy, temporary = staging / f"{path.stem}.pixels", staging / f"{path.stem}.pixels.tmp"
    with temporary.open("wb") as file:
        for image in images:
            file.write(np.ascontiguousarray(image).tobytes())
    temporary.replace(copy)
    return copy, 0


def _size(path: Path) -> int:
    """Bytes of a file; 0 when it is missing, which is reported when it is read."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _text(value: Any) -> str:
    return "" if value is None else str(value)
