"""Defines a model with a cross-attention decoder, after CrossMAE. It is a different model from MAE.

MAE's decoder runs self-attention over all positions and takes more than half of ViT-B's FLOPs. Here the mask tokens
attend to the visible patches and never to each other (Fu et al. 2024, arXiv 2401.14391). A block is cross-attention
from M mask tokens to K visible features, then an MLP. Keys and values come straight from the encoder's features.

Two parts of CrossMAE are left out: blocks that see a learned mixture of all encoder blocks (here they see the last
one), and predicting only a share of the masked patches (here all are predicted).

Shapes: B images, K kept, M masked, D encoder width, E decoder width, H heads, d = E / H, T target width.
"""

import torch
from torch import Tensor, nn

from patchmill.pipeline.plan.masks import MaskPlan
from patchmill.trainer.config.model import ModelConfig
from patchmill.trainer.model.attention import attention
from patchmill.trainer.model.mae import MAEOutput, with_loss
from patchmill.trainer.model.targets import build_target
from patchmill.trainer.model.vit import LAYER_NORM_EPS, Mlp, VisionTransformer, sincos_positions


class CrossAttention(nn.Module):
    """Multi-head attention from tokens of one width to features of another."""

    def __init__(self, dim: int, context_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(context_dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BME: Tensor, context_BND: Tensor) -> Tensor:
        """Queries [B, M, E] and features [B, N, D] -> [B, M, E]."""
        B, M, E = x_BME.shape
        d = E // self.num_heads
        q_BHMd = self.q(x_BME).view(B, M, self.num_heads, d).transpose(1, 2)
        k_BHNd, v_BHNd = self.kv(context_BND).view(B, -1, 2, self.num_heads, d).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(attention(q_BHMd, k_BHNd, v_BHNd).transpose(1, 2).reshape(B, M, E))


class CrossBlock(nn.Module):
    """Pre-norm block: x + attention(norm(x), context), then x + mlp(norm(x))."""

    def __init__(self, dim: int, context_dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = CrossAttention(dim, context_dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x_BME: Tensor, context_BND: Tensor) -> Tensor:
        """[B, M, E] and the encoder's features -> [B, M, E]."""
        x = x_BME + self.attn(self.norm1(x_BME), context_BND)
        return x + self.mlp(self.norm2(x))


class CrossMAE(VisionTransformer):
    """MAE's encoder with a decoder of cross-attention only."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        c = config
        self.mask_token = nn.Parameter(torch.zeros(1, 1, c.decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_positions(c.decoder_embed_dim, c.grid_hw), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            CrossBlock(c.decoder_embed_dim, c.embed_dim, c.decoder_num_heads, c.mlp_ratio)
            for _ in range(c.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(c.decoder_embed_dim, eps=LAYER_NORM_EPS)
        self.decoder_pred = nn.Linear(c.decoder_embed_dim, c.pred_dim)
        self.target = build_target(c)

        self.initialise()

    def forward(self, images_BHWC: Tensor, plan: MaskPlan) -> MAEOutput:
        """Returns loss, prediction [B, M, T] and latent [B, 1 + K, D]; see MaskedAutoencoder.forward."""
        self.check(images_BHWC, plan)
        latent_BND = self.encode(images_BHWC, plan.ids_keep)
        pred_BMT = self.decode(latent_BND, plan)
        return with_loss(self, latent_BND, pred_BMT, images_BHWC, plan)

    def decode(self, latent_BND: Tensor, plan: MaskPlan) -> Tensor:
        """Features [B, 1 + K, D] -> predicted values of the masked patches [B, M, T], in mask order."""
        x_BME = self.mask_token + self.positions(self.decoder_pos_embed)[0, 1:][plan.ids_mask]
        for block in self.decoder_blocks:
            x_BME = block(x_BME, latent_BND)
        return self.decoder_pred(self.decoder_norm(x_BME))
