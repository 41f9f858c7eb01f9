"""Decodes every kind of image file to one documented result, for decoders and packing.

TurboJPEG decodes JPEGs, strictly; Pillow decodes everything else, and the JPEGs that TurboJPEG does not take. EXIF
orientation is applied, CMYK and YCCK become RGB by Pillow's rule, alpha is dropped unless requested, and 16-bit values
v become round(v / 257).

Every call of a decoder runs inside `decoder_errors`: whatever it raises on damaged bytes becomes ImageDamage.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from patchmill.pipeline.read.image_headers import (
    PNG_START,
    TIFF_STARTS,
    UPRIGHT,
    ImageDamage,
    Orientation,
    exif_orientation,
    is_plain_png,
    jpeg_orientation,
    oriented,
    png_orientation,
)
from patchmill.pipeline.read.shards import JPEG_START
from patchmill.pipeline.read.tiff import HEIGHT, ORIENTATION, WIDTH, read_tiff

MAX_PIXELS = 178_956_970  # of one image: Pillow's own guard against decompression bombs
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # Pillow's name for each channel count
FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "GIF", "PPM", "WEBP", "AVIF")
XMP_KEYS = ("xmp", "XML:com.adobe.xmp")
ImageHWC = NDArray[np.uint8]


class UnknownImage(ImageDamage):
    """Pillow recognises no format in the bytes: not an image, or damaged in the first bytes."""


class UndefinedPixels(ImageDamage):
    """The file is sound, but its values have no defined range."""


@contextmanager
def decoder_errors() -> Iterator[None]:
    """Turns every error of the decoder call inside into ImageDamage.

    On damaged bytes decoders raise far more than they document (struct.error, RuntimeError, OverflowError,
    MemoryError); no list of these is complete. Put only the call itself inside.
    """
    try:
        yield
    except UnidentifiedImageError:
        raise UnknownImage("no image of a known format") from None
    except Exception as error:
        text = (str(error) or type(error).__name__).partition("(): ")
        raise ImageDamage(text[2] if text[0].startswith("tj") else "".join(text)) from None


def decode_image(data: bytes, channels: int, size_hw: tuple[int, int] | None = None) -> ImageHWC:
    """Decodes an image in displayed orientation.

    Args:
        data: an encoded file.
        channels: of the result. 1 to 4 are grey, grey and alpha, RGB, RGBA, whatever the file holds; more (and 2) only
            from a TIFF with as many channels.
        size_hw: the expected size.

    Returns:
        uint8 `[height, width, channels]`, writable.

    Raises:
        ValueError: the bytes are not an image, are damaged, exceed MAX_PIXELS, or have another size or channels.
    """
    image = None
    if data[:3] == JPEG_START and channels in (1, 3):
        image = _decode_jpeg(data, "RGB" if channels == 3 else "GRAY")
    elif data[:4] in TIFF_STARTS:
        image = _decode_tiff(data, channels)
    if image is None:
        image = _decode_with_pillow(data, channels)
    if size_hw is not None and image.shape[:2] != size_hw:
        raise ValueError(f"expected {size_hw} pixels, found {image.shape[:2]}")
    return image


def displayed_size(data: bytes) -> tuple[int, int]:
    """(height, width) in displayed orientation, from the header. Raises ValueError for bytes that are not an image."""
    size = None
    if data[:3] == JPEG_START:
        size = _jpeg_size(data)
    elif data[:4] in TIFF_STARTS:
        size = _plain_tiff_size(data)
    if size is None:
        size = upright_size(open_image(data), data)
    check_pixels(*size)
    return size


def is_plain(data: bytes, size_hw: tuple[int, int]) -> bool:
    """Whether every decoder, DALI too, reads an image alike: 8-bit grey, YCbCr or RGB JPEGs, and plain PNGs.

    False for an image of another size: DALI would decode a bomb, or fail on windows outside the image.
    """
    if data[:3] == JPEG_START:
        try:
            height, width, colours = jpeg_header(data)
        except ImageDamage:
            return False
        orientation = jpeg_orientation(data)
        return (
            colours in ("Gray", "YCbCr", "RGB")
            and orientation.plain
            and orientation.displayed(height, width) == size_hw
        )
    if data[:8] != PNG_START or not is_plain_png(data):
        return False
    return (int.from_bytes(data[20:24], "big"), int.from_bytes(data[16:20], "big")) == size_hw


def jpeg_header(data: bytes) -> tuple[int, int, str]:
    """(height, width, colour space) of a JPEG as coded. Raises ImageDamage when TurboJPEG cannot read the header."""
    with decoder_errors():
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    return height, width, colours


def jpeg_pixels(data: bytes, colours: str, **least: int) -> ImageHWC:
    """Strictly decodes a JPEG as coded: uint8 [height, width, channels]; colours: "RGB", "GRAY" or "CMYK".

    At full scale, or at the smallest that satisfies `least` (simplejpeg's min_ arguments). Raises ImageDamage for every
    error and warning of libjpeg.
    """
    with decoder_errors():
        return simplejpeg.decode_jpeg(data, colours, **least)


def open_image(data: bytes) -> Image.Image:
    """Reads the header of a file with Pillow. Raises UnknownImage or ImageDamage."""
    with decoder_errors():
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        for key in XMP_KEYS:  # Pillow turns a TIFF by its XMP
            image.info.pop(key, None)
    return image


def eight_bit(image: Image.Image) -> Image.Image:
    """Decodes an opened image to 8 bits a value: 16-bit v become round(v / 257); Pillow's own conversion clips at 255.

    Raises ImageDamage, or UndefinedPixels for 32-bit values.
    """
    with decoder_errors():
        image.load()
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        wide = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UndefinedPixels("32-bit pixels have no defined range: convert them to 8 or 16 bits")
    return image


def converted(image: Image.Image, mode: str) -> ImageHWC:
    """Converts a decoded image to one of Pillow's modes: uint8 [height, width] or [height, width, channels]."""
    with decoder_errors():
        return np.array(image.convert(mode))


def pillow_orientation(image: Image.Image, data: bytes) -> Orientation:
    """The orientation to apply to an image that Pillow decodes; Pillow turns TIFFs itself."""
    if data[:3] == JPEG_START:
        return jpeg_orientation(data)
    if data[:8] == PNG_START:
        return png_orientation(data)
    exif = image.info.get("exif", b"")
    return UPRIGHT if image.format == "TIFF" or not isinstance(exif, bytes) else exif_orientation(exif)


def upright_size(image: Image.Image, data: bytes) -> tuple[int, int]:
    """(height, width) of an opened image in displayed orientation, before it is decoded."""
    if image.format != "TIFF":
        return pillow_orientation(image, data).displayed(image.height, image.width)
    with decoder_errors():  # by its tags: versions of Pillow differ on the size before loading
        tags = image.tag_v2  # type: ignore[attr-defined]
        height, width, turned = int(tags[HEIGHT]), int(tags[WIDTH]), tags.get(ORIENTATION) in (5, 6, 7, 8)
    return (width, height) if turned else (height, width)


def check_pixels(height: int, width: int) -> None:
    """Raises ImageDamage for an empty image and for more than MAX_PIXELS."""
    if height < 1 or width < 1:
        raise ImageDamage(f"the header says {width} x {height} pixels")
    if height * width > MAX_PIXELS:
        raise ImageDamage(f"claims {width} x {height} pixels, more than {MAX_PIXELS}")


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """The displayed size of a JPEG; None for those that Pillow reads."""
    try:
        height, width, _ = jpeg_header(data)
    except ImageDamage:
        return None
    return jpeg_orientation(data).displayed(height, width)


def _plain_tiff_size(data: bytes) -> tuple[int, int] | None:
    try:
        height, width, _ = read_tiff(data).shape
    except ValueError:
        return None
    return height, width


def _decode_jpeg(data: bytes, colourspace: str) -> ImageHWC | None:
    """Decodes an ordinary JPEG, strictly; None for those that Pillow decodes: CMYK, YCCK and unknown kinds."""
    try:
        height, width, source = jpeg_header(data)
    except ImageDamage:
        return None
    if source in ("CMYK", "YCCK"):
        return None
    check_pixels(height, width)
    return oriented(jpeg_pixels(data, colourspace), jpeg_orientation(data).value)


def _decode_tiff(data: bytes, channels: int) -> ImageHWC | None:
    """Decodes a TIFF as the packer writes it; None for others, which Pillow decodes."""
    try:
        image = read_tiff(data)
    except ValueError:
        return None
    check_pixels(*image.shape[:2])
    if image.shape[2] == channels:
        return image.copy()
    if image.shape[2] not in (1, 3, 4):
        raise ValueError(f"has {image.shape[2]} channels; the model takes {channels}")
    return _convert(Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image), channels)


def _decode_with_pillow(data: bytes, channels: int) -> ImageHWC:
    image = open_image(data)
    check_pixels(image.height, image.width)
    pixels = _convert(eight_bit(image), channels)
    return oriented(pixels, pillow_orientation(image, data).value)


def _convert(image: Image.Image, channels: int) -> ImageHWC:
    if channels not in MODES:
        raise ValueError(f"has {len(image.getbands())} channels; the model takes {channels}")
    return converted(image, MODES[channels]).reshape(image.height, image.width, channels)
