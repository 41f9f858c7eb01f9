"""Tells what a dataset holds (counts, classes, sizes) and draws a contact sheet."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image, ImageDraw
from rich.table import Table

from patchmill.pipeline.read.manifest import Dataset, ImageFormat, open_dataset
from patchmill.tools.console.options import parse
from patchmill.tools.console.report import add_pixel_rows, fact_table, show
from patchmill.tools.packing.plan import shuffle_keys
from patchmill.tools.packing.strict_decode import read_pixels

SIDES = (0, 32, 64, 128, 224, 256, 384, 512, 768, 1024, 2048, 4096, 2**32)
BAR_WIDTH = 40
TILE, GAP, LINE = 128, 4, 14  # pixels of a contact sheet


@dataclass(frozen=True)
class InfoArgs:
    """Tells what a dataset holds: counts, classes, a histogram of sizes; --sheet draws some of its images.

    Example:
        patchmill info shards/ --sheet sheet.png
    """

    dataset: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DATASET")]
    """The dataset's folder."""
    sheet: Path | None = None
    """Write a contact sheet of random images to this PNG."""
    images: int = 48
    """Images on the sheet."""
    seed: int = 0
    """Seed of that choice."""
    classes: int = 10
    """Classes to list, largest first."""


def main(argv: list[str]) -> int:
    """Runs the command."""
    args = parse(InfoArgs, "patchmill info", argv)
    if args.images < 1:
        raise ValueError(f"--images {args.images} must be at least 1")
    if args.classes < 0:
        raise ValueError(f"--classes {args.classes} must not be negative")
    if args.sheet and (args.sheet.suffix.lower() != ".png" or args.sheet.is_dir()):
        raise ValueError(f"--sheet {args.sheet} must be a file that ends in .png")
    dataset = open_dataset(args.dataset)
    show(overview(args.dataset, dataset), "", class_table(dataset, args.classes), "", size_table(dataset))
    if args.sheet:
        args.sheet.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(dataset, args.images, args.seed).save(args.sheet, "PNG")
        print(f"contact sheet: {args.sheet}")
    return 0


def overview(path: Path, dataset: Dataset) -> Table:
    """The manifest's numbers."""
    manifest, samples = dataset.manifest, dataset.samples
    size = sum(shard.bytes for shard in manifest.shards)
    formats = np.bincount(samples["format"], minlength=len(ImageFormat))
    table = fact_table(str(path))
    table.add_row("images", f"{manifest.num_samples:,}")
    table.add_row("classes", f"{len(manifest.classes):,}; {int((samples['label'] < 0).sum()):,} images without label")
    table.add_row(
        "shards",
        f"{len(manifest.shards):,}, {size / 1e6:,.1f} MB, {manifest.statistics['size']['mean']:,.0f} bytes an image",
    )
    table.add_row("formats", ", ".join(f"{formats[f]:,} {f.name}" for f in ImageFormat if formats[f]))
    for side in ("width", "height"):
        values = manifest.statistics[side]
        table.add_row(side, f"{values['min']:,} to {values['max']:,}, mean {values['mean']:,.0f}")
    add_pixel_rows(table, manifest)
    table.add_row("left out", f"{manifest.quarantined:,}")
    table.add_row("seed", str(manifest.options.get("seed", "")))
    table.add_row("fingerprint", manifest.fingerprint()[:16])
    return table


def class_table(dataset: Dataset, shown: int) -> Table:
    """The largest classes with their counts."""
    labels = dataset.samples["label"]
    counts = np.bincount(labels[labels >= 0], minlength=len(dataset.manifest.classes))
    table = fact_table("classes")
    for label in np.argsort(-counts, kind="stable")[:shown]:
        table.add_row(dataset.manifest.classes[label], f"{counts[label]:,}", _bar(counts[label], counts.max()))
    if len(counts) > shown:
        table.add_row("...", f"{len(counts) - shown:,} more; smallest {counts.min():,}")
    return table


def size_table(dataset: Dataset) -> Table:
    """Histogram of the shorter sides."""
    shorter = np.minimum(dataset.samples["width"], dataset.samples["height"])
    counts, _ = np.histogram(shorter, SIDES)
    table = fact_table("shorter side, pixels")
    for low, high, count in zip(SIDES, SIDES[1:], counts, strict=False):
        if count:
            table.add_row(
                f"{low} to {high - 1}" if high < 2**32 else f"{low} and more", f"{count:,}", _bar(count, counts.max())
            )
    return table


def contact_sheet(dataset: Dataset, count: int, seed: int) -> Image.Image:
    """A grid of `count` random images, each with its index, class and size below it."""
    chosen = np.sort(np.argsort(shuffle_keys([str(i) for i in range(len(dataset))], seed))[:count])
    columns = min(len(chosen), max(1, int((len(chosen) * 1.5) ** 0.5 + 0.5)))
    rows = -(-len(chosen) // columns)
    sheet = Image.new("RGB", (columns * (TILE + GAP) + GAP, rows * (TILE + LINE + GAP) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for place, index in enumerate(chosen):
        left = GAP + place % columns * (TILE + GAP)
        top = GAP + place // columns * (TILE + LINE + GAP)
        row = dataset.samples[index]
        tile = _thumbnail(read_pixels(dataset, int(index)))
        sheet.paste(tile, (left + (TILE - tile.width) // 2, top + (TILE - tile.height) // 2))
        label = dataset.manifest.classes[row["label"]] if 0 <= row["label"] < len(dataset.manifest.classes) else ""
        draw.text((left, top + TILE), f"{index} {label}"[:21], fill="black")
    return sheet


def _thumbnail(pixels: np.ndarray) -> Image.Image:
    """The first one or three channels, within a tile; small images are enlarged by whole pixels."""
    if pixels.ndim == 3:
        pixels = pixels[:, :, :3] if pixels.shape[2] >= 3 else pixels[:, :, 0]
    image = Image.fromarray(pixels).convert("RGB")
    scale = TILE // max(image.size)
    if scale > 1:
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    image.thumbnail((TILE, TILE))
    return image


def _bar(count: int, largest: int) -> str:
    return "█" * max(1, round(BAR_WIDTH * int(count) / int(largest))) if count else ""
