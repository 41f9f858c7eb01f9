"""Reads the checkpoint that `export` and `import` convert, and changes its image size, channels and parts."""

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from patchmill.trainer.checkpoints.export import only_encoder
from patchmill.trainer.checkpoints.infer import Hints
from patchmill.trainer.checkpoints.interop import Checkpoint, read_checkpoint, resized

CheckpointPath = Annotated[str, tyro.conf.Positional]


@dataclass(frozen=True)
class Reshape:
    """Changes on the way; unset keeps."""

    image_size: int | tuple[int, int] | None = None
    """pixels (one number, or height and width): positions are interpolated as published"""
    channels: int | None = None
    """image channels: the patch embedding's kernels are repeated over them and rescaled"""
    mean: tuple[float, ...] | None = None
    """per new channel, in 0..1 units"""
    std: tuple[float, ...] | None = None
    """per new channel, in 0..1 units"""


def read_reshaped(path: str, source: Hints, to: Reshape, *, encoder_only: bool) -> Checkpoint:
    """Reads a checkpoint of any known format and reshapes it; notes about it go to stderr.

    Raises:
        ValueError, OSError: as `read_checkpoint` and `resized`.
    """
    checkpoint = read_checkpoint(path, source)
    for note in checkpoint.notes:
        print(f"note: {note}", file=sys.stderr)
    checkpoint = resized(checkpoint, image_size=to.image_size, channels=to.channels, mean=to.mean, std=to.std)
    return only_encoder(checkpoint) if encoder_only else checkpoint
