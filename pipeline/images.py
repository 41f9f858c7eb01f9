"""sample bytes -> [images] -> decode_cpu, decode_dali: one documented result for every kind of image file.

JPEGs go through TurboJPEG, strictly; all else, and JPEGs that it does not take, through Pillow. EXIF orientation is
applied, CMYK and YCCK become RGB by Pillow's rule, alpha is dropped unless it is asked for, and 16-bit values v become
round(v / 257).
"""

import io

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from patchmill.pipeline.shards import JPEG_START
from patchmill.pipeline.tiff import read_tiff

MAX_PIXELS = 178_956_970  # of one image: Pillow's own guard against decompression bombs
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # Pillow's name for each channel count
FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "GIF", "PPM", "WEBP", "AVIF")
PILLOW_ERRORS = (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, EOFError, ValueError)
TIFF_STARTS = (b"II*\0", b"MM\0*")
EXIF_MARK = b"Exif\0\0"
ImageHWC = NDArray[np.uint8]


def decode_image(data: bytes, channels: int, size_hw: tuple[int, int] | None = None) -> ImageHWC:
    """Decodes an image in displayed orientation.

    Args:
        data: an encoded file.
        channels: of the result. 1 to 4 are grey, grey and alpha, RGB, RGBA, whatever the file holds; more (and 2) only
            from a TIFF of that many channels.
        size_hw: the size that it must have.

    Returns:
        uint8 `[height, width, channels]`, writable.

    Raises:
        ValueError: the bytes are no image, are damaged, claim more than MAX_PIXELS, or hold another size or channels.
    """
    image = None
    if data[:3] == JPEG_START and channels in (1, 3):
        image = _decode_jpeg(data, "RGB" if channels == 3 else "GRAY")
    elif data[:4] in TIFF_STARTS:
        image = _decode_tiff(data, channels)
    if image is None:
        image = _decode_with_pillow(data, channels)
    if size_hw is not None and image.shape[:2] != size_hw:
        raise ValueError(f"is {image.shape[:2]} pixels where the sample table means {size_hw}")
    return image


def displayed_size(data: bytes) -> tuple[int, int]:
    """(height, width) of an image in displayed orientation, from its header; ValueError for bytes that are no image."""
    try:
        if data[:3] == JPEG_START and EXIF_MARK not in data[:65536]:
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
        else:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
                height, width = (image.width, image.height) if turned else (image.height, image.width)
    except PILLOW_ERRORS as error:
        raise ValueError(f"cannot be decoded: {error}") from None
    _check_pixels(height, width)
    return height, width


def _decode_jpeg(data: bytes, colourspace: str) -> ImageHWC | None:
    """Decodes an ordinary JPEG, strictly; None for those that are Pillow's: CMYK, YCCK and unknown kinds."""
    try:
        height, width, source, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if source in ("CMYK", "YCCK"):
        return None
    _check_pixels(height, width)
    image = simplejpeg.decode_jpeg(data, colourspace)
    return _orient(image, data) if EXIF_MARK in data[:65536] else image


def _orient(image: ImageHWC, data: bytes) -> ImageHWC:
    """Turns and mirrors an image as its EXIF orientation says (Exif 2.32, section 4.6.4)."""
    orientation = Image.open(io.BytesIO(data)).getexif().get(ExifTags.Base.Orientation, 1)
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


def _decode_tiff(data: bytes, channels: int) -> ImageHWC | None:
    """A TIFF as the packer writes it; None for others, which are Pillow's."""
    try:
        image = read_tiff(data)
    except ValueError:
        return None
    if image.shape[2] == channels:
        return image.copy()
    if image.shape[2] not in (1, 3, 4):
        raise ValueError(f"has {image.shape[2]} channels where the model takes {channels}")
    return _convert(Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image), channels)


def _decode_with_pillow(data: bytes, channels: int) -> ImageHWC:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_pixels(image.height, image.width)
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16 bits: to 8 as round(v / 257); Pillow's own conversion clips at 255
                wide = np.asarray(upright).astype(np.uint32)
                upright = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
            return _convert(upright, channels)
    except PILLOW_ERRORS as error:
        raise ValueError(f"cannot be decoded: {error}") from None


def _check_pixels(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise ValueError(f"claims {width} x {height} pixels, more than {MAX_PIXELS}")


def _convert(image: Image.Image, channels: int) -> ImageHWC:
    if channels not in MODES:
        raise ValueError(f"has {len(image.getbands())} channels where the model takes {channels}")
    return np.array(image.convert(MODES[channels])).reshape(image.height, image.width, channels)
