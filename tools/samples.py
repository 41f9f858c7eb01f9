"""dataset -> [samples] -> tools: one sample's bytes or pixels, checked, for tools that look at a few of them."""

import zlib

import numpy as np

from patchmill.pipeline.manifest import Dataset, ImageFormat
from patchmill.tools.strict_decode import decode


def read_bytes(dataset: Dataset, index: int) -> bytes:
    """The encoded image; ValueError names a sample whose bytes were changed."""
    row = dataset.samples[index]
    path = dataset.shard_path(int(row["shard"]))
    with path.open("rb", buffering=0) as file:
        file.seek(int(row["offset"]))
        data = file.read(int(row["size"]))
    if zlib.crc32(data) != row["crc32"]:
        raise ValueError(f"{path}: sample {index} was changed (crc32): run `patchmill verify {dataset.root}`")
    return data


def read_pixels(dataset: Dataset, index: int) -> np.ndarray:
    """The decoded image, uint8 [H, W] or [H, W, C]."""
    return decode(read_bytes(dataset, index), ImageFormat(dataset.samples[index]["format"]))
