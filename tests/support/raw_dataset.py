"""Writes datasets whose samples are arbitrary bytes that the packer would refuse or rewrite."""

import io
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from patchmill.pipeline.read.manifest import FORMAT_VERSION, SAMPLE_DTYPE, ImageFormat, Manifest, ShardInfo
from patchmill.pipeline.read.tar import ShardWriter
from patchmill.pipeline.read.tiff import read_tiff


def displayed_size(data: bytes) -> tuple[int, int]:
    """(width, height) of an image in displayed orientation; (64, 64) for bytes that are none."""
    try:
        return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size
    except OSError:
        return (64, 64)


def make_raw_dataset(root: Path, samples: list[bytes], *, per_shard: int = 10, channels: int = 3) -> Path:
    """Writes a dataset that holds `samples` in this order; label = index; returns root."""
    root.mkdir(parents=True, exist_ok=True)
    rows, shards = [], []
    for number, first in enumerate(range(0, len(samples), per_shard)):
        path = root / f"shard-{number:06d}.tar"
        with path.open("wb") as file:
            writer = ShardWriter(file)
            for i, data in enumerate(samples[first : first + per_shard], start=first):
                (offset,) = writer.add(f"{i:08d}", [("jpg", data)])
                tiff = data[:4] == b"II*\0"
                height, width = read_tiff(data).shape[:2] if tiff else displayed_size(data)[::-1]
                kind = ImageFormat.JPEG if data[:2] == b"\xff\xd8" else ImageFormat.TIFF if tiff else ImageFormat.PNG
                rows.append((number, offset, len(data), zlib.crc32(data), kind, width, height, i))
            sha256, index = writer.finish()
        path.with_suffix(".idx").write_text(index)
        shards.append(ShardInfo(path.name, writer.samples, writer.bytes, sha256))
    np.save(root / "samples.npy", np.array(rows, dtype=SAMPLE_DTYPE))
    middle = (0.5,) * channels
    manifest = Manifest(FORMAT_VERSION, {}, [], len(rows), shards, middle, middle, channels=channels)
    (root / "manifest.json").write_text(manifest.to_json())
    return root
