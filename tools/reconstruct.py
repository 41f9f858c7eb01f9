"""Draws masked images, a checkpoint's reconstructions and the originals (He et al. 2021, Figures 2, 4 and 6)."""

import dataclasses
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

from patchmill.pipeline.batch import Batch
from patchmill.pipeline.config import KINDS, DataConfig, MaskConfig
from patchmill.pipeline.plan.masks import MaskPlan
from patchmill.tools import cli
from patchmill.tools.console.options import parse
from patchmill.tools.console.pictures import check_picture, first_batch
from patchmill.trainer.checkpoints.checkpoint import load_model
from patchmill.trainer.draw.sheet import Column, write_sheet
from patchmill.trainer.engine.world import join_world
from patchmill.trainer.evaluate.reconstruct import reconstruct
from patchmill.trainer.model.vit import VisionTransformer


@dataclass(frozen=True)
class ReconstructConfig:
    """Draws how a checkpoint fills in masked images: masked | reconstruction | original, in rows.

    --masks draws the same images under several masks: ratios (He et al. 2021, Figure 4), kinds (Figure 6), or both.

    Example:
        patchmill reconstruct --checkpoint runs/first --data.path shards/ --out grid.png
        patchmill reconstruct --checkpoint runs/first --data.path shards/ --out ratios.png --masks 0.75 0.85 0.95
        patchmill reconstruct --checkpoint runs/first --data.path shards/ --out kinds.png --masks random block:0.5 grid
    """

    checkpoint: str
    """run folder (newest checkpoint), checkpoints/step-XXXXXXXX, or a model.safetensors"""
    out: str
    """PNG to write"""
    data: DataConfig = field(default_factory=lambda: DataConfig(last_batch="fill"))
    mask: MaskConfig = field(default_factory=MaskConfig)
    masks: tuple[str, ...] = ()
    """several masks: each a ratio, a kind, or kind:ratio; --mask gives what one leaves out"""
    images: int | None = None
    """how many images; unset: 16, or 8 under several masks"""
    across: int | None = None
    """how many images side by side; unset: 2, or 1 under several masks"""
    seed: int = 0
    """of the choice of images, crops and masks"""
    device: Literal["auto", "cpu", "cuda"] = "auto"


def main(argv: list[str]) -> int:
    """Runs the command."""
    config = parse(ReconstructConfig, "patchmill reconstruct", argv)
    out = check_picture(config.out, config.data)
    count, across = config.images or (8 if config.masks else 16), config.across or (1 if config.masks else 2)
    if min(count, across) < 1 or 0 in (config.images, config.across):
        raise ValueError("--images and --across must be at least 1")
    masks = [parse_mask(text, config.mask) for text in config.masks] or [config.mask]
    device = join_world(config.device).device
    model, source = load_model(config.checkpoint)
    model.to(device)
    batch = first_batch(config.data, model.config, masks[0], seed=config.seed, count=count, device=device)
    columns = [column for mask in masks for column in mask_columns(model, batch, mask, config.seed)]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_sheet([*columns, Column("original", batch.images)], out, across=across)
    print(f"wrote {out}: {count} images of {config.data.path} through {source}")
    if model.config.norm_pix_loss:
        print("this model predicts normalised pixels: each patch is drawn with its true mean and contrast")
    return 0


def mask_columns(model: VisionTransformer, batch: Batch, mask: MaskConfig, seed: int) -> list[Column]:
    """A masked batch and its reconstruction; the titles name the mask."""
    plan = MaskPlan.draw(
        mask, seed=seed, epoch=batch.epoch, sample_ids_B=batch.sample_ids, grid_hw=model.config.grid_hw
    )
    masked, reconstruction = reconstruct(model, batch.images, plan)
    hidden = plan.ids_mask.shape[1] / plan.ids_restore.shape[1]
    given = "\nwith the true contrast" if model.config.norm_pix_loss else ""
    return [Column(f"{mask.kind}\n{hidden:.0%} masked", masked), Column(f"reconstruction{given}", reconstruction)]


def parse_mask(text: str, default: MaskConfig) -> MaskConfig:
    """Parses a mask: "0.85", "grid" or "block:0.5". Raises ValueError for anything else.

    Example: "block:0.5" with a default of random masks of 0.75: block masks of 0.5.
    """
    kind, _, ratio = text.partition(":")
    if kind not in KINDS and not ratio:
        kind, ratio = default.kind, kind
    changes: dict[str, Any] = {"kind": kind}
    try:
        if ratio:
            changes["ratio"] = float(ratio)
        return dataclasses.replace(default, **changes)
    except ValueError as error:
        kinds = ", ".join(KINDS)
        raise ValueError(f"--masks {text!r}: give a ratio (0.85), a kind ({kinds}) or both (block:0.5)") from error


if __name__ == "__main__":
    sys.exit(cli.run("reconstruct", sys.argv[1:]))
