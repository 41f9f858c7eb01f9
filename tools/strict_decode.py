"""bytes -> [strict_decode] -> upright pixels, or an error: how packing and verify look at an image.

Whatever a decoder warns about is an error here: decoders return wrong pixels without one from damaged bytes. JPEGs go
through TurboJPEG, everything else through Pillow. Pixels are uint8 [height, width] (grey) or [height, width, channels].
"""

import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from patchmill.pipeline.manifest import ImageFormat
from patchmill.pipeline.tiff import read_tiff
from patchmill.tools.jpeg_scan import JpegFacts, scan_jpeg

PILLOW_FORMATS = ("PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "AVIF")
# What the decoders' parsers let through when a file is damaged; none of them is a fault of this program.
DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, TypeError, AttributeError, OverflowError,
    RuntimeError, ZeroDivisionError, struct.error, zlib.error,
)  # fmt: skip


class Rejected(Exception):
    """An image that is not packed. kind: `bad` (damaged or no image; counted) or `policy` (left out as asked)."""

    def __init__(self, reason: str, kind: str = "bad") -> None:
        super().__init__(reason)
        self.reason = reason
        self.kind = kind


def decode(data: bytes, format: ImageFormat) -> np.ndarray:
    """Strictly decodes a sample of a dataset, upright; uint8 [H, W] or [H, W, C]. One of DECODE_ERRORS for damage.

    Knows more than packing writes: tars by others (`patchmill index`) hold their images as they were.
    """
    if format == ImageFormat.JPEG:
        facts, colours = scan_jpeg(data), simplejpeg.decode_jpeg_header(data)[2]
        return oriented(jpeg_pixels(data, colours, facts), facts.orientation)
    if format == ImageFormat.TIFF:
        try:
            return read_tiff(data)
        except ValueError:
            pass  # one that only Pillow knows
    return pillow_pixels(data, lambda height, width: None, keep_alpha=True)[0]


def strict_pixels(data: bytes, colours: str, **least: int) -> np.ndarray:
    """Grey or RGB pixels at full scale, or at the smallest that satisfies `least` (simplejpeg's min_ arguments);
    ValueError for whatever libjpeg errs on or warns about."""
    grey = colours == "Gray"
    pixels = simplejpeg.decode_jpeg(data, "GRAY" if grey else "RGB", **least)
    return pixels[:, :, 0] if grey else pixels


def jpeg_pixels(data: bytes, colours: str, facts: JpegFacts, target: tuple[int, int] | None = None) -> np.ndarray:
    """Strictly decoded pixels, uint8 grey or RGB, as coded (not yet upright).

    A JPEG that will be shrunk to `target` (height, width) is decoded at the smallest scale from 1/8 to 1/2 that leaves
    twice the target on each side (between 1/2 and 1 libjpeg-turbo has no vector code and is slower than at full scale).
    """
    if colours in ("CMYK", "YCCK"):
        simplejpeg.decode_jpeg(data, "CMYK")  # strict; Pillow forgives what libjpeg only warns about
        with pillow_without_limit(), Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            return np.asarray(image.convert("RGB"))
    height, width = target or (facts.height, facts.width)
    if facts.height < 4 * height or facts.width < 4 * width:
        return strict_pixels(data, colours)
    return strict_pixels(data, colours, min_height=2 * height, min_width=2 * width, min_factor=2)


def oriented(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Applies an EXIF orientation (1..8), giving the image as it is meant to be seen."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def pillow_pixels(data: bytes, check_size: Callable[[int, int], None], keep_alpha: bool) -> tuple[np.ndarray, bool]:
    """(upright uint8 pixels, whether this is a PNG that can be kept as it is); of several frames the first.

    `check_size(height, width)` sees the header before anything is decoded, and may raise.
    """
    with pillow_without_limit(), Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as image:
        check_size(image.height, image.width)
        image.load()
        upright = _orientation(image) == 1
        pixels = _eight_bit(image if upright else ImageOps.exif_transpose(image), keep_alpha)
        return pixels, upright and _is_plain_png(data, image)


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


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(0x0112, 1)
    except DECODE_ERRORS:
        return 1  # nonsense in the EXIF block does not make the pixels worse
    return value if value in range(1, 9) else 1


def _is_plain_png(data: bytes, image: Image.Image) -> bool:
    """8 bits, grey or RGB, not interlaced, no transparency, one frame: what every PNG decoder reads alike."""
    if image.format != "PNG" or getattr(image, "n_frames", 1) > 1 or "transparency" in image.info:
        return False
    depth, colour_type, interlace = data[24], data[25], data[28]
    return depth == 8 and colour_type in (0, 2) and interlace == 0


def _eight_bit(image: Image.Image, keep_alpha: bool) -> np.ndarray:
    """uint8 grey, RGB or (alpha kept) RGBA pixels of a decoded image."""
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and image.format in ("PNG", "PPM")):
        wide = np.asarray(image).astype(np.uint32)
        return ((wide + 128) // 257).astype(np.uint8)
    if mode in ("I", "F"):
        raise Rejected("32-bit pixels have no defined range: convert them to 8 or 16 bits")
    if keep_alpha and (mode in ("RGBA", "LA", "PA") or "transparency" in image.info):
        return np.asarray(image.convert("RGBA"))
    return np.asarray(image.convert("L" if mode in ("1", "L", "LA") else "RGB"))
