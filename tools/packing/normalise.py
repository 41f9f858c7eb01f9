"""Brings one image into the form that all decoders read alike, or says why it cannot.

Kept byte for byte: baseline 8-bit JPEGs in grey or YCbCr, and plain 8-bit PNGs in grey or RGB, both upright.
Everything else is decoded to its documented pixels (docs/data_format.md) and encoded again: grey and YCbCr JPEGs as
baseline JPEG with their own quantisation tables, all others as PNG, which is lossless. Every image is strictly decoded
here, once: decoders return wrong pixels from damaged bytes without an error. Training sees what passed this file and
its checksum.

Pixels are uint8 [height, width] (grey) or [height, width, channels].
"""

import io
from dataclasses import dataclass, replace
from functools import cache, partial
from multiprocessing import parent_process
from typing import Any, Literal

import numpy as np
import simplejpeg
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from patchmill.pipeline.read.image import UndefinedPixels, UnknownImage, jpeg_header, open_image
from patchmill.pipeline.read.image_headers import TIFF_STARTS, UPRIGHT, ImageDamage, oriented
from patchmill.pipeline.read.manifest import ImageFormat
from patchmill.pipeline.read.shards import JPEG_START
from patchmill.pipeline.read.tiff import read_tiff, write_tiff
from patchmill.tools.packing.jpeg_scan import BASELINE, JpegFacts, scan_jpeg
from patchmill.tools.packing.strict_decode import (
    Rejected,
    pillow_pixels,
    pillow_without_limit,
    scaled_pixels,
    strict_pixels,
)


def shrink(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes uint8 [H, W] or [H, W, C] to (height, width); the result has its own, contiguous memory."""
    torch = _torch()
    image_HWC = torch.from_numpy(np.require(np.atleast_3d(pixels), requirements=["C", "W"]))
    images_BCHW = image_HWC.unsqueeze(0).permute(0, 3, 1, 2)  # in memory channels last, and so is the result
    resized = torch.nn.functional.interpolate(images_BCHW, (height, width), mode="bicubic", antialias=True)
    return np.ascontiguousarray(resized.permute(0, 2, 3, 1)[0].numpy().reshape(height, width, *pixels.shape[2:]))


@cache
def _torch() -> Any:
    import torch

    if parent_process() is not None:  # a worker has one processor to itself
        torch.set_num_threads(1)
    return torch


FIRST_BYTES = {
    b"<!DOCTYPE": "an HTML page", b"<html": "an HTML page", b"<?xml": "an XML or SVG file", b"<svg": "an SVG file",
    b"%PDF": "a PDF", b"PK\x03\x04": "a zip archive", b"\x1f\x8b": "a gzip file", b"{": "JSON text",
}  # fmt: skip

IMAGE_STARTS = (b"\xff\xd8", b"\x89PNG", b"GIF8", b"BM", b"RIFF", b"P5", b"P6")

REENCODE_QUALITY = 95

ONE_EIGHTH = {"min_height": 1, "min_width": 1, "min_factor": 8}


@dataclass(frozen=True)
class Policy:
    """What may become of an image. Sizes in pixels; quality 1..100 counts where an image is encoded as JPEG."""

    encode: Literal["keep", "jpeg"] = "keep"
    quality: int = REENCODE_QUALITY
    resize: Literal["none", "shorter-side", "longest-side", "border"] = "none"
    size: int = 0
    min_size: int = 1
    max_pixels: int = 100_000_000
    alpha: Literal["drop", "keep"] = "drop"


@dataclass(frozen=True)
class Packed:
    """An image ready for a shard; pixels is None where only the verdict of the decoder was asked for."""

    data: bytes
    format: ImageFormat
    width: int
    height: int
    pixels: np.ndarray | None


def normalise(data: bytes, policy: Policy, *, want_pixels: bool = True) -> Packed:
    """Checks one encoded image and brings it into the form of the dataset; Rejected says why it cannot be packed.

    Without `want_pixels` a JPEG that is kept is decoded at 1/8 scale: the same entropy-coded bits are read and the same
    errors found, without the inverse transforms.
    """
    if not data:
        raise Rejected("empty file")
    try:
        if data[:3] == JPEG_START:
            return _normalise_jpeg(data, policy, want_pixels)
        return _normalise_other(data, policy)
    except UndefinedPixels as error:
        raise Rejected(str(error)) from None
    except ImageDamage as damage:
        raise Rejected(f"damaged {'JPEG' if data[:3] == JPEG_START else 'image'}: {damage}") from None


def pack_pixels(pixels: np.ndarray, policy: Policy) -> Packed:
    """The same for raw pixels, uint8 [height, width] or [height, width, channels] of any number of channels."""
    height, width = pixels.shape[:2]
    check_size(height, width, policy)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.ndim == 3 and pixels.shape[2] == 4 and policy.alpha == "drop":
        pixels = pixels[:, :, :3]
    if pixels.ndim == 3 and pixels.shape[2] not in (3, 4):
        if policy.resize != "none":
            raise Rejected(f"images of {pixels.shape[2]} channels cannot be resized", "policy")
        return Packed(write_tiff(pixels), ImageFormat.TIFF, width, height, pixels)
    return _encode(_resized(np.ascontiguousarray(pixels), policy), policy)


def check_size(height: int, width: int, policy: Policy) -> None:
    """Rejects by the size in the header, before a byte is decoded: a bomb costs nothing."""
    if height < 1 or width < 1:
        raise Rejected(f"the header says {width} x {height} pixels")
    if height * width > policy.max_pixels:
        raise Rejected(f"{width} x {height} pixels, above --max-pixels {policy.max_pixels}")
    if min(height, width) < policy.min_size:
        raise Rejected(f"{width} x {height} pixels, under --min-size {policy.min_size}", "policy")


def target_size(height: int, width: int, policy: Policy) -> tuple[int, int]:
    """(height, width) after the resize policy; never larger than the source, never under one pixel."""
    if policy.resize == "none":
        return height, width
    side = min(height, width) if policy.resize == "shorter-side" else max(height, width)
    if side <= policy.size:
        return height, width
    scale = policy.size / side
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def _normalise_jpeg(data: bytes, policy: Policy, want_pixels: bool) -> Packed:
    facts = scan_jpeg(data)
    check_size(facts.height, facts.width, policy)
    height, width, colours = jpeg_header(data)
    if (height, width) != (facts.height, facts.width):
        raise ImageDamage("two frame headers that disagree")
    plain_colours = colours in ("Gray", "YCbCr")
    sound = facts.frame == BASELINE and facts.precision == 8 and plain_colours and facts.orientation == UPRIGHT
    resized = policy.resize == "border" or target_size(height, width, policy) != (height, width)
    if sound and not resized and policy.encode == "keep":
        body = data[: facts.end]
        pixels = strict_pixels(body, colours, **({} if want_pixels else ONE_EIGHTH))
        return Packed(body, ImageFormat.JPEG, width, height, pixels if want_pixels else None)
    pixels = scaled_pixels(data, colours, facts, target_size(height, width, policy))
    pixels = oriented(pixels, facts.orientation.value)
    aligned = facts.orientation.value == 1 or (height % 16 == 0 and width % 16 == 0)  # turning keeps the blocks whole
    if policy.encode == "keep" and not resized and plain_colours and aligned:
        return _encode_like(pixels, data, facts)
    if policy.encode == "keep" and not resized and plain_colours:
        return _encode(pixels, replace(policy, quality=REENCODE_QUALITY), subsampling="444", lossy=True)
    return _encode(_resized(pixels, policy), policy, lossy=plain_colours)


def _encode_like(pixels: np.ndarray, source: bytes, facts: JpegFacts) -> Packed:
    """Baseline JPEG with the source's own quantisation tables: near to its pixels, at about its size.

    Measured on photographs of quality 85: off by 0.05 grey levels on average (0.5 with halved chroma), where quality 95
    is off by 0.65 (1.0) and 1.6 times as large.
    """
    with pillow_without_limit():
        image = open_image(source)
    assert isinstance(image, JpegImageFile)
    tables, sampling = image.quantization, [(layer[1], layer[2]) for layer in image.layer]
    if facts.orientation.value >= 5:  # axes are swapped: so are the frequencies
        tables = {i: np.reshape(t, (8, 8)).T.ravel().tolist() for i, t in tables.items()}
    modes = {(1, 1): 0, (2, 1): 1, (2, 2): 2}
    pair = (sampling[0][0] // sampling[-1][0], sampling[0][1] // sampling[-1][1])
    out = io.BytesIO()
    Image.fromarray(pixels).save(
        out, "JPEG", qtables=[tables[i] for i in sorted(tables)], subsampling=modes.get(pair, 0)
    )
    return Packed(out.getvalue(), ImageFormat.JPEG, pixels.shape[1], pixels.shape[0], pixels)


def _normalise_other(data: bytes, policy: Policy) -> Packed:
    """PNG and the formats that only Pillow reads; of several frames the first."""
    try:
        pixels, plain = pillow_pixels(data, partial(check_size, policy=policy), policy.alpha == "keep")
    except UnknownImage:
        raise _unknown(data) from None
    height, width = pixels.shape[:2]
    resized = policy.resize == "border" or target_size(height, width, policy) != (height, width)
    if plain and not resized and policy.encode == "keep":
        return Packed(data, ImageFormat.PNG, width, height, pixels)
    return _encode(_resized(pixels, policy), policy)


def _unknown(data: bytes) -> Rejected:
    """Why Pillow knows no format for these bytes."""
    if data[:4] in TIFF_STARTS:
        try:
            channels = read_tiff(data).shape[2]
        except ValueError as error:
            return Rejected(f"unreadable TIFF: {error}")
        return Rejected(f"a TIFF of {channels} channels: pack such images as one NumPy array (.npy)")
    known = any(data.startswith(magic) for magic in IMAGE_STARTS)
    return Rejected("damaged image: cut short in its header" if known else f"no image: {_first_bytes(data)}")


def _resized(pixels: np.ndarray, policy: Policy) -> np.ndarray:
    """Shrinks with an antialiased bicubic filter; `border` then pads with black to a square."""
    height, width = target_size(pixels.shape[0], pixels.shape[1], policy)
    if (height, width) != pixels.shape[:2]:
        pixels = shrink(pixels, height, width)
    if policy.resize == "border":
        top, left = (policy.size - height) // 2, (policy.size - width) // 2
        rest = [(top, policy.size - height - top), (left, policy.size - width - left)]
        pixels = np.pad(pixels, rest + [(0, 0)] * (pixels.ndim - 2))
    return pixels


def _encode(pixels: np.ndarray, policy: Policy, *, lossy: bool = False, subsampling: str = "420") -> Packed:
    """JPEG where asked for, or where the source was one; PNG otherwise. Alpha is only ever held by PNG."""
    height, width = pixels.shape[:2]
    grey = pixels.ndim == 2
    if (lossy or policy.encode == "jpeg") and (grey or pixels.shape[2] == 3) and max(height, width) <= 65500:
        pixels = np.ascontiguousarray(pixels[:, :, None] if grey else pixels)
        mode, sampling = ("GRAY", "Gray") if grey else ("RGB", subsampling)
        data = simplejpeg.encode_jpeg(pixels, policy.quality, mode, sampling)
        return Packed(data, ImageFormat.JPEG, width, height, pixels[:, :, 0] if grey else pixels)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", compress_level=6)
    return Packed(out.getvalue(), ImageFormat.PNG, width, height, pixels)


def _first_bytes(data: bytes) -> str:
    start = data[:64].lstrip()
    for magic, what in FIRST_BYTES.items():
        if start.lower().startswith(magic.lower()):
            return f"this is {what}"
    return f"unknown first bytes {data[:8].hex(' ')}"
