"""Checks the options of the commands that draw, and loads the images they draw."""

from pathlib import Path

import torch

from patchmill.pipeline.batch import Batch
from patchmill.pipeline.config import DataConfig, MaskConfig, ReadConfig
from patchmill.pipeline.loader import build_loader
from patchmill.tools.console.options import require_data
from patchmill.trainer.config.model import ModelConfig


def check_picture(out: str, data: ReadConfig) -> Path:
    """The PNG to write. Raises ValueError for another extension, or when --data.path is missing."""
    path = Path(out)
    if path.suffix.lower() != ".png":
        raise ValueError(f"--out {out} must end in .png")
    require_data(data)
    return path


def first_batch(
    data: DataConfig, model: ModelConfig, mask: MaskConfig, *, seed: int, count: int, device: torch.device
) -> Batch:
    """The first `count` images of a dataset under a seed; last_batch "fill" repeats those of a smaller dataset.

    Raises:
        ValueError, FileNotFoundError: the data cannot be used; the message says why.
    """
    with build_loader(
        data,
        image_size=model.image_size,
        patch_size=model.patch_size,
        channels=model.channels,
        mask=mask,
        seed=seed,
        global_batch=count,
        device=device,
    ) as loader:
        return next(loader)
