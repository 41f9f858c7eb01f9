"""Reads samples of a packed dataset by index and checks their bytes.

Most damage in the body of a JPEG decodes to wrong pixels without an error, and a sample that does make DALI fail costs
its whole batch. Every read therefore checks size, crc32 and, for JPEG, the first bytes and an end marker. A sample that
fails is returned as a `BadSample`, never skipped silently; feed.py chooses its replacement.

Shards are read with pread and not memory-mapped: truncating a mapped shard kills the process with SIGBUS.
"""

import os
import threading
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from io import FileIO

import numpy as np
from numpy.typing import NDArray

from patchmill.pipeline.observe import NOBODY, Observer
from patchmill.pipeline.read.manifest import Dataset, ImageFormat
from patchmill.pipeline.read.remote import ShardCache

OPEN_SHARDS = 512  # open files at most; the usual limit of a process is 1024
JPEG_START, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be used: its index, its place for people to find it, and the reason."""

    index: int
    where: str
    reason: str


class ShardReader:
    """Reads samples of a packed dataset by index; safe to use from many threads.

    Args:
        dataset: an opened dataset.
        cache: fetches the shards of a remote dataset; None when they are in the dataset's folder.
        observer: sees the checks.
    """

    def __init__(self, dataset: Dataset, cache: ShardCache | None = None, observer: Observer = NOBODY) -> None:
        self.observer = observer
        self.samples = dataset.samples
        self.num_samples = dataset.manifest.num_samples
        self.shard_names = [shard.name for shard in dataset.manifest.shards]
        self.shard_samples = [shard.samples for shard in dataset.manifest.shards]
        self.channels = dataset.manifest.channels
        self.fingerprint = dataset.manifest.fingerprint()
        self._cache = cache
        self._open_shard = cache.open if cache else lambda shard: FileIO(dataset.shard_path(shard))
        self._open: OrderedDict[int, FileIO] = OrderedDict()
        self._lock = threading.Lock()

    def describe(self, sample_ids_B: NDArray[np.int64]) -> tuple[NDArray, NDArray, NDArray]:
        """Displayed heights and widths, and labels, of samples; integer `[B]` each."""
        rows = self.samples[sample_ids_B]
        return rows["height"], rows["width"], rows["label"]

    def read(self, sample_ids_B: NDArray[np.int64]) -> list[bytes | BadSample]:
        """The encoded image of each sample, or the reason why it is bad."""
        rows = self.samples[sample_ids_B]
        wanted = list(zip(sample_ids_B.tolist(), rows.tolist(), strict=True))
        if len(wanted) > 1:  # the kernel fetches the others meanwhile; 0.7 microseconds each when cached
            for _, row in wanted:
                self._announce(row[0], row[1], row[2])
        return [self._read_one(index, row) for index, row in wanted]

    def close(self) -> None:
        """Closes the shards; running reads finish first."""
        with self._lock:
            self._open.clear()
        if self._cache is not None:
            self._cache.close()

    def where(self, index: int) -> str:
        """Names a sample for people: shard, offset, and the member's name from the tar header before its bytes."""
        shard, offset = int(self.samples["shard"][index]), int(self.samples["offset"][index])
        try:
            header = self._pread(shard, 100, max(offset - 512, 0))
        except OSError:
            header = b""
        return f"{self.shard_names[shard]}:{offset}:{header.split(bytes(1), 1)[0].decode('utf-8', 'replace')}"

    def _read_one(self, index: int, row: tuple) -> bytes | BadSample:
        shard, offset, size, crc32, image_format, *_ = row
        try:
            data = self._pread(shard, size, offset)
        except OSError as error:
            return BadSample(index, self.where(index), f"cannot be read: {error.strerror or error}")
        with self.observer.span("check", 1):
            reason = fault(data, size, crc32, image_format)
        return BadSample(index, self.where(index), reason) if reason else data

    def _pread(self, shard: int, size: int, offset: int) -> bytes:
        file = self._file(shard)  # this reference keeps it open if another thread drops it from the table
        return os.pread(file.fileno(), size, offset)

    def _announce(self, shard: int, offset: int, size: int) -> None:
        try:
            file = self._file(shard)
            os.posix_fadvise(file.fileno(), offset, size, os.POSIX_FADV_WILLNEED)
        except OSError:
            return  # only a hint: the read itself reports the error

    def _file(self, shard: int) -> FileIO:
        """Returns an open shard. Dropped from the table, it closes as soon as no reader holds it."""
        with self._lock:
            file = self._open.get(shard)
            if file is not None:
                self._open.move_to_end(shard)
                return file
        file = self._open_shard(shard)
        with self._lock:
            file = self._open.setdefault(shard, file)  # another thread may have opened it first
            while len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        return file


def fault(data: bytes, size: int, crc32: int, image_format: int) -> str | None:
    """What is wrong with the bytes of a sample, or None."""
    if len(data) != size:
        return f"cut short: {len(data)} of {size} bytes"
    if zlib.crc32(data) != crc32:
        return f"expected crc32 {crc32:08x}, found {zlib.crc32(data):08x}"
    if image_format == ImageFormat.JPEG and (data[:3] != JPEG_START or data.rfind(JPEG_END) < 0):
        return "not a JPEG from start to end marker"
    return None
