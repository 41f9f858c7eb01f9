"""Reads what an image file says about itself without decoding it: its kind, its orientation, and if decoders agree.

Orientation: only the Orientation tag in the first directory of the first EXIF block counts (Exif 2.32, section 4.6.4).
XMP's `tiff:Orientation` never counts, as in browsers, OpenCV and DALI. Decoders disagree on unusual tags, such as a
LONG: such a file is not `plain`. Packing encodes it again, upright and without the tag; DALI receives it decoded.

JPEG segments: ITU-T T.81, Annex B. PNG chunks: PNG 3rd edition, section 11.
"""

import re
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from patchmill.pipeline.read.manifest import ImageFormat
from patchmill.pipeline.read.tiff import LONG, ORIENTATION, SHORT

# Every image extension, and the format under which a dataset indexed in place can hold it (None: only once packed).
# When a tar has several images with one key, streaming takes the first in this order.
IMAGE_EXTENSIONS = {
    "jpg": ImageFormat.JPEG, "jpeg": ImageFormat.JPEG, "png": ImageFormat.PNG, "tif": ImageFormat.TIFF,
    "tiff": ImageFormat.TIFF, "webp": None, "bmp": None, "ppm": None, "avif": None, "gif": None,
    "jpe": ImageFormat.JPEG, "jfif": ImageFormat.JPEG, "mpo": ImageFormat.JPEG, "apng": ImageFormat.PNG,
    "dib": None, "pgm": None, "pnm": None,
}  # fmt: skip
PNG_START = b"\x89PNG\r\n\x1a\n"
TIFF_STARTS = (b"II*\0", b"MM\0*")
EXIF_START = b"Exif\0\0"
RAW_PROFILE = b"Raw profile type exif\0"  # ImageMagick's way to store EXIF in a PNG: hexadecimal text
MAX_PROFILE_BYTES = 1 << 20
EXIF_MARKER, START_OF_SCAN, END_OF_IMAGE = 0xE1, 0xDA, 0xD9
STANDALONE = frozenset(range(0xD0, 0xD9)) | {0x01}
MARKER_IN_SCAN = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")


class ImageDamage(ValueError):
    """The bytes cannot be read as an image; the message gives the reason."""


class Orientation(NamedTuple):
    """An EXIF orientation (1..8), and whether every decoder reads the same one from the file."""

    value: int
    plain: bool

    def displayed(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) as displayed of an image with these sides as coded."""
        return (width, height) if self.value >= 5 else (height, width)


UPRIGHT = Orientation(1, True)


def is_image_name(name: str) -> bool:
    """Whether a file name has the extension of an image."""
    return "." in name and name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def exif_orientation(exif: bytes) -> Orientation:
    """The orientation in an EXIF block, which starts with its TIFF header; 1 when it has no valid one."""
    while exif.startswith(EXIF_START):
        exif = exif[len(EXIF_START) :]
    if exif[:4] not in TIFF_STARTS:
        return UPRIGHT
    order = "little" if exif[:2] == b"II" else "big"

    def number(start: int, size: int) -> int:
        return int.from_bytes(exif[start : start + size], order)  # type: ignore[arg-type]

    directory = number(4, 4)
    entries = [directory + 2 + 12 * i for i in range(number(directory, 2))]
    whole = [start for start in entries if start + 12 <= len(exif)]
    found = [start for start in whole if number(start, 2) == ORIENTATION]
    if not found:
        return UPRIGHT
    kind, count = number(found[0] + 2, 2), number(found[0] + 4, 4)
    value = number(found[0] + 8, 4 if kind == LONG else 2) if kind in (SHORT, LONG) and count == 1 else 1
    plain = (kind, count) == (SHORT, 1) and len(found) == 1 and len(whole) == len(entries)
    return Orientation(value if 1 <= value <= 8 else 1, plain)


def jpeg_orientation(data: bytes) -> Orientation:
    """The orientation of a JPEG, from the segments before its first scan (ten times as fast as a search for EXIF)."""
    blocks = []
    try:
        for marker, start, end in jpeg_segments(data):
            if marker == EXIF_MARKER and data.startswith(EXIF_START, start):
                blocks.append(data[start:end])
            elif marker == START_OF_SCAN:
                break
    except ImageDamage:
        pass  # the decoder reports it
    return _first_block(blocks)


def png_orientation(data: bytes) -> Orientation:
    """The orientation of a PNG: that of its eXIf chunk, else that of ImageMagick's raw profile."""
    blocks, profiles = [], []
    try:
        for kind, start, end in png_chunks(data):
            if kind == b"eXIf":
                blocks.append(data[start:end])
            elif kind in (b"tEXt", b"zTXt") and data.startswith(RAW_PROFILE, start):
                profiles.append(_raw_profile(data[start:end], kind == b"zTXt"))
    except ImageDamage:
        pass  # the decoder reports it
    return _first_block(blocks or profiles)


def is_plain_png(data: bytes) -> bool:
    """8 bits, grey or RGB, not interlaced, no transparency, one frame, upright: what every PNG decoder reads alike."""
    if len(data) < 29 or data[24] != 8 or data[25] not in (0, 2) or data[28] != 0:
        return False
    try:
        kinds = {kind for kind, _, _ in png_chunks(data)}
    except ImageDamage:
        return False
    return kinds.isdisjoint((b"tRNS", b"acTL")) and png_orientation(data) == UPRIGHT


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yields marker, start and end of the content of every segment of the first image, up to its end marker.

    Skips entropy-coded data and markers without content. Raises ImageDamage when the file breaks off.
    """
    position = 2
    while True:
        while data[position : position + 2] == b"\xff\xff":  # fill bytes
            position += 1
        if position + 2 > len(data):
            raise ImageDamage("no end marker: cut short")
        if data[position] != 0xFF:
            raise ImageDamage(f"no marker at byte {position}: damaged")
        marker, position = data[position + 1], position + 2
        if marker == END_OF_IMAGE:
            yield marker, position, position
            return
        if marker in STANDALONE:
            continue
        length = int.from_bytes(data[position : position + 2], "big")
        if length < 2 or position + length > len(data):
            raise ImageDamage("cut short in a header segment")
        yield marker, position + 2, position + length
        position += length
        if marker == START_OF_SCAN:
            # the data end at the first FF that is followed neither by 00 (stuffing) nor by a restart marker
            found = MARKER_IN_SCAN.search(data, position)
            if found is None:
                raise ImageDamage("no end marker: cut short")
            position = found.start()


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yields kind, start and end of the content of every chunk to IEND. Raises ImageDamage when the file breaks off."""
    position = len(PNG_START)
    kind = b""
    while kind != b"IEND":
        kind, start = data[position + 4 : position + 8], position + 8
        end = start + int.from_bytes(data[position : position + 4], "big")
        if end + 4 > len(data):
            raise ImageDamage("cut short in a chunk")
        yield kind, start, end
        position = end + 4


def oriented(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turns and mirrors coded pixels [height, width, ...] into the displayed image."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _first_block(blocks: list[bytes]) -> Orientation:
    """The first block's orientation; decoders disagree on which of several blocks counts, and the file is not plain."""
    if not blocks:
        return UPRIGHT
    value, plain = exif_orientation(blocks[0])
    return Orientation(value, plain and len(blocks) == 1)


def _raw_profile(content: bytes, compressed: bool) -> bytes:
    """The EXIF block of a text chunk: keyword, then (inflated) name and length lines, then hexadecimal digits."""
    text = content[len(RAW_PROFILE) :]
    try:
        if compressed:
            text = zlib.decompressobj().decompress(text[1:], MAX_PROFILE_BYTES)
        return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("latin-1"))
    except (zlib.error, ValueError):
        return b""
