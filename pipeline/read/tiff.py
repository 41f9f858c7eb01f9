"""Writes and reads TIFFs, for images with more channels than JPEG and PNG can hold.

A dataset contains only the simplest kind: one uncompressed strip, 8 bits a value, channels interleaved (TIFF 6.0,
sections 2 to 6; ExtraSamples 0 for channels beyond RGB or grey). Any TIFF reader opens it, and reading needs no copy:
the pixels are a view of the file's bytes. Pillow reads other TIFFs when they are packed.
"""

import struct

import numpy as np

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 256, 257, 258, 259, 262
STRIP_OFFSETS, ORIENTATION, SAMPLES, ROWS_PER_STRIP, STRIP_BYTES, PLANAR, EXTRA = 273, 274, 277, 278, 279, 284, 338
GREY, RGB, PREMULTIPLIED = 1, 2, 1  # values of PHOTOMETRIC (twice) and EXTRA
READ = frozenset(
    [WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, STRIP_OFFSETS, ORIENTATION, SAMPLES, STRIP_BYTES, PLANAR, EXTRA]
)
SHORT, LONG = 3, 4
SIZES = {1: 1, 2: 1, SHORT: 2, LONG: 4}


def write_tiff(pixels: np.ndarray) -> bytes:
    """Encodes uint8 [height, width, channels] pixels. Layout: header, directory, long values, pixels."""
    height, width, channels = pixels.shape
    assert pixels.dtype == np.uint8
    colours = 3 if channels >= 3 else 1
    entries: list[tuple[int, int, list[int]]] = [
        (WIDTH, LONG, [width]),
        (HEIGHT, LONG, [height]),
        (BITS, SHORT, [8] * channels),
        (COMPRESSION, SHORT, [1]),
        (PHOTOMETRIC, SHORT, [2 if colours == 3 else 1]),
        (STRIP_OFFSETS, LONG, [0]),
        (SAMPLES, SHORT, [channels]),
        (ROWS_PER_STRIP, LONG, [height]),
        (STRIP_BYTES, LONG, [pixels.size]),
        (PLANAR, SHORT, [1]),
    ]
    if channels > colours:
        entries.append((EXTRA, SHORT, [0] * (channels - colours)))
    long_at = 8 + 2 + 12 * len(entries) + 4
    longs = sum(len(v) * SIZES[kind] for _, kind, v in entries if len(v) * SIZES[kind] > 4)
    pixels_at = long_at + longs
    directory, tail = struct.pack("<2sHIH", b"II", 42, 8, len(entries)), b""
    for tag, kind, values in entries:
        if tag == STRIP_OFFSETS:
            values = [pixels_at]
        packed = struct.pack(f"<{len(values)}{'H' if kind == SHORT else 'I'}", *values)
        if len(packed) > 4:
            tail, packed = tail + packed, struct.pack("<I", long_at + len(tail))
        directory += struct.pack("<HHI4s", tag, kind, len(values), packed)
    return directory + bytes(4) + tail + np.ascontiguousarray(pixels).tobytes()


def read_tiff(data: bytes | memoryview) -> np.ndarray:
    """Pixels, uint8 [height, width, channels], as a view of `data`.

    Reads uncompressed, interleaved, upright 8-bit TIFFs, grey or RGB, with consecutive strips.

    Raises:
        ValueError: any other TIFF; the message gives the reason.
    """
    buffer = memoryview(data)
    order = {b"II": "<", b"MM": ">"}.get(bytes(buffer[:2]))
    if order is None or len(buffer) < 8:
        raise ValueError("not a TIFF")
    try:
        tags = _directory(buffer, order)
        width, height = tags[WIDTH][0], tags[HEIGHT][0]
        channels = tags.get(SAMPLES, [1])[0]
        offsets, sizes = tags[STRIP_OFFSETS], tags[STRIP_BYTES]
        start = offsets[0]
    except (struct.error, KeyError, IndexError):
        raise ValueError("its directory is damaged or cut short") from None
    if tags.get(COMPRESSION, [1]) != [1] or set(tags.get(BITS, [1])) != {8} or tags.get(PLANAR, [1]) != [1]:
        raise ValueError("only uncompressed, interleaved 8-bit TIFFs are read")
    if tags.get(ORIENTATION, [1]) != [1] or tags.get(PHOTOMETRIC, [GREY]) not in ([GREY], [RGB]):
        raise ValueError("only upright TIFFs in grey or RGB are read")
    if channels <= 4 and PREMULTIPLIED in tags.get(EXTRA, []):
        raise ValueError("premultiplied alpha is not read")
    follow = all(a + n == b for a, n, b in zip(offsets, sizes, offsets[1:], strict=False))
    if not follow or sum(sizes) != width * height * channels or not 0 < sum(sizes) <= len(buffer) - start:
        raise ValueError(f"its strips do not hold {width} x {height} x {channels} bytes in one piece: cut short")
    return np.frombuffer(buffer, np.uint8, width * height * channels, start).reshape(height, width, channels)


def _directory(buffer: memoryview, order: str) -> dict[int, list[int]]:
    """Values by tag of the first directory; an empty list for types other than bytes, shorts and longs."""
    (start,) = struct.unpack_from(order + "I", buffer, 4)
    (count,) = struct.unpack_from(order + "H", buffer, start)
    tags: dict[int, list[int]] = {}
    for i in range(count):
        tag, kind, length = struct.unpack_from(order + "HHI", buffer, start + 2 + 12 * i)
        if tag not in READ:
            continue
        if kind not in SIZES or length * SIZES[kind] > len(buffer):
            tags[tag] = []
            continue
        at = start + 2 + 12 * i + 8
        if length * SIZES[kind] > 4:
            (at,) = struct.unpack_from(order + "I", buffer, at)
        letter = {1: "B", 2: "B", SHORT: "H", LONG: "I"}[kind]
        tags[tag] = list(struct.unpack_from(f"{order}{length}{letter}", buffer, at))
    return tags
