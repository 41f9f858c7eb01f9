"""The two short cuts of the strict decode, held against the long way: 1/8 scale for the verdict, our own JPEG scan."""

import io

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from patchmill.pipeline.read.image_headers import exif_orientation
from patchmill.tools.packing.jpeg_scan import scan_jpeg
from patchmill.tools.packing.normalise import ONE_EIGHTH
from patchmill.tools.packing.strict_decode import strict_pixels
from tests.support.faults import exif, sound_jpegs, unusual_jpegs, with_exif
from tests.support.photos import jpeg, photograph


def damaged(rng: np.random.Generator, data: bytes) -> bytes:
    """One of the ways in which files go wrong, anywhere after the header."""
    body = data.index(b"\xff\xda") + 14
    changed = bytearray(data)
    at = int(rng.integers(body, len(data) - 2))
    match rng.integers(5):
        case 0:
            del changed[at:]
        case 1:
            changed[at] ^= 1 << int(rng.integers(8))
        case 2:
            changed[at : at + 64] = rng.bytes(64)
        case 3:
            changed[at : at + 512] = bytes(512)
        case _:
            changed[int(rng.integers(2, body))] = int(rng.integers(256))
    return bytes(changed)


def verdict(data: bytes, **scale: int) -> str:
    """What the strict decoder says; `ok` for a clean decode."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if height * width > 1_000_000:
            return "too large"
        strict_pixels(data, colours, **scale)
    except ValueError as error:
        return str(error)
    return "ok"


@pytest.mark.parametrize("subsampling", ["420", "444", "Gray"])
def test_one_eighth_finds_the_same_damage(subsampling):
    photo = np.ascontiguousarray(photograph("camera.png" if subsampling == "Gray" else "coffee.png")[:160, :200])
    data = jpeg(photo, 90, subsampling)
    rng = np.random.default_rng(0)
    verdicts = [(verdict(d), verdict(d, **ONE_EIGHTH)) for d in (damaged(rng, data) for _ in range(1500))]
    assert all(full == eighth for full, eighth in verdicts)
    assert {full == "ok" for full, _ in verdicts} == {True, False}


def test_scan_knows_the_frame_and_the_end():
    for case in (*sound_jpegs(), *unusual_jpegs()):
        facts = scan_jpeg(case.data)
        with Image.open(io.BytesIO(case.data)) as image:
            assert (facts.width, facts.height) == image.size
            assert (facts.coding == "progressive") == ("progressive" in image.info)
        assert case.data[facts.end - 2 : facts.end] == b"\xff\xd9"
        assert (facts.end < len(case.data)) == (case.name in ("garbage-after.jpg", "two-in-one.jpg"))


@pytest.mark.parametrize("orientation", range(12))
def test_orientation_is_read_as_pillow_reads_it(orientation):
    data = with_exif(jpeg(np.zeros((16, 24, 3), np.uint8)), exif(orientation))
    with Image.open(io.BytesIO(data)) as image:
        expected = image.getexif().get(0x0112)
    assert scan_jpeg(data).orientation.value == (expected if expected in range(1, 9) else 1)
    tags = Image.Exif()
    tags[0x0112] = orientation
    tags[0x010F] = "maker"
    for endian in ("<", ">"):
        tags.endian = endian
        assert exif_orientation(tags.tobytes()).value == (orientation if 1 <= orientation <= 8 else 1)


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8", b"\xff\xd8\xff", b"\xff\xd8\xff\xe0\0", b"\xff\xd8\xff\xd9", b"\xff\xd8" + b"\xff" * 99]
)
def test_scan_of_what_is_too_short(data):
    with pytest.raises(ValueError, match=r"cut short|no frame|no marker"):
        scan_jpeg(data)
