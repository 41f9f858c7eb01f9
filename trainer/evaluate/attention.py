"""Draws maps of an encoder: attention of the class token, and patch features as colours.

Fused attention never stores its weights. They are computed again here from the block's input, at no cost to training.

Shapes: B images, N tokens, L patches (h rows, w columns), D width, H heads, d = D / H.
"""

from typing import Any

import torch
from torch import Tensor

from patchmill.trainer.model.encoder import Encoder

ENDS = (0.01, 0.99)
"""percentiles of a component that get no colour and full colour"""


@torch.no_grad()
def attention_weights(encoder: Encoder, images_BHWC: Tensor, block: int = -1) -> Tensor:
    """Softmax weights of every token over every token in one block, fp32 [B, H, N, N]; rows sum to 1.

    Args:
        images_BHWC: uint8, whole images.
        block: index from 0; -1 is the last.
    Raises:
        ValueError: the encoder has no such block.
    """
    depth = len(encoder.blocks)
    if not -depth <= block < depth:
        raise ValueError(f"no block {block}: this encoder has {depth}, 0 to {depth - 1} (or -{depth} to -1)")
    attention: Any = encoder.blocks[block].attn
    seen: list[Tensor] = []
    handle = attention.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    try:
        encoder(images_BHWC)
    finally:
        handle.remove()
    q, k, _ = attention.qkv(seen[0]).float().unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)


def class_attention(encoder: Encoder, images_BHWC: Tensor, block: int = -1) -> Tensor:
    """Attention of each head's class token to each patch, fp32 [B, H, h, w]. Arguments and errors: `attention_weights`.

    Attention to itself is left out, so a map sums to less than 1.
    """
    return attention_weights(encoder, images_BHWC, block)[:, :, 0, 1:].unflatten(-1, encoder.config.grid_hw)


def feature_colours(patches_BLD: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    """The first three principal components of patch features as red, green and blue: uint8 [B, h, w, 3].

    The mean over images at each position is subtracted first: features of a masked autoencoder encode position, and
    colours would show little else. Give some dozens of images. The components are fitted to all patches together, so
    equal colours mean similar features across images. Each is stretched between its 1st and 99th percentile, with the
    sign that makes its largest weight positive: the same features give the same colours.
    """
    patches = patches_BLD.double().cpu()
    centred = (patches - patches.mean(0)).flatten(0, 1)
    axes_D3 = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -3:].flip(1)
    largest = axes_D3.gather(0, axes_D3.abs().argmax(0, keepdim=True))
    values = centred @ (axes_D3 * largest.sign())
    low, high = (values.kthvalue(1 + round(share * (len(values) - 1)), dim=0).values for share in ENDS)
    levels = ((values - low) / (high - low).clamp_min(1e-12)).clamp(0, 1) * 255
    return levels.round().to(torch.uint8).view(len(patches_BLD), *grid_hw, 3)
