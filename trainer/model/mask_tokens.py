"""Defines the models whose encoder sees mask tokens: SimMIM, BEiT's task, and Table 1c of He et al. 2021.

MAE's encoder sees only the visible patches. In these models it sees every position, with a learned token at the masked
ones, and costs about three times the FLOPs at a mask ratio of 75 % (docs/performance.md).

    MaskTokenAutoencoder   MAE with mask tokens in the encoder, otherwise unchanged (Table 1c: "encoder w/ [M]")
    SimMIM                 no decoder: one linear layer on the encoder's masked tokens, L1 on pixels (Xie et al. 2022)

SimMIM with a token target is BEiT's task (Bao et al. 2021). Both use MAE's ViT here: fixed sin-cos positions, without
the relative position bias and LayerScale of the published SimMIM and BEiT encoders.

Shapes: B images, L patches, K kept, M = L - K masked, D encoder width, E decoder width, T target width.
"""

import torch
from torch import Tensor, nn

from patchmill.kernels.gather import gather_patches, gather_tokens
from patchmill.kernels.unshuffle import unshuffle
from patchmill.pipeline.plan.masks import MaskPlan
from patchmill.trainer.config.model import ModelConfig
from patchmill.trainer.model.mae import MAEOutput, MaskedAutoencoder, with_loss
from patchmill.trainer.model.targets import build_target
from patchmill.trainer.model.vit import VisionTransformer


class MaskTokenAutoencoder(MaskedAutoencoder):
    """MAE with the mask tokens (width D) in the encoder; the decoder gets all tokens from the encoder."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.mask_token = nn.Parameter(nn.init.normal_(torch.empty(1, 1, config.embed_dim), std=0.02))

    def forward(self, images_BHWC: Tensor, plan: MaskPlan) -> MAEOutput:
        """Returns loss, prediction [B, M, T] and latent [B, 1 + L, D], row by row; see MaskedAutoencoder.forward."""
        self.check(images_BHWC, plan)
        latent_BND = encode_with_mask_tokens(self, self.mask_token, images_BHWC, plan)
        pred_BMT = self.decode(latent_BND, plan)
        return with_loss(self, latent_BND, pred_BMT, images_BHWC, plan)

    def decode(self, latent_BND: Tensor, plan: MaskPlan) -> Tensor:
        """Features [B, 1 + L, D] -> predicted values of the masked patches [B, M, T], in mask order."""
        return self.predict(self.decoder_embed(latent_BND) + self.positions(self.decoder_pos_embed), plan.ids_mask)


class SimMIM(VisionTransformer):
    """An encoder with mask tokens and a one-layer head (Xie et al. 2022)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim))
        self.decoder_pred = nn.Linear(config.embed_dim, config.pred_dim)
        self.target = build_target(config)

        self.initialise()

    def forward(self, images_BHWC: Tensor, plan: MaskPlan) -> MAEOutput:
        """Returns loss, prediction [B, M, T] and latent [B, 1 + L, D], row by row; see MaskedAutoencoder.forward."""
        self.check(images_BHWC, plan)
        latent_BND = encode_with_mask_tokens(self, self.mask_token, images_BHWC, plan)
        pred_BMT = self.decoder_pred(gather_tokens(latent_BND, plan.ids_mask, num_prefix=1))
        return with_loss(self, latent_BND, pred_BMT, images_BHWC, plan)


def encode_with_mask_tokens(
    model: VisionTransformer, mask_token_11D: Tensor, images_BHWC: Tensor, plan: MaskPlan
) -> Tensor:
    """uint8 images -> normed features [B, 1 + L, D]. Reads and embeds only the visible patches."""
    c = model.config
    dtype = model.pos_embed.dtype
    patches_BKP = gather_patches(images_BHWC, plan.ids_keep, c.patch_size, c.mean, c.std, dtype)
    tokens_BKD = model.patch_embed(patches_BKP).to(dtype)  # positions are added unrounded, as in MAE's encoder
    positions_LD = model.positions(model.pos_embed)[0, 1:]
    return model.transform(unshuffle(tokens_BKD, mask_token_11D.view(-1), positions_LD, plan.ids_restore))
