"""Writes a folder of faulty and unusual image files, as users' collections hold them, from one photograph.

Each case says what packing must make of it: `pixels` (the documented ones, with the mean difference in grey levels that
its encoding may cost), or the beginning of the reason it is left out for.
"""

import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from tests.support.photos import jpeg, photograph

PHOTO = np.ascontiguousarray(photograph("coffee.png")[40:190, 100:325])  # 150 x 225, RGB
GREY = np.asarray(Image.fromarray(PHOTO).convert("L"))
EXACT, REENCODED, TURNED = 0.0, 0.5, 1.5  # mean absolute difference in grey levels


@dataclass(frozen=True)
class Case:
    """One file: its bytes and either its documented pixels or the reason for leaving it out."""

    name: str
    data: bytes
    pixels: np.ndarray | None = None
    tolerance: float = EXACT
    reason: str = ""


def all_cases() -> list[Case]:
    """Every case; the names are those of the files."""
    cases = [*damaged_jpegs(), *no_images(), *sound_jpegs(), *unusual_jpegs(), *oriented(), *other_formats(), *bombs()]
    assert len({case.name for case in cases}) == len(cases)
    return cases


def write_folder(root: Path, cases: list[Case]) -> Path:
    """Writes the files, flat."""
    root.mkdir(parents=True)
    for case in cases:
        (root / case.name).write_bytes(case.data)
    return root


def damaged_jpegs() -> list[Case]:
    """Every kind of damage that a strict decode can see."""
    whole = jpeg(PHOTO, 92)
    rng = np.random.default_rng(0)
    restart = save(PHOTO, "JPEG", quality=92, restart_marker_blocks=4)
    middle = len(whole) // 2

    def patched(at: int, new: bytes, source: bytes = whole) -> bytes:
        return source[:at] + new + source[at + len(new) :]

    frame = whole.index(b"\xff\xc0")
    taller = patched(frame + 5, struct.pack(">H", 600))
    narrower = patched(frame + 7, struct.pack(">H", 100))
    return [
        Case("cut-50.jpg", whole[: len(whole) // 2], reason="damaged JPEG"),
        Case("cut-95.jpg", whole[: len(whole) * 95 // 100], reason="damaged JPEG"),
        Case("cut-end-marker.jpg", whole[:-2], reason="damaged JPEG"),
        Case("cut-last-byte.jpg", whole[:-1], reason="damaged JPEG"),
        Case("cut-header.jpg", whole[:100], reason="damaged JPEG"),
        Case("cut-to-start.jpg", whole[:3], reason="damaged JPEG"),
        Case("zeros-4k.jpg", patched(middle, bytes(4096)), reason="damaged JPEG"),
        Case("random-512.jpg", patched(middle, rng.bytes(512)), reason="damaged JPEG"),
        Case("restart-damaged.jpg", patched(len(restart) // 2, b"\xff" * 64, restart), reason="damaged JPEG"),
        Case("restart-cut.jpg", restart[: len(restart) // 2] + b"\xff\xd9", reason="damaged JPEG"),
        Case("declared-taller.jpg", taller, reason="damaged JPEG"),
        Case("declared-narrower.jpg", narrower, reason="damaged JPEG"),
        Case("no-frame.jpg", b"\xff\xd8\xff\xd9" + bytes(200), reason="damaged JPEG"),
        Case("zero-height.jpg", patched(frame + 5, b"\0\0"), reason="the header says"),
        Case("twelve-bit.jpg", patched(frame + 4, b"\x0c"), reason="damaged JPEG"),
    ]


def no_images() -> list[Case]:
    """Files that are called like images."""
    return [
        Case("empty.jpg", b"", reason="empty file"),
        Case("page.jpg", b"<!DOCTYPE html><html><body>404</body></html>", reason="no image: this is an HTML page"),
        Case("drawing.png", b'<svg xmlns="http://www.w3.org/2000/svg"/>', reason="no image: this is an SVG file"),
        Case("paper.jpg", b"%PDF-1.4 and so on", reason="no image: this is a PDF"),
        Case("archive.jpg", b"PK\x03\x04" + bytes(60), reason="no image: this is a zip archive"),
        Case("random.jpg", np.random.default_rng(1).bytes(5000), reason="no image: unknown first bytes"),
        Case("garbage-first.jpg", b"garbage!" + jpeg(PHOTO), reason="no image: unknown first bytes"),
        Case("text.png", b"just a note\n", reason="no image: unknown first bytes"),
    ]


def sound_jpegs() -> list[Case]:
    """JPEGs that are kept byte for byte."""

    def kept(name: str, data: bytes) -> Case:
        return Case(name, data, decoded(data))

    whole = jpeg(PHOTO)
    return [
        kept("plain-420.jpg", whole),
        kept("plain-444.jpg", jpeg(PHOTO, subsampling="444")),
        kept("plain-411.jpg", jpeg(PHOTO, subsampling="411")),
        kept("plain-grey.jpg", jpeg(GREY)),
        kept("restart.jpg", save(PHOTO, "JPEG", quality=92, restart_marker_blocks=4)),
        kept("one-pixel.jpg", jpeg(PHOTO[:1, :1])),
        kept("one-row.jpg", jpeg(PHOTO[:1])),
        Case("garbage-after.jpg", whole + b"\0" * 100 + b"garbage", decoded(whole)),
        Case("two-in-one.jpg", whole + jpeg(PHOTO[::-1]), decoded(whole)),
        Case("png-inside-name.JPEG", whole, decoded(whole)),
        Case("exif-nonsense.jpg", with_exif(whole, b"Exif\0\0" + bytes(range(64))), decoded(whole)),
        Case("exif-cut.jpg", with_exif(whole, b"Exif\0\0II*\0\xff\xff"), decoded(whole)),
        Case("exif-orientation-9.jpg", with_exif(whole, exif(9)), decoded(whole)),
    ]


def unusual_jpegs() -> list[Case]:
    """JPEGs that decoders read differently, slowly or not at all: encoded again (not YCbCr: without loss)."""
    progressive = save(PHOTO, "JPEG", quality=90, progressive=True)
    cmyk = np.asarray(Image.fromarray(PHOTO).convert("CMYK"))
    adobe = save(cmyk, "JPEG", quality=95)
    bare = simplejpeg.encode_jpeg(255 - cmyk, 95, "CMYK", "444")  # YCCK, as libjpeg writes it
    plain_rgb = save(PHOTO, "JPEG", quality=95, keep_rgb=True)
    return [
        Case("progressive.jpg", progressive, decoded(progressive), REENCODED),
        Case("progressive-grey.jpg", save(GREY, "JPEG", progressive=True), decoded(jpeg(GREY, 75)), REENCODED),
        Case("cmyk-adobe.jpg", adobe, rgb(adobe)),
        Case("ycck.jpg", bare, rgb(bare)),
        Case("cmyk-bare.jpg", without_adobe(adobe), rgb(without_adobe(adobe))),
        Case("rgb.jpg", plain_rgb, rgb(plain_rgb)),
    ]


def oriented() -> list[Case]:
    """The eight EXIF orientations: shown upright."""
    whole = jpeg(PHOTO)
    cases = []
    for orientation in range(1, 9):
        data = with_exif(whole, exif(orientation))
        with Image.open(io.BytesIO(data)) as image:
            upright = np.asarray(ImageOps.exif_transpose(image))
        cases.append(Case(f"exif-{orientation}.jpg", data, upright, EXACT if orientation == 1 else TURNED))
    blocks = jpeg(PHOTO[:144, :208])  # whole blocks, which turning keeps
    for orientation in (3, 6):
        data = with_exif(blocks, exif(orientation))
        with Image.open(io.BytesIO(data)) as image:
            upright = np.asarray(ImageOps.exif_transpose(image))
        cases.append(Case(f"exif-{orientation}-blocks.jpg", data, upright, REENCODED))
    turned = Image.fromarray(PHOTO)
    tags = turned.getexif()
    tags[0x0112] = 6
    png = save(PHOTO, "PNG", exif=tags)
    return [*cases, Case("exif-6.png", png, np.rot90(PHOTO, -1))]


def other_formats() -> list[Case]:
    """Everything that only Pillow reads, most of it under a wrong name; nothing of it loses a pixel."""
    deep = (GREY.astype(np.uint16) << 8) + 77
    rgba = np.dstack([PHOTO, GREY])
    palette = Image.fromarray(PHOTO).quantize(64)
    see_through = io.BytesIO()
    palette.save(see_through, "PNG", transparency=3)
    shown = np.asarray(palette.convert("RGB"))
    webp, avif = save(PHOTO, "WEBP", lossless=True), save(PHOTO, "AVIF", quality=90)
    gif = save(palette, "GIF")
    frames = io.BytesIO()
    palette.save(frames, "GIF", save_all=True, append_images=[palette.rotate(180)])
    png = save(PHOTO, "PNG")
    return [
        Case("png.jpg", png, PHOTO),
        Case("grey.png", save(GREY, "PNG"), GREY),
        Case(
            "bilevel.png",
            save(Image.fromarray(GREY).convert("1"), "PNG"),
            np.asarray(Image.fromarray(GREY).convert("1").convert("L")),
        ),
        Case(
            "sixteen-bit.png",
            save(Image.fromarray(deep), "PNG"),
            ((deep.astype(np.uint32) + 128) // 257).astype(np.uint8),
        ),
        Case("sixteen-bit-rgb.png", png_16(PHOTO.astype(np.uint16) * 256 + 5), PHOTO),
        Case(
            "sixteen-bit.tif",
            save(Image.fromarray(deep), "TIFF"),
            ((deep.astype(np.uint32) + 128) // 257).astype(np.uint8),
        ),
        Case("alpha.png", save(rgba, "PNG"), PHOTO),
        Case("grey-alpha.png", save(Image.fromarray(np.dstack([GREY, GREY]), "LA"), "PNG"), GREY),
        Case("palette.png", save(palette, "PNG"), shown),
        Case("palette-transparent.png", see_through.getvalue(), shown),
        Case("bmp.jpg", save(PHOTO, "BMP"), PHOTO),
        Case("tiff.jpg", save(PHOTO, "TIFF"), PHOTO),
        Case("tiff-lzw.tif", save(PHOTO, "TIFF", compression="tiff_lzw"), PHOTO),
        Case("webp.jpg", webp, PHOTO),
        Case("avif.jpg", avif, rgb(avif)),
        Case("gif.jpg", gif, shown),
        Case("animated.gif", frames.getvalue(), shown),
        Case("portable.ppm", save(PHOTO, "PPM"), PHOTO),
        Case("float.tif", save(Image.fromarray(GREY.astype(np.float32)), "TIFF"), reason="32-bit pixels"),
        Case("integer.tif", save(Image.fromarray(GREY.astype(np.int32)), "TIFF"), reason="32-bit pixels"),
        Case("png-damaged.png", png[:2000] + b"\0" * 40 + png[2040:], reason="damaged image"),
        Case("png-cut.png", png[: len(png) // 2], reason="damaged image"),
        Case("png-header-only.png", png[:33], reason="damaged image"),
        Case("gif-cut.gif", gif[:700], reason="damaged image"),
        Case("webp-cut.webp", webp[: len(webp) // 2], reason="damaged image"),
        Case("tiff-cut.tif", save(PHOTO, "TIFF")[:300], reason="damaged image"),
    ]


def bombs() -> list[Case]:
    """Small files that would decode to gigabytes."""
    whole = jpeg(PHOTO)
    frame = whole.index(b"\xff\xc0")
    huge = {side: whole[: frame + 5] + struct.pack(">HH", side, side) + whole[frame + 9 :] for side in (20000, 65500)}
    rows = zlib.compress(bytes(20001 * 2000), 9)
    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return [
        Case("bomb-20000.jpg", huge[20000], reason="20000 x 20000 pixels, above --max-pixels"),
        Case("bomb-65500.jpg", huge[65500], reason="65500 x 65500 pixels, above --max-pixels"),
        Case("bomb.png", png, reason="20000 x 20000 pixels, above --max-pixels"),
    ]


def save(pixels: np.ndarray | Image.Image, format: str, **options: object) -> bytes:
    """Pillow's encoding of an image."""
    out = io.BytesIO()
    image = (
        pixels
        if isinstance(pixels, Image.Image)
        else Image.fromarray(pixels, "CMYK" if _is_cmyk(pixels, format) else None)
    )
    image.save(out, format, **options)
    return out.getvalue()


def decoded(data: bytes) -> np.ndarray:
    """libjpeg-turbo's strict pixels of a grey or colour JPEG."""
    grey = simplejpeg.decode_jpeg_header(data)[2] == "Gray"
    pixels = simplejpeg.decode_jpeg(data, "GRAY" if grey else "RGB")
    return pixels[:, :, 0] if grey else pixels


def rgb(data: bytes) -> np.ndarray:
    """Pillow's RGB pixels."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def exif(orientation: int) -> bytes:
    """An Exif segment's content that holds an orientation alone."""
    return b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0) + bytes(4)


def with_exif(data: bytes, content: bytes) -> bytes:
    """The JPEG with an APP1 segment right after its start."""
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content + data[2:]


def without_adobe(data: bytes) -> bytes:
    """The JPEG without its APP14 segment, which says that its CMYK values are inverted."""
    at = data.index(b"\xff\xee")
    return data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]


def png_16(pixels: np.ndarray) -> bytes:
    """A 16-bit RGB PNG, which Pillow cannot write."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def chunk(kind: bytes, content: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _is_cmyk(pixels: np.ndarray, format: str) -> bool:
    return format == "JPEG" and pixels.ndim == 3 and pixels.shape[2] == 4
