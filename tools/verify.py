"""dataset -> [patchmill verify] -> every fault by name: reads what training will read, and believes nothing.

Per shard: the sha256 of the tar, the tar's own structure, the index line by line against the members that are really
there, and the sample table against both. Per image (all, or a random part): crc32, and a strict decode with the size
that the table gives. Exit code 1 when anything is wrong.
"""

import hashlib
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, BinaryIO

import numpy as np
import tyro

from patchmill.pipeline.read.image_headers import ImageDamage
from patchmill.pipeline.read.manifest import (
    MANIFEST_NAME,
    NAMES_NAME,
    SAMPLE_DTYPE,
    SAMPLES_NAME,
    ImageFormat,
    Manifest,
    ShardInfo,
    open_samples,
    read_manifest,
)
from patchmill.pipeline.read.tar import TarDamage, TarMember, image_format, index_of, walk_tar
from patchmill.tools.console.options import parse
from patchmill.tools.console.progress import track
from patchmill.tools.packing.pack_dataset import processors
from patchmill.tools.packing.plan import shuffle_keys
from patchmill.tools.packing.strict_decode import decode


@dataclass(frozen=True)
class VerifyArgs:
    """Checks a dataset: every checksum, every index and every image. Exit code 1 and a list when something is wrong.

    Example:
        patchmill verify shards/
        patchmill verify shards/ --sample 0.01
    """

    dataset: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DATASET")]
    """The dataset's folder."""
    sample: float = 1.0
    """Fraction of the images to decode; tars, indexes and tables are always checked whole."""
    seed: int = 0
    """Of that choice."""
    workers: int = 0
    """Processes; 0 is one per processor."""
    max_shown: int = 50
    """Faults to print; their number is always told."""


def main(argv: list[str]) -> int:
    """Runs the command; 0 when nothing is wrong, 1 when something is."""
    args = parse(VerifyArgs, "patchmill verify", argv)
    if not 0 <= args.sample <= 1:
        raise ValueError(f"--sample {args.sample} is not between 0 and 1")
    manifest = read_manifest(args.dataset)
    checks = verify(args.dataset, manifest, args.sample, args.seed, args.workers or processors())
    faults = []
    for found in track(checks, "verifying", len(manifest.shards) + 1):
        faults += found
    for fault in faults[: args.max_shown]:
        print(fault)
    if len(faults) > args.max_shown:
        print(f"... and {len(faults) - args.max_shown} more")
    checked = "all" if args.sample == 1 else f"{args.sample:.2%} of"
    what = f"{manifest.num_samples:,} samples in {len(manifest.shards)} shards ({checked} images decoded)"
    print(f"{args.dataset}: {what}: {f'{len(faults)} faults' if faults else 'all is well'}")
    return 1 if faults else 0


def verify(root: Path, manifest: Manifest, sample: float, seed: int, workers: int) -> Iterator[list[str]]:
    """Yields the faults of the tables, then those of each shard, as lines that begin with the file at fault."""
    faults, samples = check_tables(root, manifest)
    yield faults
    starts = np.cumsum([0, *(shard.samples for shard in manifest.shards)]).tolist()
    tasks = [
        ShardCheck(
            root, number, shard, first, shard.samples if samples is not None else 0, len(manifest.classes), sample, seed
        )
        for number, (shard, first) in enumerate(zip(manifest.shards, starts, strict=False))
    ]
    if workers == 1 or len(tasks) == 1:
        yield from map(check_shard, tasks)
        return
    with ProcessPoolExecutor(min(workers, len(tasks)), get_context("spawn")) as pool:
        yield from pool.map(check_shard, tasks)


def check_tables(root: Path, manifest: Manifest) -> tuple[list[str], np.ndarray | None]:
    """(faults, sample table or None): counts, checksum and ranges of what lies beside the shards."""
    faults = []
    counted = sum(shard.samples for shard in manifest.shards)
    if counted != manifest.num_samples:
        faults.append(f"{MANIFEST_NAME}: counts {manifest.num_samples} samples, its shards {counted}")
    path = root / SAMPLES_NAME
    try:
        samples = open_samples(path, manifest.num_samples)
    except ValueError as error:
        return [*faults, str(error)], None
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != manifest.samples_sha256:
            faults.append(f"{SAMPLES_NAME}: its sha256 is not the manifest's")
    names = root / NAMES_NAME
    if names.is_file() and (lines := names.read_bytes().count(b"\n")) != manifest.num_samples:
        faults.append(f"{NAMES_NAME}: {lines} names for {manifest.num_samples} samples")
    strangers = {path.name for path in root.glob("*.tar")} - {shard.name for shard in manifest.shards}
    faults += [f"{name}: a tar that the manifest does not have" for name in sorted(strangers)]
    return faults, samples


@dataclass(frozen=True)
class ShardCheck:
    """What a worker needs to check one shard: its place in the table and the fraction of its images to decode."""

    root: Path
    number: int
    shard: ShardInfo
    first: int
    rows: int
    classes: int
    sample: float
    seed: int

    def table(self) -> np.ndarray:
        """The shard's rows of samples.npy."""
        if not self.rows:
            return np.zeros(0, SAMPLE_DTYPE)
        samples = np.load(self.root / SAMPLES_NAME, mmap_mode="r")
        return np.array(samples[self.first : self.first + self.rows])

    def chosen(self) -> np.ndarray:
        """Which of these rows to decode, by a hash of the sample index."""
        indices = range(self.first, self.first + self.rows)
        if self.sample == 1:
            return np.arange(self.rows)
        return np.flatnonzero(shuffle_keys([str(i) for i in indices], self.seed) / 2.0**64 < self.sample)


def check_shard(check: ShardCheck) -> list[str]:
    """The faults of one shard."""
    name = check.shard.name
    path = check.root / name
    if not path.is_file():
        return [f"{name}: missing ({check.shard.samples} samples)"]
    rows = check.table()
    faults = []
    if (rows["shard"] != check.number).any():
        faults.append(f"{SAMPLES_NAME}: rows {check.first} to {check.first + len(rows) - 1} are not all of {name}")
    if (rows["label"] < -1).any() or (check.classes and (rows["label"] >= check.classes).any()):
        faults.append(f"{SAMPLES_NAME}: labels outside the {check.classes} classes among the rows of {name}")
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if size != check.shard.bytes:
            faults.append(f"{name}: {size} bytes where the manifest means {check.shard.bytes}")
        file.seek(0)
        if hashlib.file_digest(file, "sha256").hexdigest() != check.shard.sha256:
            faults.append(f"{name}: its sha256 is not the manifest's")
        try:
            members = list(walk_tar(file))
        except TarDamage as damage:
            return [*faults, f"{name}: {damage}", *_check_images(file, rows, check)]
        faults += _check_members(members, rows, check)
        faults += _check_index(members, check)
        return faults + _check_images(file, rows, check)


def _check_members(members: list[TarMember], rows: np.ndarray, check: ShardCheck) -> list[str]:
    """The table's offsets, sizes and formats against the members that are there."""
    name = check.shard.name
    images = {member.offset: member for member in members if image_format(member.name) is not None}
    faults = []
    if len(images) < check.shard.samples:  # tars of others may hold more: those that could not be decoded
        faults.append(f"{name}: holds {len(images)} images where the manifest means {check.shard.samples}")
    for i, row in enumerate(rows):
        member = images.get(int(row["offset"]))
        if member is None or member.size != row["size"]:
            faults.append(f"{name}: sample {check.first + i}: the table's place is no image of the tar")
        elif image_format(member.name) != row["format"]:
            faults.append(f"{name}: sample {check.first + i}: {member.name} is not of the table's format")
    return faults


def _check_index(members: list[TarMember], check: ShardCheck) -> list[str]:
    """The .idx must be, letter for letter, the index of these members."""
    path = check.root / check.shard.index_name
    if not path.is_file():
        return [f"{path.name}: missing"]
    if path.read_text("utf-8", "surrogateescape") != index_of(members):
        return [f"{path.name}: not the index of {check.shard.name} (swapped, stale or damaged)"]
    return []


def _check_images(file: BinaryIO, rows: np.ndarray, check: ShardCheck) -> list[str]:
    faults = []
    end = file.seek(0, 2)
    for i in check.chosen():
        row = rows[i]
        data = b""
        if int(row["offset"]) + int(row["size"]) <= end:  # else the fault is named below
            file.seek(int(row["offset"]))
            data = file.read(int(row["size"]))
        if fault := image_fault(data, row):
            faults.append(f"{check.shard.name}: sample {check.first + i}: {fault}")
    return faults


def image_fault(data: bytes, row: np.void) -> str:
    """What is wrong with one image's bytes; empty when nothing is."""
    if len(data) != row["size"]:
        return "lies past the end of the tar"
    if zlib.crc32(data) != row["crc32"]:
        return "its crc32 is wrong: the bytes were changed"
    try:
        height, width = decode(data, ImageFormat(row["format"])).shape[:2]
    except ImageDamage as damage:
        return f"does not decode: {damage}"
    if (width, height) != (row["width"], row["height"]):
        return f"is {width} x {height} where the table says {row['width']} x {row['height']}"
    return ""
