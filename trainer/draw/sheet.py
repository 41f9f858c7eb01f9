"""Writes sheets of small pictures as PNGs: one row per image, one titled column per kind of picture."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from patchmill.trainer.draw.style import INK

GAP = 6
"""white pixels between pictures"""
FONT_SIZE, LINE_GAP = 15, 2


class Column(NamedTuple):
    """A column of pictures under one title."""

    title: str
    """may span several lines"""
    images: Tensor
    """uint8 [B, H, W, C]; one channel is drawn in grey, of more than three only the first three"""


def write_sheet(columns: Sequence[Column], path: Path, *, across: int = 1, cell: int = 144) -> None:
    """Writes a PNG with one row per image: its picture from every column, with the titles on top.

    Args:
        columns: the same number of images in each; the first sets the size of all pictures. Smaller images (maps of
            patches) are enlarged without smoothing: every patch stays a visible square.
        across: rows side by side.
        cell: height of a picture in pixels. It is approximate: small images are enlarged by a whole number.
    """
    size = _picture_size(columns[0].images, cell)
    drawn = [[_picture(image, size) for image in column.images.cpu()] for column in columns]
    count = len(drawn[0])
    across = min(across, count)
    titles = [_wrapped(column.title, size[0]) for column in columns]
    line = sum(_font().getmetrics()) + LINE_GAP
    head = max(title.count("\n") + 1 for title in titles) * line + 2 * GAP if any(titles) else GAP
    strip = len(columns) * (size[0] + GAP) + 2 * GAP
    rows = -(-count // across)
    sheet = Image.new("RGB", (across * strip - GAP, head + rows * (size[1] + GAP)), "white")
    pen = ImageDraw.Draw(sheet)
    for place in range(across):
        for k, title in enumerate(titles):
            middle = place * strip + GAP + k * (size[0] + GAP) + size[0] / 2
            for number, words in enumerate(reversed(title.split("\n")), 1):
                pen.text((middle, head - GAP - number * line), words, INK, _font(), anchor="ma")
    for i in range(count):
        left, top = (i % across) * strip + GAP, head + (i // across) * (size[1] + GAP)
        for k, pictures in enumerate(drawn):
            sheet.paste(pictures[i], (left + k * (size[0] + GAP), top))
    sheet.save(path, optimize=True)


def coloured(maps_BHW: Tensor, colours: str = "viridis") -> Tensor:
    """Maps numbers from 0 to 1 to the colours of a matplotlib colour map: uint8 [B, H, W, 3]."""
    from matplotlib import colormaps

    return torch.from_numpy((colormaps[colours](maps_BHW.cpu().numpy())[..., :3] * 255).round().astype(np.uint8))


def _picture_size(images_BHWC: Tensor, cell: int) -> tuple[int, int]:
    """Width and height of a picture: a whole multiple of a small image, `cell` high for a larger one."""
    height, width = images_BHWC.shape[1:3]
    if height > cell:
        return round(width * cell / height), cell
    scale = max(1, round(cell / height))
    return width * scale, height * scale


def _picture(image_HWC: Tensor, size: tuple[int, int]) -> Image.Image:
    pixels = image_HWC.numpy()
    if pixels.shape[-1] < 3:
        pixels = np.repeat(pixels[..., :1], 3, axis=-1)
    picture = Image.fromarray(np.ascontiguousarray(pixels[..., :3]))
    larger = picture.height > size[1]
    return picture.resize(size, Image.Resampling.LANCZOS if larger else Image.Resampling.NEAREST)


def _wrapped(title: str, width: int) -> str:
    """Breaks the title into lines no wider than a column; a word that is wider keeps a line to itself."""
    lines: list[str] = []
    for line in title.split("\n"):
        words = line.split(" ")
        lines.append(words[0])
        for word in words[1:]:
            longer = f"{lines[-1]} {word}"
            if _font().getlength(longer) <= width:
                lines[-1] = longer
            else:
                lines.append(word)
    return "\n".join(lines)


@cache
def _font() -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(FONT_SIZE)
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow's wheels have FreeType
    return font
