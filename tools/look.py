"""Draws images, their features as colours, and where each attention head looks."""

import sys
from dataclasses import dataclass, field
from typing import Literal

import torch

from patchmill.pipeline.config import DataConfig, MaskConfig
from patchmill.tools import cli
from patchmill.tools.console.options import parse
from patchmill.tools.console.pictures import check_picture, first_batch
from patchmill.trainer.checkpoints.infer import Hints
from patchmill.trainer.checkpoints.interop import load_encoder
from patchmill.trainer.draw.sheet import Column, coloured, write_sheet
from patchmill.trainer.engine.world import join_world
from patchmill.trainer.evaluate.attention import class_attention, feature_colours
from patchmill.trainer.model.encoder import Encoder

Map = Literal["features", "attention"]
PCA_IMAGES = 64
"""images that the principal components are computed from, at least, even when fewer are drawn"""


@dataclass(frozen=True)
class LookConfig:
    """Draws what an encoder sees in whole images: patch features as colours (PCA), and attention of the class token.

    features: the first three principal components of patch features as red, green and blue, after subtracting the mean
    over images at each position.
    attention: for each head of a block, attention of the class token to each patch, scaled to each map's maximum.

    Example:
        patchmill look --checkpoint runs/b16 --data.path shards/ --out look.png
        patchmill look --checkpoint mae_pretrain_vit_base.pth --data.path shards/ --out look.png --block 9
    """

    checkpoint: str
    """run folder (newest checkpoint), or a file or folder of any format that `patchmill import` reads"""
    out: str
    """PNG to write"""
    data: DataConfig = field(
        default_factory=lambda: DataConfig(crop="centre", crop_fraction=1.0, flip=False, last_batch="fill")
    )
    show: tuple[Map, ...] = ("features", "attention")
    """maps to draw next to the images"""
    block: int = -1
    """block whose attention to draw, from 0; -1 is the last"""
    images: int = 8
    """how many images"""
    image_size: int | tuple[int, int] | None = None
    """pixels, if not the training's: more give finer maps (positions are interpolated)"""
    seed: int = 0
    """of the choice of images"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    source: Hints = field(default_factory=Hints)


def main(argv: list[str]) -> int:
    """Runs the command."""
    config = parse(LookConfig, "patchmill look", argv)
    out = check_picture(config.out, config.data)
    if config.images < 1 or not config.show:
        raise ValueError("--images must be at least 1, and --show at least one of features, attention")
    device = join_world(config.device).device
    encoder = load_encoder(config.checkpoint, image_size=config.image_size, hints=config.source).to(device)
    columns = look(encoder, config, device)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_sheet(columns, out)
    print(f"wrote {out}: {config.images} images of {config.data.path}, {len(columns)} columns")
    return 0


def look(encoder: Encoder, config: LookConfig, device: torch.device) -> list[Column]:
    """The columns of the sheet.

    Raises:
        ValueError: the data cannot be used, or the encoder has no such block.
    """
    c = encoder.config
    count = max(config.images, PCA_IMAGES)
    many_BHWC = first_batch(config.data, c, MaskConfig(), seed=config.seed, count=count, device=device).images
    images_BHWC = many_BHWC[: config.images]
    columns = [Column("image", images_BHWC)]
    if "features" in config.show:
        with torch.no_grad():
            patches_BLD = torch.cat([encoder(part).patches for part in many_BHWC.split(8)])
        columns.append(Column("features (PCA)", feature_colours(patches_BLD, c.grid_hw)[: config.images]))
    if "attention" in config.show:
        maps_BHhw = torch.cat([class_attention(encoder, part, config.block) for part in images_BHWC.split(8)])
        number = config.block % c.depth
        for head, maps_Bhw in enumerate(maps_BHhw.unbind(1)):
            shown = maps_Bhw / maps_Bhw.amax((1, 2), keepdim=True)
            columns.append(Column(f"block {number}\nhead {head}", coloured(shown)))
    return columns


if __name__ == "__main__":
    sys.exit(cli.run("look", sys.argv[1:]))
