"""Converts a dataset to class folders or one .beton file; `patchmill shard` converts either back."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from patchmill.pipeline.atomic import whole_folder
from patchmill.pipeline.read.manifest import EXTENSIONS, Dataset, ImageFormat, open_dataset
from patchmill.tools.console.options import parse
from patchmill.tools.console.progress import track
from patchmill.tools.packing.beton import write_beton
from patchmill.tools.packing.strict_decode import read_bytes


@dataclass(frozen=True)
class ConvertArgs:
    """Writes a dataset as a tree of class folders, or as one .beton file for FFCV; image bytes stay as they are.

    Example:
        patchmill convert shards/ photos/
        patchmill convert shards/ photos.beton
    """

    dataset: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DATASET")]
    """The dataset's folder. (The way back from either: patchmill shard.)"""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """A new folder, or a file that ends in .beton."""


def main(argv: list[str]) -> int:
    """Runs the command."""
    args = parse(ConvertArgs, "patchmill convert", argv)
    dataset = open_dataset(args.dataset)
    if args.out.exists():
        raise ValueError(f"{args.out} exists already: give a new name")
    if args.out.suffix == ".beton":
        write_beton(dataset, args.out)
    else:
        write_image_folder(dataset, args.out)
    print(f"{args.out}: {len(dataset):,} images")
    return 0


def write_image_folder(dataset: Dataset, out: Path) -> None:
    """Writes <class>/<sample index>.<extension>, images without label at the top; the folder appears once complete.

    Classes keep their order: unless the names are sorted and plain, the folders are called <number>-<name>.
    """
    folders = class_folders(dataset.manifest.classes)
    digits = max(8, len(str(len(dataset))))
    with whole_folder(out) as unfinished:
        for folder in folders:
            (unfinished / folder).mkdir()
        rows = enumerate(dataset.samples)
        for i, row in track(rows, "writing", len(dataset)):
            folder = folders[row["label"]] if row["label"] >= 0 else ""
            name = f"{i:0{digits}d}.{EXTENSIONS[ImageFormat(row['format'])]}"
            (unfinished / folder / name).write_bytes(read_bytes(dataset, i))


def class_folders(classes: list[str]) -> list[str]:
    """Folder names that sort in the order of the classes: packing them again gives the same labels."""
    plain = all(re.fullmatch(r"[\w +()-][\w .+()-]*", name) for name in classes)
    if plain and classes == sorted(classes):
        return classes
    digits = len(str(len(classes)))
    return [f"{i:0{digits}d}-{re.sub(r'[^A-Za-z0-9._-]+', '_', name)}" for i, name in enumerate(classes)]
