"""Defines the masked autoencoder of He et al. 2021.

It computes only what the loss needs. The encoder (vit.py) sees the visible patches, gathered and normalised straight
from the uint8 image. The queries of the last decoder block and the head run on masked tokens only. The target is never
written to memory. The numbers are those of the published implementation (tests/test_golden_mae.py).

Shapes: B images, L patches, K kept, M = L - K masked, D encoder width, E decoder width, T values predicted per patch.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from patchmill.kernels.unshuffle import unshuffle
from patchmill.pipeline.plan.masks import MaskPlan
from patchmill.trainer.config.model import ModelConfig
from patchmill.trainer.model.targets import build_target
from patchmill.trainer.model.uniformity import add_uniformity
from patchmill.trainer.model.vit import LAYER_NORM_EPS, Block, VisionTransformer, sincos_positions


class MAEOutput(NamedTuple):
    """The result of a forward pass."""

    loss: Tensor
    """scalar fp32"""
    pred: Tensor
    """[B, M, T] in mask order; T depends on the target (targets.py): for pixels, the values of a patch"""
    latent: Tensor
    """[B, 1 + K, D]: class token, kept patches in kept order; with mask tokens in the encoder [B, 1 + L, D]"""
    uniformity: Tensor | None = None
    """scalar fp32, U-MAE's term without its weight, which the loss includes; None for a model without it"""


class MaskedAutoencoder(VisionTransformer):
    """Asymmetric encoder-decoder of He et al. 2021, section 3, with the published parameter names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        c = config
        self.decoder_embed = nn.Linear(c.embed_dim, c.decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, c.decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_positions(c.decoder_embed_dim, c.grid_hw), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            Block(c.decoder_embed_dim, c.decoder_num_heads, c.mlp_ratio) for _ in range(c.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(c.decoder_embed_dim, eps=LAYER_NORM_EPS)
        self.decoder_pred = nn.Linear(c.decoder_embed_dim, c.pred_dim)
        self.target = build_target(c)

        self.initialise()

    def forward(self, images_BHWC: Tensor, plan: MaskPlan) -> MAEOutput:
        """Computes loss, prediction and latent of a batch.

        Args:
            images_BHWC: uint8 [B, H, W, C].
            plan: the patches to keep, on the same device.
        Raises:
            ValueError: images or plan do not have the model's size.
        """
        self.check(images_BHWC, plan)
        latent_BND = self.encode(images_BHWC, plan.ids_keep)
        pred_BMT = self.decode(latent_BND, plan)
        return with_loss(self, latent_BND, pred_BMT, images_BHWC, plan)

    def decode(self, latent_BND: Tensor, plan: MaskPlan) -> Tensor:
        """Features [B, 1 + K, D] -> predicted values of the masked patches [B, M, T], in mask order."""
        x_BNE = self.decoder_embed(latent_BND)
        positions_NE = self.positions(self.decoder_pos_embed)[0]
        x_BNE = unshuffle(x_BNE, self.mask_token.view(-1), positions_NE, plan.ids_restore, num_prefix=1)
        return self.predict(x_BNE, plan.ids_mask)

    def predict(self, x_BNE: Tensor, ids_mask_BM: Tensor) -> Tensor:
        """Decoder tokens [B, 1 + L, E], row by row -> predicted values of the masked patches [B, M, T]."""
        for block in self.decoder_blocks[:-1]:
            x_BNE = block(x_BNE)
        x_BME = self.decoder_blocks[-1](x_BNE, ids_mask_BM + 1)
        return self.decoder_pred(self.decoder_norm(x_BME))


def with_loss(
    model: VisionTransformer, latent_BND: Tensor, pred_BMT: Tensor, images_BHWC: Tensor, plan: MaskPlan
) -> MAEOutput:
    """Computes the loss of a prediction, with the uniformity term if the model has one: the end of every forward."""
    loss = model.target(pred_BMT, images_BHWC, plan.ids_mask)
    loss, uniformity = add_uniformity(loss, latent_BND[:, 0], model.norm, model.config)
    return MAEOutput(loss, pred_BMT, latent_BND, uniformity)
