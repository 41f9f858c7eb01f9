"""Plans which sample goes into which shard, before any image is decoded.

The order is a seeded global shuffle that depends on no library: samples are sorted by the keyed BLAKE2b hash of their
names. The order of listing does not matter, and adding a file moves no other. A shard ends where the sum of source
sizes passes the shard size. Each shard is an independent unit of work, for any number of workers or machines, and an
interrupted run knows which shards it has.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from patchmill.pipeline.read.tar import BLOCK
from patchmill.tools.packing.destination import PARTS_FOLDER
from patchmill.tools.packing.listing import Listing, read_sample
from patchmill.tools.packing.normalise import Policy

STATISTICS_SAMPLES = 2048  # images whose pixels are counted for mean and std, spread evenly over the plan


@dataclass(frozen=True)
class PackOptions:
    """Everything but the listing that shapes the content of a dataset."""

    seed: int = 0
    shard_size_mb: float = 256.0
    dedupe: bool = False
    max_samples: int = 0
    policy: Policy = field(default_factory=Policy)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"--seed {self.seed} is not between 0 and 2**64 - 1")
        if not self.shard_size_mb > 0:
            raise ValueError(f"--shard-size-mb {self.shard_size_mb} must be above 0")
        if self.max_samples < 0:
            raise ValueError(f"--max-samples {self.max_samples} must not be negative (0 packs all)")
        if self.policy.resize != "none" and self.policy.size < 1:
            raise ValueError(f"--resize {self.policy.resize} needs --size N, in pixels")
        if self.policy.resize == "none" and self.policy.size:
            raise ValueError(f"--size {self.policy.size} needs --resize: shorter-side, longest-side or border")
        if not 1 <= self.policy.quality <= 100:
            raise ValueError(f"--quality {self.policy.quality} is not between 1 and 100")

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)


@dataclass(frozen=True)
class ShardTask:
    """One shard to pack: plain data that any process or machine can take.

    `samples` has the listing's rows of this shard in order. The first has position `first` in the plan; positions
    number the keys (`key_digits` digits). Every `statistics_stride`-th position counts for mean and std.
    """

    shard: int
    first: int
    key_digits: int
    statistics_stride: int
    samples: Listing
    policy: Policy

    @property
    def name(self) -> str:
        """File name of the tar."""
        return shard_name(self.shard)


@dataclass(frozen=True)
class Plan:
    """order[starts[i]:starts[i + 1]] are the listing's rows of shard i; `left_out` names duplicates and other files."""

    listing: Listing
    options: PackOptions
    order: np.ndarray
    starts: np.ndarray
    left_out: list[dict[str, str]]
    fingerprint: str

    @property
    def num_shards(self) -> int:
        return len(self.starts) - 1

    def shard_images(self, shard: int) -> int:
        """Images planned for the shard."""
        return int(self.starts[shard + 1] - self.starts[shard])

    def shard_bytes(self, shard: int) -> int:
        """Bytes of the shard's sources."""
        return int(self.listing.entries["size"][self.order[self.starts[shard] : self.starts[shard + 1]]].sum())

    def task(self, shard: int) -> ShardTask:
        """The task of one shard, made on demand: tasks of a large plan would not fit in memory together."""
        first, end = int(self.starts[shard]), int(self.starts[shard + 1])
        return ShardTask(
            shard=shard,
            first=first,
            key_digits=max(8, len(str(len(self.order)))),
            statistics_stride=max(1, len(self.order) // STATISTICS_SAMPLES),
            samples=self.listing.take(self.order[first:end]),
            policy=self.options.policy,
        )


def make_plan(listing: Listing, options: PackOptions) -> Plan:
    """Orders, thins and cuts a listing. Raises ValueError when there is nothing to pack."""
    if not len(listing):
        raise ValueError(_nothing(listing))
    left_out = [{"name": name, "kind": "ignored", "reason": reason} for name, reason in listing.ignored]
    rows = np.arange(len(listing))
    if options.dedupe:
        rows, duplicates = drop_duplicates(listing)
        left_out += duplicates
    order = rows[np.argsort(shuffle_keys(listing.names, options.seed)[rows], kind="stable")]
    if options.max_samples:
        order = order[: options.max_samples]
    starts = cut_shards(listing.entries["size"][order], int(options.shard_size_mb * 2**20))
    return Plan(listing, options, order, starts, left_out, _fingerprint(listing, options, order, starts))


def shuffle_keys(names: list[str], seed: int) -> np.ndarray:
    """uint64 sort keys: BLAKE2b-64 of each name (UTF-8), keyed with the seed (8 bytes, little-endian)."""
    key = seed.to_bytes(8, "little")
    digests = b"".join(hashlib.blake2b(_utf8(name), digest_size=8, key=key).digest() for name in names)
    return np.frombuffer(digests, "<u8")


def cut_shards(sizes: np.ndarray, shard_bytes: int) -> np.ndarray:
    """Starts of the shards, and the end. A shard takes samples while their sizes and headers fit in shard_bytes.

    cut_shards([40, 40, 40], 2 * (40 + 1536)) -> [0, 2, 3]. A larger sample gets its own shard.
    """
    ends = np.cumsum(np.asarray(sizes, np.int64) + 3 * BLOCK)  # the image's header, and label with its header
    starts = [0]
    while starts[-1] < len(ends):
        before = ends[starts[-1] - 1] if starts[-1] else 0
        starts.append(max(int(np.searchsorted(ends, before + shard_bytes, side="right")), starts[-1] + 1))
    return np.array(starts, np.int64)


def drop_duplicates(listing: Listing) -> tuple[np.ndarray, list[dict[str, str]]]:
    """(rows to keep, the others): of images with equal bytes the first by name stays; only equal sizes are hashed."""
    _, group, count = np.unique(listing.entries["size"], return_inverse=True, return_counts=True)
    stays = np.ones(len(listing), bool)
    first_of: dict[bytes, int] = {}
    duplicates = []
    for row in np.flatnonzero(count[group] > 1):
        digest = _content_digest(listing, int(row))
        first = first_of.setdefault(digest, int(row)) if digest else int(row)
        if first != row:
            stays[row] = False
            duplicates.append(
                {"name": listing.names[row], "kind": "duplicate", "reason": f"same bytes as {listing.names[first]}"}
            )
    return np.flatnonzero(stays), duplicates


def pending(plan: Plan, done: set[int], part: int = 0, parts: int = 1) -> Iterator[ShardTask]:
    """The tasks that remain, of every `parts`-th shard starting with `part`."""
    return (plan.task(shard) for shard in range(part, plan.num_shards, parts) if shard not in done)


def shard_name(shard: int) -> str:
    """File name of a shard's tar."""
    return f"shard-{shard:06d}.tar"


def part_name(shard: int) -> str:
    """The part record of a shard, inside the unfinished dataset."""
    return f"{PARTS_FOLDER}/shard-{shard:06d}.json"


def _nothing(listing: Listing) -> str:
    ignored = f" ({len(listing.ignored)} other files)" if listing.ignored else ""
    return (
        f"no image in {', '.join(listing.containers) or 'the source'}{ignored}: give a folder of .jpg, .png, ... files"
    )


def _content_digest(listing: Listing, row: int) -> bytes:
    """BLAKE2b of the sample; empty when it cannot be read, which packing reports."""
    try:
        return hashlib.blake2b(read_sample(listing, row), digest_size=20).digest()
    except (OSError, ValueError):
        return b""


def _utf8(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _fingerprint(listing: Listing, options: PackOptions, order: np.ndarray, starts: np.ndarray) -> str:
    """sha256 (hex) of everything that shapes the output; a run refuses to resume in the folder of another plan."""
    digest = hashlib.sha256(json.dumps(options.as_dict(), sort_keys=True).encode())
    digest.update(json.dumps([listing.classes, listing.pixel_shape]).encode())
    for column in ("size", "label"):
        digest.update(np.ascontiguousarray(listing.entries[column][order]).tobytes())
    digest.update(starts.astype("<i8").tobytes())
    for row in order:
        digest.update(_utf8(listing.names[row]) + b"\0")
        if listing.captions is not None:
            digest.update(_utf8(listing.captions[row]) + b"\0")
    return digest.hexdigest()
