"""Packs one shard into a tar and a part record, with the same bytes in any process.

A worker takes a ShardTask and writes three files into the unfinished dataset: the tar, its index, and last the part
record (parts/shard-000000.json), which has what the manifest will need. Each is written under a temporary name and
renamed: a part record that exists means a complete shard. join.py joins the records.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from patchmill.pipeline.read.manifest import EXTENSIONS, index_name
from patchmill.pipeline.read.tar import ShardWriter
from patchmill.tools.packing.destination import Store
from patchmill.tools.packing.listing import Listing, Method, SourceDamage, read_sample
from patchmill.tools.packing.normalise import Packed, Policy, normalise, pack_pixels
from patchmill.tools.packing.plan import ShardTask, part_name
from patchmill.tools.packing.strict_decode import Rejected

Progress = Callable[[int, int, int], bool]  # (images, source bytes, bad images) just done -> go on?


class Stopped(Exception):
    """The run is being stopped; the shard in work is dropped."""


@dataclass
class PixelSums:
    """Exact integer sums over a grid of pixels; the order of adding images does not change them.

    Counts every s-th pixel of an image in both directions, s = max(1, shorter side // 64): some 4,000 to 20,000 pixels
    for any size. Grey counts as three equal channels.
    """

    pixels: int = 0
    sums: Sequence[int] = ()
    squares: Sequence[int] = ()

    def add(self, image: np.ndarray, channels: int) -> None:
        """Adds one image, uint8 [H, W] or [H, W, C], as `channels` channels."""
        stride = max(1, min(image.shape[:2]) // 64)
        grid = image[::stride, ::stride]
        if grid.ndim == 2:
            grid = np.repeat(grid[:, :, None], min(channels, 3), axis=2)
        if grid.shape[2] < channels:  # an opaque alpha channel where the image has none
            grid = np.concatenate([grid, np.full((*grid.shape[:2], channels - grid.shape[2]), 255, np.uint8)], axis=2)
        values = grid.reshape(-1, channels).astype(np.int64)
        sums, squares = values.sum(axis=0).tolist(), (values * values).sum(axis=0).tolist()
        self.merge(PixelSums(len(values), tuple(sums), tuple(squares)))

    def merge(self, other: "PixelSums") -> None:
        """Adds another's sums."""
        if not other.pixels:
            return
        if not self.pixels:
            self.sums, self.squares = (0,) * len(other.sums), (0,) * len(other.sums)
        self.pixels += other.pixels
        self.sums = tuple(a + b for a, b in zip(self.sums, other.sums, strict=True))
        self.squares = tuple(a + b for a, b in zip(self.squares, other.squares, strict=True))


def pack_shard(task: ShardTask, store: Store, progress: Progress) -> None:
    """Packs one shard into `store`; its part record names the images that cannot be packed, with the reason.

    Raises Stopped when `progress` returns False, OSError when the output cannot be written. No partial file is left.
    """
    rows: list[list[int]] = []
    names: list[str] = []
    left_out: list[dict[str, str]] = []
    sums = PixelSums()
    with store.writing(task.name) as file:
        writer = ShardWriter(file)
        for row, name in enumerate(task.samples.names):
            bad = 0
            try:
                packed = pack_sample(task, row)
            except Rejected as rejected:
                left_out.append({"name": name, "kind": rejected.kind, "reason": rejected.reason})
                bad = int(rejected.kind == "bad")
            else:
                rows.append(_write(writer, task, row, packed))
                names.append(name)
                if packed.pixels is not None and counts_for_statistics(task, row):
                    sums.add(packed.pixels, statistics_channels(task.samples, task.policy))
            if not progress(1, int(task.samples.entries["size"][row]), bad):
                raise Stopped
        sha256, index = writer.finish()
    store.write_text(index_name(task.name), index)
    record = {
        "bytes": writer.bytes,
        "index_sha256": hashlib.sha256(index.encode()).hexdigest(),
        "left_out": left_out,
        "name": task.name,
        "names": names,
        "rows": rows,
        "sha256": sha256,
        "sums": [sums.pixels, sums.sums, sums.squares],
    }
    store.write_text(part_name(task.shard), json.dumps(record))


def pack_sample(task: ShardTask, row: int) -> Packed:
    """Reads and normalises one sample of a task. Raises Rejected with the reason."""
    listing, policy = task.samples, task.policy
    try:
        data = read_sample(listing, row)
    except SourceDamage as damage:
        raise Rejected(str(damage)) from None
    except OSError as error:
        raise Rejected(f"cannot be read: {error.strerror or error}") from None
    if listing.entries["method"][row] == Method.PIXELS:
        return pack_pixels(np.frombuffer(data, np.uint8).reshape(listing.pixel_shape), policy)
    return normalise(data, policy, want_pixels=counts_for_statistics(task, row))


def counts_for_statistics(task: ShardTask, row: int) -> bool:
    """Whether this row's pixels count for mean and std; depends only on its position in the plan."""
    return (task.first + row) % task.statistics_stride == 0


def statistics_channels(listing: Listing, policy: Policy) -> int:
    """Channels of mean and std: three for pictures, four with alpha, those of the array otherwise."""
    if listing.pixel_shape and listing.pixel_shape[-1] not in (1, 3, 4) and len(listing.pixel_shape) == 3:
        return listing.pixel_shape[-1]
    return 4 if policy.alpha == "keep" else 3


def _write(writer: ShardWriter, task: ShardTask, row: int, packed: Packed) -> list[int]:
    """Appends one sample; returns its row of the table without the shard: offset, size, crc32, ..., label."""
    label = int(task.samples.entries["label"][row])
    components = [(EXTENSIONS[packed.format], packed.data)]
    if label >= 0:
        components.append(("cls", str(label).encode()))
    if task.samples.captions is not None:
        caption = json.dumps({"caption": task.samples.captions[row]}, ensure_ascii=False)
        components.append(("json", caption.encode("utf-8", "replace")))
    offsets = writer.add(f"{task.first + row:0{task.key_digits}d}", components)
    crc = zlib.crc32(packed.data)
    return [offsets[0], len(packed.data), crc, int(packed.format), packed.width, packed.height, label]
