"""Joins the parts of a dataset, or several datasets, into one.

Parts: after `patchmill shard ... --part I/N` ran for every I, `merge OUT` joins what they packed; the result is byte
for byte that of one run. Datasets: `merge OUT A B ...` concatenates the shards of finished datasets, as hard links
where the file system allows. Their classes must be equal: the label files inside the tars are not rewritten.
"""

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from patchmill.pipeline.read.manifest import NAMES_NAME, QUARANTINE_NAME, Dataset, Manifest, index_name, open_dataset
from patchmill.tools.console.options import parse
from patchmill.tools.console.report import print_packed
from patchmill.tools.packing.destination import LocalStore, store_at
from patchmill.tools.packing.join import write_tables
from patchmill.tools.packing.open_source import staging_folder
from patchmill.tools.packing.pack_dataset import join
from patchmill.tools.packing.plan import shard_name


@dataclass(frozen=True)
class MergeArgs:
    """Finishes a dataset that `patchmill shard --part I/N` packed in parts, or joins finished datasets.

    Example:
        patchmill merge shards/
        patchmill merge all/ first/ second/
    """

    out: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
    """The dataset to make."""
    datasets: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="DATASET")] = ()
    """Datasets to join; without any, the parts of OUT are joined."""


def main(argv: list[str]) -> int:
    """Runs the command."""
    args = parse(MergeArgs, "patchmill merge", argv)
    started = time.monotonic()
    store = store_at(args.out)
    if args.datasets:
        if not isinstance(store, LocalStore):
            raise ValueError("datasets are joined in a local folder: give one, then copy the result to the bucket")
        store.refuse_foreign()
        if store.published_manifest() is not None:
            raise ValueError(f"{args.out} is a dataset already: give a new folder")
        manifest = join_datasets([open_dataset(path) for path in args.datasets], store)
    else:
        manifest = join(store)
        shutil.rmtree(staging_folder(args.out), ignore_errors=True)
    print_packed(args.out, manifest, time.monotonic() - started)
    return 0


def join_datasets(datasets: list[Dataset], store: LocalStore) -> Manifest:
    """Concatenates the shards of several datasets. Raises ValueError when their classes or channels differ."""
    first = datasets[0].manifest
    for dataset in datasets[1:]:
        for what in ("classes", "channels"):
            if getattr(dataset.manifest, what) != getattr(first, what):
                raise ValueError(
                    f"{datasets[0].root} and {dataset.root} differ in their {what}: pack their images together"
                )
    store.create()
    records: list[dict[str, Any]] = []
    left_out: list[dict[str, str]] = []
    for dataset in datasets:
        for record in dataset_records(dataset):
            name = shard_name(len(records))
            for old, new in ((record["name"], name), (index_name(record["name"]), index_name(name))):
                link_or_copy(dataset.root / old, store.root / new)
            records.append(record | {"name": name})
        left_out += read_lines(dataset.root / QUARANTINE_NAME)
    options = {"merged": [dataset.manifest.fingerprint() for dataset in datasets]}
    manifest = write_tables(store, records, options=options, classes=first.classes, plan_sha256="", left_out=left_out)
    store.publish()
    return manifest


def dataset_records(dataset: Dataset) -> list[dict[str, Any]]:
    """A finished dataset as the part records it was made of; the first has the pixel sums of all."""
    names = read_lines(dataset.root / NAMES_NAME) or [""] * len(dataset)
    pixels = dataset.manifest.statistics["pixels"]
    columns = [name for name in dataset.samples.dtype.names or () if name != "shard"]
    records = []
    for number, shard in enumerate(dataset.manifest.shards):
        chosen = np.flatnonzero(dataset.samples["shard"] == number)
        records.append(
            {
                "bytes": shard.bytes,
                "name": shard.name,
                "names": [names[i] for i in chosen],
                "rows": [list(row) for row in dataset.samples[columns][chosen].tolist()],
                "sha256": shard.sha256,
                "sums": [pixels["count"], pixels["sums"], pixels["squares"]] if number == 0 else [0, [], []],
            }
        )
    return records


def read_lines(path: Path) -> list[Any]:
    """The values of a .jsonl file; [] when the file is missing."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []


def link_or_copy(source: Path, target: Path) -> None:
    """Makes a hard link to the file, or a copy where the file system cannot link."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
