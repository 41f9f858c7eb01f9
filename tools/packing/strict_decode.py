"""Decodes images strictly, for packing and `patchmill verify`: upright pixels, or an error.

Decoders return wrong pixels from damaged bytes without an error. Here every warning of a decoder is an error. JPEGs go
through TurboJPEG, everything else through Pillow. Pixels are uint8 [height, width] (grey) or [height, width, channels].
"""

import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

from patchmill.pipeline.read.image import (
    converted,
    eight_bit,
    jpeg_header,
    jpeg_pixels,
    open_image,
    pillow_orientation,
    upright_size,
)
from patchmill.pipeline.read.image_headers import is_plain_png, oriented
from patchmill.pipeline.read.manifest import Dataset, ImageFormat
from patchmill.pipeline.read.tiff import read_tiff
from patchmill.tools.packing.jpeg_scan import JpegFacts, scan_jpeg


class Rejected(Exception):
    """An image that is not packed. kind: `bad` (damaged or no image; counted) or `policy` (left out as asked)."""

    def __init__(self, reason: str, kind: str = "bad") -> None:
        super().__init__(reason)
        self.reason = reason
        self.kind = kind


def decode(data: bytes, format: ImageFormat) -> np.ndarray:
    """Strictly decodes a sample of a dataset, upright; uint8 [H, W] or [H, W, C]. ImageDamage for damage.

    Knows more than packing writes: tars by others (`patchmill index`) hold their images as they were.
    """
    if format == ImageFormat.JPEG:
        facts, (_, _, colours) = scan_jpeg(data), jpeg_header(data)
        return oriented(scaled_pixels(data, colours, facts), facts.orientation.value)
    if format == ImageFormat.TIFF:
        try:
            return read_tiff(data)
        except ValueError:
            pass  # one that only Pillow knows
    return pillow_pixels(data, lambda height, width: None, keep_alpha=True)[0]


def strict_pixels(data: bytes, colours: str, **least: int) -> np.ndarray:
    """Grey or RGB pixels at full scale, or at the smallest that satisfies `least` (simplejpeg's min_ arguments);
    ImageDamage for whatever libjpeg errs on or warns about."""
    grey = colours == "Gray"
    pixels = jpeg_pixels(data, "GRAY" if grey else "RGB", **least)
    return pixels[:, :, 0] if grey else pixels


def scaled_pixels(data: bytes, colours: str, facts: JpegFacts, target: tuple[int, int] | None = None) -> np.ndarray:
    """Strictly decoded pixels, uint8 grey or RGB, as coded (not yet upright).

    A JPEG that will be shrunk to `target` (height, width) is decoded at the smallest scale from 1/8 to 1/2 that leaves
    twice the target on each side (between 1/2 and 1 libjpeg-turbo has no vector code and is slower than at full scale).
    """
    if colours in ("CMYK", "YCCK"):
        jpeg_pixels(data, "CMYK")  # strict; Pillow forgives what libjpeg only warns about
        with pillow_without_limit():
            return converted(eight_bit(open_image(data)), "RGB")
    height, width = target or (facts.height, facts.width)
    if facts.height < 4 * height or facts.width < 4 * width:
        return strict_pixels(data, colours)
    return strict_pixels(data, colours, min_height=2 * height, min_width=2 * width, min_factor=2)


def pillow_pixels(data: bytes, check_size: Callable[[int, int], None], keep_alpha: bool) -> tuple[np.ndarray, bool]:
    """(upright uint8 pixels, whether this is a PNG that can be kept as it is); of several frames the first.

    `check_size(height, width)` sees the header before anything is decoded, and may raise. ImageDamage for damage.
    """
    with pillow_without_limit():
        image = open_image(data)
        check_size(*upright_size(image, data))
        pixels = _grey_or_colour(eight_bit(image), keep_alpha)
    return oriented(pixels, pillow_orientation(image, data).value), image.format == "PNG" and is_plain_png(data)


@contextmanager
def pillow_without_limit() -> Iterator[None]:
    """Lets check_size alone decide about pixels (Pillow's own limit warns first, then names no option), and warns of
    nothing: what Pillow has to say about odd metadata does not concern the pixels."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _grey_or_colour(image: Image.Image, keep_alpha: bool) -> np.ndarray:
    """uint8 grey, RGB or (alpha kept) RGBA pixels of a decoded image."""
    if keep_alpha and (image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info):
        return converted(image, "RGBA")
    return converted(image, "L" if image.mode in ("1", "L", "LA") else "RGB")


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
