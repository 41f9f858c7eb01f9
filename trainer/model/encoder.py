"""checkpoint -> [encoder] -> features: the pretrained half of the model as a plain module, for whole images.

Nothing is masked, no operator of our own is called, and the normalisation constants come along, so that what was
trained is what runs: in PyTorch, under torch.compile, or exported to ONNX.

Shapes: B images, L patches, D encoder width, p patch size, H W C pixels.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from patchmill.trainer.model.vit import VisionTransformer


class Features(NamedTuple):
    """What the encoder makes of a batch, after its last norm."""

    cls_token: Tensor
    """[B, D]"""
    patches: Tensor
    """[B, L, D], row by row"""


class Encoder(nn.Module):
    """The encoder of a masked autoencoder; it shares the model's parameters and their published names."""

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
        """uint8 [B, H, W, C] images, as the loader and image files have them -> features."""
        return self.encode(self.normalise(images_BHWC))

    def normalise(self, images_BHWC: Tensor) -> Tensor:
        """uint8 [B, H, W, C] -> [B, C, H, W] in the parameters' dtype: (value / 255 - mean) / std.

        Raises:
            ValueError: images of another dtype or size than the model's.
        """
        wanted = (*self.config.image_hw, self.config.channels)
        if images_BHWC.dtype != torch.uint8 or tuple(images_BHWC.shape[1:]) != wanted:
            raise ValueError(
                f"images are {images_BHWC.dtype} {tuple(images_BHWC.shape)}; the encoder wants torch.uint8 "
                f"[B, {wanted[0]}, {wanted[1]}, {wanted[2]}] (channels last); images that are normalised go to "
                "encoder.encode, and load_encoder(path, image_size=...) makes an encoder for another size"
            )
        x_BCHW = images_BHWC.permute(0, 3, 1, 2).to(torch.float32) / 255
        return ((x_BCHW - self.mean) / self.std).to(self.pos_embed.dtype)

    def encode(self, images_BCHW: Tensor) -> Features:
        """Normalised images [B, C, H, W], as timm and transformers take them -> features."""
        tokens_BLD = self.patch_embed.proj(images_BCHW).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        cls_B1D = (self.cls_token + self.pos_embed[:, :1]).expand(tokens_BLD.shape[0], -1, -1)
        x_BND = torch.cat([cls_B1D, tokens_BLD], dim=1)
        for block in self.blocks:
            x_BND = block(x_BND)
        x_BND = self.norm(x_BND)
        return Features(x_BND[:, 0], x_BND[:, 1:])
