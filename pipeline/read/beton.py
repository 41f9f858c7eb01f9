"""Reads samples of an FFCV .beton file by index.

Only the container is FFCV's: its JPEGs and raw pixels go through this project's decoders, and order, crops, flips,
masks and restarts are the same as for shards. FFCV need not be installed. The format has no checksums, and damage that
still decodes is not found. It holds RGB only; a missing label is -1.

Layout (FFCV 1.0, version 2): header, one descriptor a field, one metadata row a sample, data in pages, and a table of
(sample, pointer, size) of everything allocated.
"""

import hashlib
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchmill.pipeline.read.shards import JPEG_END, JPEG_START, BadSample

VERSION = 2
JPEG_MODE, RAW_MODE = 0, 1
HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"), ("alloc_table", "<u8")]
)
DESCRIPTOR = np.dtype([("type_id", "<u1"), ("name", "S16"), ("arguments", "V1024")])
ALLOCATION = np.dtype([("sample", "<u8"), ("pointer", "<u8"), ("size", "<u8")])
INT_FIELD, IMAGE_FIELD = 1, 2
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("pointer", "<u8")])
BYTES = np.dtype([("pointer", "<u8"), ("size", "<u8")])
# by type id: float, int, RGB image, bytes, array, JSON, tensor
FIELDS = {0: "<f8", INT_FIELD: "<i8", IMAGE_FIELD: IMAGE, 3: BYTES, 4: "<u8", 5: BYTES, 6: "<u8"}


class BetonReader:
    """Reads samples of a .beton file by index; the counterpart of ShardReader.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not a .beton file with an RGB image field.
    """

    channels = 3

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}: make one with `patchmill convert DATASET {path}`")
        self.path = path
        try:
            metadata, self.images, self.labels, allocations = _read_tables(path)
        except (ValueError, KeyError, IndexError) as error:
            raise ValueError(f"{path} is not a .beton file with RGB images, or is cut short ({error})") from None
        self.num_samples = len(self.images)
        order = np.argsort(allocations["pointer"])
        at = np.searchsorted(allocations["pointer"], self.images["pointer"], sorter=order)
        self.sizes = allocations["size"][order[np.minimum(at, len(order) - 1)]].astype(np.int64)
        self.fingerprint = hashlib.sha256(metadata.tobytes() + str(path.stat().st_size).encode()).hexdigest()
        self._file = path.open("rb", buffering=0)

    def describe(self, sample_ids_B: NDArray[np.int64]) -> tuple[NDArray, NDArray, NDArray]:
        """Heights, widths and labels of samples; integer `[B]` each."""
        rows = self.images[sample_ids_B]
        return rows["height"], rows["width"], self.labels[sample_ids_B]

    def read(self, sample_ids_B: NDArray[np.int64]) -> list[bytes | BadSample]:
        """The encoded image of each sample (raw pixels as PPM), or the reason why it is bad."""
        return [self._read_one(index) for index in sample_ids_B.tolist()]

    def where(self, index: int) -> str:
        """Names a sample for people."""
        return f"{self.path.name}:{int(self.images['pointer'][index])}"

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _read_one(self, index: int) -> bytes | BadSample:
        mode, width, height, pointer = self.images[index].tolist()
        size = int(self.sizes[index])
        data = os.pread(self._file.fileno(), size, pointer)
        if len(data) != size:
            return BadSample(index, self.where(index), f"cut short: {len(data)} of {size} bytes")
        if mode == RAW_MODE:
            return b"P6\n%d %d\n255\n" % (width, height) + data
        if data[:3] != JPEG_START or data.rfind(JPEG_END) < 0:
            return BadSample(index, self.where(index), "not a JPEG from start to end marker")
        return data


def _read_tables(path: Path) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """(metadata of all fields, of the image field, labels, allocations)."""
    header = np.fromfile(path, HEADER, count=1)[0]
    if header["version"] != VERSION:
        raise ValueError(f"expected version {VERSION}, found {header['version']}")
    fields = np.fromfile(path, DESCRIPTOR, count=int(header["num_fields"]), offset=HEADER.itemsize)
    kinds = fields["type_id"].tolist()
    row = np.dtype([("", FIELDS[kind]) for kind in kinds], align=True)
    offset = HEADER.itemsize + fields.nbytes
    metadata = np.fromfile(path, row, count=int(header["num_samples"]), offset=offset)
    if len(metadata) != header["num_samples"] or not len(metadata):
        raise ValueError(f"expected {header['num_samples']} samples, found {len(metadata)}")
    allocations = np.fromfile(path, ALLOCATION, offset=int(header["alloc_table"]))
    images = metadata[f"f{kinds.index(IMAGE_FIELD)}"]
    labels = metadata[f"f{kinds.index(INT_FIELD)}"] if INT_FIELD in kinds else np.full(len(metadata), -1)
    return metadata, images, labels, allocations
