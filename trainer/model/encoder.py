"""Wraps a pretrained encoder as a plain module that maps whole images to features.

It masks nothing and calls only standard PyTorch operators, and it carries the normalisation constants. The same module
runs in PyTorch, under torch.compile and exported to ONNX.

Shapes: B images, L patches, D encoder width, p patch size, H W C pixels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from patchmill.trainer.model.vit import EncoderBody, VisionTransformer


class Features(NamedTuple):
    """An encoder's output for a batch, after its last norm."""

    cls_token: Tensor
    """[B, D]"""
    patches: Tensor
    """[B, L, D], row by row"""


class Encoder(EncoderBody):
    """The encoder of a masked autoencoder. It shares the model's parameters under their published names."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        c = self.config = model.config
        self.cls_token = model.cls_token
        self.pos_embed = model.pos_embed
        self.patch_embed = model.patch_embed
        self.blocks = model.blocks
        self.norm = model.norm
        self.register_buffer("mean", torch.tensor(c.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(c.std).view(-1, 1, 1), persistent=False)

    def forward(self, images_BHWC: Tensor) -> Features:
        """uint8 images [B, H, W, C], as the loader and image files give them -> features."""
        return self.encode(self.normalise(images_BHWC))

    def normalise(self, images_BHWC: Tensor) -> Tensor:
        """uint8 [B, H, W, C] -> [B, C, H, W] in the parameters' dtype: (value / 255 - mean) / std.

        Raises:
            ValueError: images that do not have this dtype and the model's size.
        """
        expected = (*self.config.image_hw, self.config.channels)
        if images_BHWC.dtype != torch.uint8 or tuple(images_BHWC.shape[1:]) != expected:
            raise ValueError(
                f"images are {images_BHWC.dtype} {tuple(images_BHWC.shape)}; the encoder takes torch.uint8 "
                f"[B, {', '.join(map(str, expected))}] (channels last). Pass normalised images to encoder.encode; for "
                "another size, load the encoder with load_encoder(path, image_size=...)"
            )
        x_BCHW = images_BHWC.permute(0, 3, 1, 2).to(torch.float32) / 255
        return ((x_BCHW - self.mean) / self.std).to(self.pos_embed.dtype)

    def encode(self, images_BCHW: Tensor) -> Features:
        """Normalised images [B, C, H, W], as timm and transformers take them -> features."""
        x_BND = self.norm(self.run_blocks(self.embed_images(images_BCHW)))
        return Features(x_BND[:, 0], x_BND[:, 1:])
