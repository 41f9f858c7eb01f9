"""Adapts a model's weights to another image size or number of channels.

Position tables are interpolated as the published code does it (`interpolate_pos_embed`: bicubic, no antialiasing, the
class token's row untouched), here for any grid; transformers, detectron2 and mmseg resize in the same way.

Channels: the patch embedding's kernels repeat over the new channels, scaled by old / new to keep the size of tokens;
one channel gets their sum (timm's rule for `in_chans`). The decoder's head predicts a new channel like the one it
repeats; one channel gets their mean.

Shapes: L patches, D width, C channels, p patch size.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from patchmill.trainer.config.model import ModelConfig

Tensors = dict[str, Tensor]


def resize_model(
    config: ModelConfig,
    tensors: Tensors,
    *,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> tuple[ModelConfig, Tensors]:
    """Returns config and tensors (published names) for another image size, channel count, mean or std; None keeps one.

    The patch size stays. Tensors that do not change are returned, not copied.

    Raises:
        ValueError: the patch size does not divide the image size, or mean and std do not have one value per channel.
    """
    resized = dict(tensors)
    if channels is not None and channels != config.channels:
        if channels < 1:
            raise ValueError(f"channels is {channels}; it must be at least 1")
        kept = (_spread(config.mean, channels), _spread(config.std, channels))
        new = dataclasses.replace(config, channels=channels, mean=mean or kept[0], std=std or kept[1])
        resized |= _with_channels(resized, config, channels)
    else:
        new = dataclasses.replace(config, mean=mean or config.mean, std=std or config.std)
    if image_size is not None:
        new = dataclasses.replace(new, image_size=image_size)
    for name in ("pos_embed", "decoder_pos_embed"):
        if name in resized:
            resized[name] = interpolate_positions(resized[name], config.grid_hw, new.grid_hw)
    return new, resized


def interpolate_positions(table: Tensor, old_hw: tuple[int, int], new_hw: tuple[int, int]) -> Tensor:
    """Interpolates a position table `[1, num_prefix + L, D]` to another grid of patches and keeps its prefix rows.

    For the same grid it returns the table itself.
    """
    if old_hw == new_hw:
        return table
    num_prefix = table.shape[1] - old_hw[0] * old_hw[1]
    prefix, rows = table[:, :num_prefix], table[:, num_prefix:]
    grid = rows.reshape(1, *old_hw, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=new_hw, mode="bicubic", align_corners=False)
    return torch.cat([prefix, grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def _with_channels(tensors: Tensors, config: ModelConfig, channels: int) -> Tensors:
    p, old = config.patch_size, config.channels
    kernel_DCpp = tensors["patch_embed.proj.weight"]
    taken = [channel % old for channel in range(channels)]
    if channels == 1:
        changed = {"patch_embed.proj.weight": kernel_DCpp.sum(1, keepdim=True)}
    else:
        changed = {"patch_embed.proj.weight": kernel_DCpp[:, taken] * (old / channels)}
    for name in ("decoder_pred.weight", "decoder_pred.bias"):
        if name in tensors:
            head = tensors[name].unflatten(0, (p * p, old))  # values of a patch are ordered (row, column, channel)
            head = head.mean(1, keepdim=True) if channels == 1 else head[:, taken]
            changed[name] = head.flatten(0, 1)
    return changed


def _spread(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Per-channel constants for another number of channels: averaged for one channel, else repeated."""
    if channels == 1:
        return (sum(values) / len(values),)
    return tuple(values[channel % len(values)] for channel in range(channels))
