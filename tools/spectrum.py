"""Measures how many directions the features of checkpoints use, as numbers and as a picture."""

import json
import sys
from dataclasses import dataclass, field
from typing import Literal

from rich.console import Console

from patchmill.pipeline.atomic import whole_file
from patchmill.pipeline.config import ReadConfig
from patchmill.tools import cli
from patchmill.tools.console.options import parse
from patchmill.tools.console.pictures import check_picture
from patchmill.tools.console.report import column_table, show
from patchmill.trainer.checkpoints.infer import Hints
from patchmill.trainer.checkpoints.interop import load_encoder
from patchmill.trainer.config.evaluate import Pool
from patchmill.trainer.draw.charts import write_spectra
from patchmill.trainer.engine.world import World, join_world
from patchmill.trainer.evaluate.knn import make_table
from patchmill.trainer.evaluate.spectrum import Spectrum, take_spectrum


@dataclass(frozen=True)
class SpectrumConfig:
    """Compares how far the features of checkpoints spread: singular values and effective rank.

    Features that use few directions have collapsed: their curve falls early and their effective rank is small. Each
    image is encoded once: centre crop, no flip, no mask.

    Example:
        patchmill spectrum --checkpoints runs/mae runs/umae --data.path test/ --out spectrum.png
    """

    checkpoints: tuple[str, ...]
    """run folders (newest checkpoint), or files or folders of any format that `patchmill import` reads"""
    out: str
    """PNG to write; the numbers go to a .json of the same name"""
    data: ReadConfig = field(default_factory=ReadConfig)
    names: tuple[str, ...] = ()
    """their names in the picture; equal names (seeds) share a colour; unset: the checkpoints as given"""
    pool: Pool = "cls"
    """feature: the class token, or the mean of the patches"""
    crop_fraction: float = 0.875
    """centre crop's share of the shorter side; 1 for images that already have the model's size"""
    max_images: int = 50_000
    """most images to encode, always the same random ones"""
    image_size: int | tuple[int, int] | None = None
    """pixels, if not the training's: positions are interpolated as published"""
    batch_size: int = 64
    """images at a time"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    source: Hints = field(default_factory=Hints)


def main(argv: list[str]) -> int:
    """Runs the command."""
    config = parse(SpectrumConfig, "patchmill spectrum", argv)
    out, names = check_picture(config.out, config.data), config.names or config.checkpoints
    if not config.checkpoints or len(names) != len(config.checkpoints):
        raise ValueError(f"--checkpoints needs at least one, and --names one for each: {len(config.checkpoints)}")
    if config.max_images < 2 or config.batch_size < 1:
        raise ValueError("--max-images must be at least 2, and --batch-size at least 1")
    world = join_world(config.device)
    found = []
    for name, checkpoint in zip(names, config.checkpoints, strict=True):
        with Console(stderr=True).status(f"features of {checkpoint}"):
            found.append((name, checkpoint_spectrum(config, checkpoint, world)))
    with whole_file(out.with_suffix(".json")) as path:
        lines = [
            {"name": name, "checkpoint": checkpoint, **spectrum._asdict()}
            for (name, spectrum), checkpoint in zip(found, config.checkpoints, strict=True)
        ]
        path.write_text(json.dumps(lines) + "\n", encoding="utf-8")
    token = "class token" if config.pool == "cls" else "mean of the patches"
    _, first = found[0]
    title = f"Spectrum of the {token}: {first.images:,} images, {len(first.singular_values)} principal axes"
    write_spectra(found, out, title)
    _print(found)
    print(f"wrote {out} and {out.with_suffix('.json')}")
    return 0


def checkpoint_spectrum(config: SpectrumConfig, checkpoint: str, world: World) -> Spectrum:
    """The spectrum of a checkpoint's features of the data, encoded in fp32.

    Raises:
        ValueError: a checkpoint or dataset that cannot be used.
    """
    encoder = load_encoder(checkpoint, image_size=config.image_size, hints=config.source).to(world.device)
    features_ND = make_table(
        encoder, config.data, config.data.path, config.crop_fraction, config.pool, world, None,
        batch=config.batch_size, most=config.max_images,
    ).features  # fmt: skip
    if len(features_ND) < 2:
        raise ValueError(f"{config.data.path} has fewer than two readable images; a spectrum needs at least two")
    return take_spectrum(features_ND)


def _print(found: list[tuple[str, Spectrum]]) -> None:
    numbers = ("effective rank", "of", "largest", "median", "smallest")
    table = column_table("", *numbers, right=numbers)
    table.caption = "largest, median and smallest singular value"
    for name, (rank, values, _) in found:
        shown = [f"{value:.3g}" for value in (values[0], values[len(values) // 2], values[-1])] if values else [""] * 3
        table.add_row(name, f"{rank:.1f}", str(len(values)), *shown)
    show(table)


if __name__ == "__main__":
    sys.exit(cli.run("spectrum", sys.argv[1:]))
