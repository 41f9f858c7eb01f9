"""Reads what a JPEG says about itself, without decoding it.

Two facts that decoders do not report decide whether a JPEG can be kept unchanged: how it is coded (nvJPEG's hardware
path and DALI's partial decode need baseline), and where it ends (trailing bytes hide a truncation from the check of the
last two bytes that every read makes). The EXIF orientation is read here too, because decoders disagree on applying it.
Marker names and layouts: ITU-T T.81, Annex B.
"""

from dataclasses import dataclass

from patchmill.pipeline.read.image_headers import ImageDamage, Orientation, jpeg_orientation, jpeg_segments

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


@dataclass(frozen=True, slots=True)
class JpegFacts:
    """Frame marker, bits a value, size in pixels as coded, components, EXIF orientation, and `end`:
    the offset just after the first image's end marker."""

    frame: int
    precision: int
    height: int
    width: int
    components: int
    orientation: Orientation
    end: int

    @property
    def coding(self) -> str:
        """The name of the coding process."""
        return CODINGS.get(self.frame, f"process 0x{self.frame:02x}")


def scan_jpeg(data: bytes) -> JpegFacts:
    """Walks the segments of the first image in `data`; ImageDamage says what is missing."""
    frame = precision = height = width = components = end = 0
    for marker, start, end in jpeg_segments(data):
        if marker in START_OF_FRAME and not frame:
            if end - start < 6:
                raise ImageDamage("damaged frame header")
            frame, precision, components = marker, data[start], data[start + 5]
            height = int.from_bytes(data[start + 1 : start + 3], "big")
            width = int.from_bytes(data[start + 3 : start + 5], "big")
    if not frame:
        raise ImageDamage("no frame header")
    return JpegFacts(frame, precision, height, width, components, jpeg_orientation(data), end)
