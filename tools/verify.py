"""Checks everything that training reads of a dataset, and names each fault.

Per shard: the sha256 of the tar, the tar's structure, the index line by line against the members that are there, and
the sample table against both. Per image (all, or a random part): size, crc32, markers, and a strict decode that must
give the width and height of the table. Exit code 1 when anything is wrong.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
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
from patchmill.pipeline.read.shards import fault
from patchmill.pipeline.read.tar import TarDamage, TarMember, image_format, index_of, walk_tar
from patchmill.tools.console.options import parse
from patchmill.tools.console.progress import track
from patchmill.tools.packing.plan import shuffle_keys
from patchmill.tools.packing.strict_decode import decode
from patchmill.tools.packing.workers import map_in_processes


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
    """Seed of that choice."""
    workers: int = 0
    """Processes; 0 is one per processor."""
    max_shown: int = 50
    """Faults to print; their total is always given."""


def main(argv: list[str]) -> int:
    """Runs the command; 0 when nothing is wrong, 1 when something is."""
    args = parse(VerifyArgs, "patchmill verify", argv)
    if not 0 <= args.sample <= 1:
        raise ValueError(f"--sample {args.sample} is not between 0 and 1")
    manifest = read_manifest(args.dataset)
    checks = verify(args.dataset, manifest, args.sample, args.seed, args.workers)
    faults = []
    for found in track(checks, "verifying", len(manifest.shards) + 1):
        faults += found
    for line in faults[: args.max_shown]:
        print(line)
    if len(faults) > args.max_shown:
        print(f"... and {len(faults) - args.max_shown} more")
    checked = "all" if args.sample == 1 else f"{args.sample:.2%} of"
    what = f"{manifest.num_samples:,} samples in {len(manifest.shards)} shards ({checked} images decoded)"
    print(f"{args.dataset}: {what}: {f'{len(faults)} faults' if faults else 'all is well'}")
    return 1 if faults else 0


def verify(root: Path, manifest: Manifest, sample: float, seed: int, workers: int) -> Iterator[list[str]]:
    """Yields the faults of the tables, then those of each shard; each line begins with the name of the damaged file."""
    faults, samples = check_tables(root, manifest)
    yield faults
    starts = np.cumsum([0, *(shard.samples for shard in manifest.shards)]).tolist()
    tasks = [
        ShardCheck(
            root, number, shard, first, shard.samples if samples is not None else 0, len(manifest.classes), sample, seed
        )
        for number, (shard, first) in enumerate(zip(manifest.shards, starts, strict=False))
    ]
    yield from map_in_processes(check_shard, tasks, workers)


def check_tables(root: Path, manifest: Manifest) -> tuple[list[str], np.ndarray | None]:
    """(faults, sample table or None): checks the counts and checksums of the files next to the shards."""
    faults = []
    counted = sum(shard.samples for shard in manifest.shards)
    if counted != manifest.num_samples:
        faults.append(f"{MANIFEST_NAME}: num_samples is {manifest.num_samples}, its shards add up to {counted}")
    path = root / SAMPLES_NAME
    try:
        samples = open_samples(path, manifest.num_samples)
    except ValueError as error:
        return [*faults, str(error)], None
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != manifest.samples_sha256:
            faults.append(f"{SAMPLES_NAME}: its sha256 differs from the manifest's")
    names = root / NAMES_NAME
    if names.is_file() and (lines := names.read_bytes().count(b"\n")) != manifest.num_samples:
        faults.append(f"{NAMES_NAME}: expected {manifest.num_samples} names, found {lines}")
    strangers = {path.name for path in root.glob("*.tar")} - {shard.name for shard in manifest.shards}
    faults += [f"{name}: a tar that the manifest does not list" for name in sorted(strangers)]
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
        faults.append(f"{SAMPLES_NAME}: rows of {name} have labels outside the {check.classes} classes")
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if size != check.shard.bytes:
            faults.append(f"{name}: expected {check.shard.bytes} bytes, found {size}")
        file.seek(0)
        if hashlib.file_digest(file, "sha256").hexdigest() != check.shard.sha256:
            faults.append(f"{name}: its sha256 differs from the manifest's")
        try:
            members = list(walk_tar(file))
        except TarDamage as damage:
            return [*faults, f"{name}: {damage}", *_check_images(file, rows, check)]
        faults += _check_members(members, rows, check)
        faults += _check_index(members, check)
        return faults + _check_images(file, rows, check)


def _check_members(members: list[TarMember], rows: np.ndarray, check: ShardCheck) -> list[str]:
    """Compares the table's offsets, sizes and formats with the members of the tar."""
    name = check.shard.name
    images = {member.offset: member for member in members if image_format(member.name) is not None}
    faults = []
    if len(images) < check.shard.samples:  # tars of others may hold more: those that could not be decoded
        faults.append(f"{name}: expected {check.shard.samples} images, found {len(images)}")
    for i, row in enumerate(rows):
        member = images.get(int(row["offset"]))
        if member is None or member.size != row["size"]:
            faults.append(f"{name}: sample {check.first + i}: no image of the tar has the table's offset and size")
        elif image_format(member.name) != row["format"]:
            faults.append(f"{name}: sample {check.first + i}: {member.name} is not in the table's format")
    return faults


def _check_index(members: list[TarMember], check: ShardCheck) -> list[str]:
    """Compares the .idx, character by character, with the index of these members."""
    path = check.root / check.shard.index_name
    if not path.is_file():
        return [f"{path.name}: missing"]
    if path.read_text("utf-8", "surrogateescape") != index_of(members):
        return [f"{path.name}: not the index of {check.shard.name} (swapped, stale or damaged)"]
    return []


def _check_images(file: BinaryIO, rows: np.ndarray, check: ShardCheck) -> list[str]:
    """Reads and decodes the chosen images."""
    faults = []
    end = file.seek(0, 2)
    for i in check.chosen():
        offset, size = int(rows[i]["offset"]), int(rows[i]["size"])
        if offset + size > end:  # a damaged table may hold offsets that no file can be sought to
            reason = "reaches past the end of the tar"
        else:
            file.seek(offset)
            reason = image_fault(file.read(size), rows[i])
        if reason:
            faults.append(f"{check.shard.name}: sample {check.first + i}: {reason}")
    return faults


def image_fault(data: bytes, row: np.void) -> str:
    """What is wrong with one image's bytes; empty when nothing is."""
    if reason := fault(data, int(row["size"]), int(row["crc32"]), int(row["format"])):
        return reason
    try:
        height, width = decode(data, ImageFormat(row["format"])).shape[:2]
    except ImageDamage as damage:
        return f"does not decode: {damage}"
    if (width, height) != (row["width"], row["height"]):
        return f"expected {row['width']} x {row['height']} pixels, found {width} x {height}"
    return ""
