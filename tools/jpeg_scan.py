"""source bytes -> [jpeg_scan] -> normalise: what a JPEG says about itself, without decoding it.

Two facts that the decoders do not report decide whether a JPEG can be kept as it is: how it is coded (nvJPEG's hardware
path and DALI's partial decode want baseline), and where it ends (trailing bytes hide a truncation from the check of the
last two bytes that every read makes). The EXIF orientation is here too, because decoders disagree on applying it.
Marker names and layouts: ITU-T T.81, Annex B; Exif 2.32, section 4.6.
"""

import re
from dataclasses import dataclass

BASELINE = 0xC0
CODINGS = {
    0xC0: "baseline",
    0xC1: "extended",
    0xC2: "progressive",
    0xC3: "lossless",
    0xC9: "arithmetic",
    0xCA: "progressive arithmetic",
}
START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
STANDALONE = frozenset(range(0xD0, 0xD9)) | {0x01}
MARKER_IN_SCAN = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")


@dataclass(frozen=True, slots=True)
class JpegFacts:
    """Frame marker, bits a value, size in pixels as coded, components, EXIF orientation (1..8), and `end`:
    the offset just after the first image's end marker."""

    frame: int
    precision: int
    height: int
    width: int
    components: int
    orientation: int
    end: int

    @property
    def coding(self) -> str:
        """The name of the coding process."""
        return CODINGS.get(self.frame, f"process 0x{self.frame:02x}")


def scan_jpeg(data: bytes) -> JpegFacts:
    """Walks the markers of the first image in `data`; ValueError says what is missing."""
    position, orientation = 2, 1
    frame = precision = height = width = components = 0
    while True:
        marker, position = _next_marker(data, position)
        if marker == 0xD9:
            break
        if marker in STANDALONE:
            continue
        length = int.from_bytes(data[position : position + 2], "big")
        if length < 2 or position + length > len(data):
            raise ValueError("cut short in a header segment")
        if marker in START_OF_FRAME and not frame:
            if length < 8:
                raise ValueError("damaged frame header")
            frame, precision, components = marker, data[position + 2], data[position + 7]
            height = int.from_bytes(data[position + 3 : position + 5], "big")
            width = int.from_bytes(data[position + 5 : position + 7], "big")
        elif marker == 0xE1 and orientation == 1 and data[position + 2 : position + 8] == b"Exif\0\0":
            orientation = exif_orientation(data[position + 8 : position + length])
        position += length
        if marker == 0xDA:
            position = _end_of_scan(data, position)
    if not frame:
        raise ValueError("no frame header")
    return JpegFacts(frame, precision, height, width, components, orientation, position)


def exif_orientation(tiff: bytes) -> int:
    """The orientation (1..8) in an EXIF block that starts with its TIFF header; 1 where it says nothing sensible."""
    if tiff[:4] not in (b"II*\0", b"MM\0*"):
        return 1
    little = tiff[:2] == b"II"

    def number(start: int, size: int) -> int:
        return int.from_bytes(tiff[start : start + size], "little" if little else "big")

    directory = number(4, 4)
    for entry in range(number(directory, 2)):
        start = directory + 2 + 12 * entry
        if start + 12 > len(tiff):
            break
        if number(start, 2) == 0x0112:
            value = number(start + 8, 2)
            return value if 1 <= value <= 8 else 1
    return 1


def _next_marker(data: bytes, position: int) -> tuple[int, int]:
    """(marker, offset after it), skipping fill bytes."""
    while data[position : position + 1] == b"\xff" and data[position + 1 : position + 2] == b"\xff":
        position += 1
    if position + 2 > len(data):
        raise ValueError("no end marker: cut short")
    if data[position] != 0xFF:
        raise ValueError(f"no marker at byte {position}: damaged")
    return data[position + 1], position + 2


def _end_of_scan(data: bytes, position: int) -> int:
    """Offset of the marker that ends the entropy-coded data: FF followed by neither 00 (stuffing) nor a restart."""
    found = MARKER_IN_SCAN.search(data, position)
    if found is None:
        raise ValueError("no end marker: cut short")
    return found.start()
