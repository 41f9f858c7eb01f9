"""foreign file -> [names] -> published names, and back: one model, five spellings of its parameters.

The published names of facebookresearch/mae are the canonical ones; timm and detectron2's ViTDet use the same names for
the encoder, so that only Hugging Face (query, key and value apart) and mmseg need a table. Every conversion moves
tensors without arithmetic: there and back again gives the same bits.

    published (mae)          Hugging Face ViTMAE (as on the hub)                  mmseg MAE backbone
    patch_embed.proj         vit.embeddings.patch_embeddings.projection           patch_embed.projection
    blocks.0.attn.qkv        vit.encoder.layer.0.attention.attention.{query,...}  layers.0.attn.qkv
    blocks.0.mlp.fc1         vit.encoder.layer.0.intermediate.dense               layers.0.ffn.layers.0.0
    norm                     vit.layernorm                                        norm1
    decoder_blocks.0.norm1   decoder.decoder_layers.0.layernorm_before            -
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
    """Config and tensors (published names) for another image size, number of channels, mean or std; None keeps.

    The patch size stays. What does not change is the same tensor, not a copy.

    Raises:
        ValueError: a size that the patch size does not divide, or not one mean and std per channel.
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
    """A position table `[1, num_prefix + L, D]` for another grid of patches; prefix rows stay as they are.

    The same grid gives the table itself.
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
            head = tensors[name].unflatten(0, (p * p, old))  # a patch's values run (row, column, channel)
            head = head.mean(1, keepdim=True) if channels == 1 else head[:, taken]
            changed[name] = head.flatten(0, 1)
    return changed


def _spread(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Per-channel constants over another number of channels, in the way of the kernels."""
    if channels == 1:
        return (sum(values) / len(values),)
    return tuple(values[channel % len(values)] for channel in range(channels))
