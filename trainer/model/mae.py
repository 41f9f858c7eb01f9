"""images + mask plan -> [masked autoencoder] -> loss: the model of He et al. 2021, forward on one screen.

Only what the loss needs is computed: the encoder (vit.py) sees the visible patches, gathered and normalised straight
from the uint8 image; the last decoder block's queries and the head run on masked tokens; the target is never written to
memory. The numbers are those of the published implementation (tests/test_golden_mae.py).

Shapes: B images, L patches, K kept, M = L - K masked, D encoder width, E decoder width, T values predicted of a patch.
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
    """What a forward pass gives."""

    loss: Tensor
    """scalar fp32"""
    pred: Tensor
    """[B, M, T] in mask order; T is what the target has (targets.py), a patch's values for pixels"""
    latent: Tensor
    """[B, 1 + K, D]: class token, then kept patches in kept order (with mask tokens in the encoder: all, row by row)"""
    uniformity: Tensor | None = None
    """scalar fp32, U-MAE's term before its weight; it is part of the loss. None for a model without it"""


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
        """Loss, prediction and latent of a batch.

        Args:
            images_BHWC: uint8 [B, H, W, C].
            plan: which patches are kept, on the same device.
        Raises:
            ValueError: images or plan of another size than the model's.
        """
        self.check(images_BHWC, plan)
        latent_BND = self.encode(images_BHWC, plan.ids_keep)
        pred_BMT = self.decode(latent_BND, plan)
        loss = self.target(pred_BMT, images_BHWC, plan.ids_mask)
        loss, uniformity = add_uniformity(loss, latent_BND[:, 0], self.norm, self.config)
        return MAEOutput(loss, pred_BMT, latent_BND, uniformity)

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
