"""What the commands that draw pictures share: the checks of their options, and the images that are drawn."""

import dataclasses
from pathlib import Path

import torch

from patchmill.pipeline.batch import Batch
from patchmill.pipeline.config import DataConfig
from patchmill.pipeline.loader import build_loader
from patchmill.pipeline.plan.masks import MaskConfig
from patchmill.trainer.config.model import ModelConfig


def check_picture(out: str, data: DataConfig) -> Path:
    """The PNG to write. Raises ValueError for another ending, and where there are no data."""
    path = Path(out)
    if path.suffix.lower() != ".png":
        raise ValueError(f"--out {out} must end in .png")
    if not data.path:
        raise ValueError("no data: give --data.path DIR, a folder that `patchmill shard` wrote")
    return path


def first_batch(
    data: DataConfig, model: ModelConfig, mask: MaskConfig, *, seed: int, count: int, device: torch.device
) -> Batch:
    """The first images of a dataset under a seed; a dataset that is smaller fills up with its first ones.

    Raises:
        ValueError, FileNotFoundError: what is wrong with the data.
    """
    with build_loader(
        dataclasses.replace(data, last_batch="fill"),
        image_size=model.image_size,
        patch_size=model.patch_size,
        channels=model.channels,
        mask=mask,
        seed=seed,
        global_batch=count,
        device=device,
    ) as loader:
        return next(loader)
