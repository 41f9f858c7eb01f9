"""One set of rules about image files: packing, `verify`, streams, the CPU decoder and DALI agree on every odd file."""

import io
import json
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from patchmill.pipeline.config import MaskConfig
from patchmill.pipeline.loader import DataConfig, build_loader
from patchmill.pipeline.read.image import decode_image, displayed_size, is_plain
from patchmill.pipeline.read.image_headers import (
    RAW_PROFILE,
    UPRIGHT,
    Orientation,
    is_plain_png,
    jpeg_orientation,
    png_orientation,
)
from patchmill.pipeline.read.manifest import QUARANTINE_NAME, open_dataset
from patchmill.pipeline.read.tiff import write_tiff
from patchmill.tools.packing.listing import list_folder
from patchmill.tools.packing.normalise import Policy, normalise
from patchmill.tools.packing.pack_dataset import pack_dataset
from patchmill.tools.packing.strict_decode import Rejected
from patchmill.tools.verify import verify
from tests.support.faults import exif, with_exif
from tests.support.photos import jpeg, photograph

DECODERS = ("cpu", "dali")
SIDE = 64
PHOTO = np.ascontiguousarray(photograph("coffee.png")[40 : 40 + SIDE, 100:196])  # 64 x 96, whole JPEG blocks
XMP = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def entry(order, kind, value, count=1, tag=0x0112):
    """One directory entry of an EXIF block."""
    packed = struct.pack(order + ("I" if kind == 4 else "HH"), *([value] if kind == 4 else [value, 0]))
    return struct.pack(order + "HHI", tag, kind, count) + packed


def block(order, *entries):
    """The content of an EXIF segment with these entries."""
    start = b"II*\0" if order == "<" else b"MM\0*"
    return b"Exif\0\0" + start + struct.pack(order + "IH", 8, len(entries)) + b"".join(entries) + bytes(4)


def odd_jpegs():
    """Name -> (JPEG, the orientation that it is shown in, whether its tag is plain)."""
    whole = jpeg(PHOTO)
    far = with_exif(whole, exif(6))
    for _ in range(2):  # 120,000 bytes in front of the EXIF segment
        far = far[:2] + b"\xff\xe2" + struct.pack(">H", 60002) + bytes(60000) + far[2:]
    return {
        "EXIF without the tag and XMP": (
            with_exif(with_exif(whole, XMP), block(">", entry(">", 3, 72, tag=0x011A))), 1, True,
        ),
        "XMP alone": (with_exif(whole, XMP), 1, True),
        "EXIF and XMP": (with_exif(with_exif(whole, XMP), exif(8)), 8, True),
        "big-endian LONG": (with_exif(whole, block(">", entry(">", 4, 6))), 6, False),
        "little-endian LONG": (with_exif(whole, block("<", entry("<", 4, 8))), 8, False),
        "big-endian SHORT": (with_exif(whole, block(">", entry(">", 3, 6))), 6, True),
        "two values": (with_exif(whole, block("<", entry("<", 3, 6, count=2))), 1, False),
        "two tags": (with_exif(whole, block("<", entry("<", 3, 6), entry("<", 3, 3))), 6, False),
        "two blocks": (with_exif(with_exif(whole, exif(3)), exif(6)), 6, False),
        "more entries than bytes": (with_exif(whole, exif(6).replace(b"\x08\0\0\0\1", b"\x08\0\0\0\xff")), 6, False),
        "after other segments": (far, 6, True),
    }  # fmt: skip


ODD = odd_jpegs()
TURNS = {1: 0, 3: 2, 6: -1, 8: 1}  # np.rot90's argument


def upright(name):
    """The documented pixels of an odd JPEG."""
    data, orientation, _ = ODD[name]
    with Image.open(io.BytesIO(data)) as image:
        return np.rot90(np.asarray(image), TURNS[orientation])


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def first_batch(path, decoder, batch, **options):
    """Centre windows of the first samples in order, not resized, and the number of bad samples."""
    options = {"crop": "centre", "crop_fraction": 1.0, "flip": False, "shuffle": "none", **options}
    config = DataConfig(path=str(path), decoder=decoder, workers=1, **options)
    with build_loader(
        config, image_size=SIDE, patch_size=16, channels=3, mask=MaskConfig(), seed=0, global_batch=batch
    ) as loader:
        images = next(loader).images.numpy().copy()
        return images, loader.bad_samples


def centre(pixels):
    top, left = (pixels.shape[0] - SIDE) // 2, (pixels.shape[1] - SIDE) // 2
    return pixels[top : top + SIDE, left : left + SIDE]


@pytest.mark.parametrize("name", ODD)
def test_orientation_of_odd_jpegs(name):
    data, value, plain = ODD[name]
    assert jpeg_orientation(data) == Orientation(value, plain)
    expected = upright(name)
    assert displayed_size(data) == expected.shape[:2]
    np.testing.assert_array_equal(decode_image(data, 3), expected)
    assert is_plain(data, displayed_size(data)) == plain


@pytest.mark.parametrize("name", ODD)
def test_packing_normalises_what_decoders_read_differently(name):
    data, value, plain = ODD[name]
    packed = normalise(data, Policy())
    assert (packed.data == data) == (plain and value == 1)
    if packed.data != data:  # upright and without the tag
        assert b"Exif" not in packed.data
    assert np.abs(decode_image(packed.data, 3).astype(int) - upright(name)).mean() < 0.5


@pytest.fixture(scope="module")
def packed_odd(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    (folder / "in").mkdir()
    for i, (data, _, _) in enumerate(ODD.values()):
        (folder / "in" / f"{i:02d}.jpg").write_bytes(data)
    manifest = pack_dataset(list_folder(folder / "in"), folder / "out")
    assert manifest is not None
    assert [fault for faults in verify(folder / "out", manifest, 1.0, 0, 1) for fault in faults] == []
    return folder / "out"


@pytest.mark.parametrize("decoder", DECODERS)
def test_odd_jpegs_train_as_they_were_packed(packed_odd, decoder):
    if decoder == "dali":
        pytest.importorskip("nvidia.dali", reason="the extra `dali` is not installed")
    names = [json.loads(line) for line in (packed_odd / "names.jsonl").read_text().splitlines()]
    kinds = [list(ODD)[int(name.removesuffix(".jpg"))] for name in names]
    images, bad = first_batch(packed_odd, decoder, len(ODD), max_bad_fraction=0.0)
    assert bad == 0
    samples = open_dataset(packed_odd).samples
    for kind, image, row in zip(kinds, images, samples, strict=True):
        expected = upright(kind)
        assert (row["height"], row["width"]) == expected.shape[:2], kind
        # Encoding again costs up to half a grey level on average; a wrong turn costs about forty.
        assert np.abs(image.astype(int) - centre(expected)).mean() < 0.5, kind


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", ODD)
def test_odd_jpegs_stream_exactly(tmp_path, name, decoder):
    if decoder == "dali":
        pytest.importorskip("nvidia.dali", reason="the extra `dali` is not installed")
    tar = write_tar(tmp_path / "a.tar", {"0.jpg": ODD[name][0]})
    images, bad = first_batch(tar, decoder, 1, samples_per_epoch=1)
    assert bad == 0
    np.testing.assert_array_equal(images[0], centre(upright(name)))


def encoded(kind, **options):
    out = io.BytesIO()
    Image.fromarray(PHOTO).save(out, kind, **options)
    return out.getvalue()


FORMATS = {
    "avif": "AVIF", "gif": "GIF", "webp": "WEBP", "bmp": "BMP", "ppm": "PPM", "pnm": "PPM", "tiff": "TIFF",
    "apng": "PNG", "jfif": "JPEG", "jpe": "JPEG", "GIF": "GIF",
}  # fmt: skip


@pytest.mark.parametrize("extension", FORMATS)
def test_what_packs_streams(tmp_path, extension):
    data = encoded(FORMATS[extension])
    with Image.open(io.BytesIO(data)) as image:
        expected = centre(np.asarray(image.convert("RGB")))
    images, bad = first_batch(write_tar(tmp_path / "a.tar", {f"0.{extension}": data}), "cpu", 1, samples_per_epoch=1)
    assert bad == 0
    np.testing.assert_array_equal(images[0], expected)
    packed = normalise(data, Policy())
    np.testing.assert_array_equal(centre(decode_image(packed.data, 3)), expected)


def png_with(*chunks):
    """A PNG with extra chunks (kind, content) after its pixels."""
    data = encoded("PNG")
    extra = b"".join(
        struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in chunks
    )
    return data[:-12] + extra + data[-12:]


@pytest.mark.parametrize(
    ("chunks", "orientation", "plain"),
    [
        ([], UPRIGHT, True),
        ([(b"eXIf", exif(1)[6:])], UPRIGHT, True),
        ([(b"eXIf", exif(6)[6:])], Orientation(6, True), False),
        ([(b"eXIf", block(">", entry(">", 4, 6))[6:])], Orientation(6, False), False),
        ([(b"tEXt", RAW_PROFILE + b"\nexif\n  38\n" + exif(6).hex().encode())], Orientation(6, True), False),
        ([(b"zTXt", RAW_PROFILE + b"\0" + zlib.compress(b"\nexif\n  38\n" + exif(1).hex().encode()))], UPRIGHT, True),
        ([(b"zTXt", b"Raw profile type exif\0\0not deflated")], UPRIGHT, True),
        ([(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)], UPRIGHT, True),
    ],
)  # fmt: skip
def test_orientation_of_pngs(chunks, orientation, plain):
    data = png_with(*chunks)
    assert png_orientation(data) == orientation
    assert is_plain_png(data) == plain
    expected = np.rot90(PHOTO, TURNS[orientation.value])
    assert displayed_size(data) == expected.shape[:2]
    np.testing.assert_array_equal(decode_image(data, 3), expected)
    packed = normalise(data, Policy())
    assert (packed.data == data) == plain
    np.testing.assert_array_equal(decode_image(packed.data, 3), expected)


@pytest.mark.parametrize("kind", [3, 4])
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_tiffs_are_turned_once(kind, compression):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[0x0112], tags.tagtype[0x0112] = 6, kind
    tags[700] = XMP  # no tag here, but it must not turn the image either
    data = encoded("TIFF", compression=compression, tiffinfo=tags)
    expected = np.rot90(PHOTO, -1)
    assert displayed_size(data) == expected.shape[:2]
    np.testing.assert_array_equal(decode_image(data, 3), expected)
    np.testing.assert_array_equal(decode_image(normalise(data, Policy()).data, 3), expected)


def test_xmp_turns_no_tiff():
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[700] = XMP
    data = encoded("TIFF", compression="tiff_lzw", tiffinfo=tags)
    np.testing.assert_array_equal(decode_image(data, 3), PHOTO)
    np.testing.assert_array_equal(decode_image(normalise(data, Policy()).data, 3), PHOTO)


SMALL = Image.fromarray(np.ascontiguousarray(PHOTO[:24, :32]))


def small(kind, **options):
    tags = Image.Exif()
    tags[0x0112], tags[0x010F] = 6, "maker"
    out = io.BytesIO()
    SMALL.save(out, kind, **options | ({} if kind == "GIF" else {"exif": tags}))
    return out.getvalue()


def mutated(rng, data):
    """A file with one to three changes after its first bytes: a bit, a byte, four bytes, or its end cut off."""
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(4, len(changed)))
        match rng.integers(4):
            case 0:
                changed[at] ^= 1 << int(rng.integers(8))
            case 1:
                changed[at] = int(rng.integers(256))
            case 2:
                changed[at : at + 4] = rng.bytes(4)
            case _:
                del changed[max(20, at) :]
    return bytes(changed)


SOURCES = {
    "avif": lambda: small("AVIF"),
    "webp": lambda: small("WEBP"),
    "webp lossless": lambda: small("WEBP", lossless=True),
    "tiff": lambda: small("TIFF"),
    "tiff lzw": lambda: small("TIFF", compression="tiff_lzw"),
    "tiff jpeg": lambda: small("TIFF", compression="jpeg"),
    "gif": lambda: small("GIF"),
    "jpeg header": lambda: small("JPEG", quality=90),
}


@pytest.mark.filterwarnings("ignore")  # Pillow's, about metadata
@pytest.mark.parametrize("name", SOURCES)
def test_mutated_files_raise_only_documented_errors(name):
    """And where both accept a file, packing and decoding agree on its size and its pixels."""
    rng, data = np.random.default_rng(0), SOURCES[name]()
    verdicts, reasons = set(), set()
    for _ in range(300):
        broken = mutated(rng, data[:120]) + data[120:] if name == "jpeg header" else mutated(rng, data)
        packed = image = size = None
        try:
            packed = normalise(broken, Policy(max_pixels=10**6))
        except Rejected as rejected:
            reasons.add(rejected.reason)
        try:
            size = displayed_size(broken)
            if size[0] * size[1] <= 10**6:
                image = decode_image(broken, 3, size)
        except ValueError as error:
            reasons.add(str(error))
        if packed is not None and image is not None and packed.pixels is not None:
            assert (packed.height, packed.width) == size
            pixels = packed.pixels if packed.pixels.ndim == 3 else np.repeat(packed.pixels[:, :, None], 3, axis=2)
            np.testing.assert_array_equal(image, pixels[:, :, :3])
        verdicts.add((packed is None, image is None))
    assert {(True, True), (False, False)} <= verdicts
    assert "" not in reasons


def damaged_files():
    """Files at which decoders raise RuntimeError and struct.error, by name."""
    avif, webp = small("AVIF"), small("WEBP")
    return {
        "item.avif": avif.replace(b"pitm", b"junk"),
        "planes.avif": avif[: avif.index(b"mdat") + 8] + bytes(len(avif) - avif.index(b"mdat") - 8),
        "cut.webp": webp[: len(webp) // 2],
    }


def test_damaged_files_are_quarantined_with_name_and_reason(tmp_path):
    good = {f"good{i}.jpg": jpeg(PHOTO) for i in range(4)}
    damaged = damaged_files()
    (tmp_path / "in").mkdir()
    for name, data in (good | damaged).items():
        (tmp_path / "in" / name).write_bytes(data)
    manifest = pack_dataset(list_folder(tmp_path / "in"), tmp_path / "out")
    assert manifest is not None
    assert manifest.num_samples == len(good)
    entries = [json.loads(line) for line in (tmp_path / "out" / QUARANTINE_NAME).read_text().splitlines()]
    assert {entry["name"] for entry in entries} == set(damaged)
    assert all(entry["reason"].startswith("damaged image: ") for entry in entries)

    tar, quarantine = write_tar(tmp_path / "a.tar", good | damaged), tmp_path / "bad.jsonl"
    first_batch(tar, "cpu", 8, samples_per_epoch=8, quarantine_path=str(quarantine), max_bad_fraction=0.9)
    entries = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert {entry["where"].rpartition(":")[2] for entry in entries} == {name.partition(".")[0] for name in damaged}
    assert all(entry["reason"] for entry in entries)


def test_damaged_exif_does_not_reject_a_webp(tmp_path):
    """Its pixels are whole; Pillow's own EXIF reader raises struct.error here."""
    out = io.BytesIO()
    Image.fromarray(PHOTO).save(out, "WEBP", lossless=True, exif=b"II*\0\x08\0\0\0\x01\0\x12")
    images, bad = first_batch(write_tar(tmp_path / "a.tar", {"0.webp": out.getvalue()}), "cpu", 1, samples_per_epoch=1)
    assert bad == 0
    np.testing.assert_array_equal(images[0], centre(PHOTO))


def test_tiffs_that_only_arrays_can_hold_are_left_out_of_a_folder(tmp_path):
    """Pillow reads 5 and 6 channels as RGB, but no more: these ended the whole job in its statistics."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.jpg").write_bytes(jpeg(PHOTO))
    (tmp_path / "in" / "many.tif").write_bytes(write_tiff(np.zeros((31, 41, 7), np.uint8)))
    manifest = pack_dataset(list_folder(tmp_path / "in"), tmp_path / "out")
    assert manifest is not None
    assert (manifest.num_samples, manifest.channels) == (1, 3)
    (entry,) = map(json.loads, (tmp_path / "out" / QUARANTINE_NAME).read_text().splitlines())
    assert entry["name"] == "many.tif"
    assert "7 channels" in entry["reason"]
