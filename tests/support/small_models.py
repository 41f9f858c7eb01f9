"""Defines small models for all tests and makes tensors for them; the published sizes take no memory."""

import dataclasses
from functools import cache
from pathlib import Path

import torch

from patchmill.trainer.checkpoints.infer import expected_tensors
from patchmill.trainer.checkpoints.interop import Checkpoint
from patchmill.trainer.config.model import ModelConfig

TINY = ModelConfig(
    image_size=32,
    patch_size=8,
    embed_dim=32,
    depth=2,
    num_heads=4,
    decoder_embed_dim=16,
    decoder_depth=2,
    decoder_num_heads=2,
    norm_pix_loss=False,
)
WIDE = dataclasses.replace(TINY, image_size=(32, 56), channels=4, mean=(0.1, 0.2, 0.3, 0.4), std=(0.5, 0.6, 0.7, 0.8))
OBLONG = dataclasses.replace(TINY, image_size=(32, 48), num_heads=2, norm_pix_loss=True)
SMALLEST = dataclasses.replace(
    TINY, embed_dim=16, depth=1, num_heads=2, decoder_embed_dim=16, decoder_depth=1, norm_pix_loss=True
)
B16 = ModelConfig()
L16 = ModelConfig(embed_dim=1024, depth=24, num_heads=16)
H14 = ModelConfig(patch_size=14, embed_dim=1280, depth=32, num_heads=16)


def random_checkpoint(config=TINY, *, decoder=True, seed=0):
    """A checkpoint whose tensors all differ."""
    generator = torch.Generator().manual_seed(seed)
    shapes = expected_tensors(config, with_decoder=decoder)
    tensors = {name: 0.1 * torch.randn(shape.shape, generator=generator) for name, shape in shapes.items()}
    return Checkpoint(config, tensors, "mae", Path("none"), [])


@cache
def windows(config, *, decoder=True):
    """As many tensors as the model has, all different, that are windows of one small buffer: H/14 in 40 MB."""
    shapes = expected_tensors(config, with_decoder=decoder)
    most = max(shape.numel() for shape in shapes.values())
    buffer = torch.rand(most + len(shapes), generator=torch.Generator().manual_seed(0))
    return {name: buffer[i : i + s.numel()].view(s.shape) for i, (name, s) in enumerate(shapes.items())}


def same_bits(tensors, others):
    """Whether two state dicts hold the same names with the same bits."""
    return tensors.keys() == others.keys() and all(
        tensors[name] is others[name] or torch.equal(tensors[name], others[name]) for name in tensors
    )
