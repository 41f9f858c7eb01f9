"""patchmill reconstruct: checkpoint + shards -> a PNG of masked | reconstruction | original (paper, Figure 2)."""

import dataclasses
import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from patchmill.pipeline.data_config import DataConfig
from patchmill.pipeline.loader import build_loader
from patchmill.pipeline.masks import MaskConfig
from patchmill.tools import cli
from patchmill.trainer.checkpoint import load_model
from patchmill.trainer.pictures import reconstruct, write_grid
from patchmill.trainer.world import join_world


@dataclass(frozen=True)
class ReconstructConfig:
    """Draws what a checkpoint makes of masked images: masked | reconstruction | original, in rows.

    Example:
        patchmill reconstruct --checkpoint runs/first --data.path shards/ --out grid.png
    """

    checkpoint: str
    """run folder (newest checkpoint), checkpoints/step-XXXXXXXX, or a model.safetensors"""
    out: str
    """the PNG to write"""
    data: DataConfig
    mask: MaskConfig
    images: int = 16
    """how many images"""
    across: int = 2
    """how many of them side by side"""
    seed: int = 0
    """of the choice of images, crops and masks"""
    device: Literal["auto", "cpu", "cuda"] = "auto"


def main(argv: list[str]) -> int:
    """Runs the command."""
    about = inspect.getdoc(ReconstructConfig)
    config = tyro.cli(ReconstructConfig, prog="patchmill reconstruct", description=about, args=argv)
    out = Path(config.out)
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out {out} must end in .png")
    if not config.data.path:
        raise ValueError("no data: give --data.path DIR, a folder that `patchmill shard` wrote")
    if min(config.images, config.across) < 1:
        raise ValueError("--images and --across must be at least 1")
    device = join_world(config.device).device
    model, source = load_model(config.checkpoint)
    model.to(device)
    with build_loader(
        dataclasses.replace(config.data, last_batch="fill"),  # a dataset may be smaller than the grid
        image_size=model.config.image_size,
        patch_size=model.config.patch_size,
        channels=model.config.channels,
        mask=config.mask,
        seed=config.seed,
        global_batch=config.images,
        device=device,
    ) as loader:
        batch = next(iter(loader))
    masked, reconstruction = reconstruct(model, batch.images, batch.plan)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_grid(
        [masked, reconstruction, batch.images],
        out,
        across=min(config.across, config.images),
        scale=max(1, 160 // model.config.image_hw[0]),
    )
    print(f"wrote {out}: {config.images} images of {config.data.path} through {source}")
    if model.config.norm_pix_loss:
        print("this model predicts normalised pixels: each patch's mean and contrast are the true ones")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run("reconstruct", sys.argv[1:]))
