"""Defines the vision transformer that all models share: blocks, patch embedding, positions and the encoder.

Names and arithmetic are those of the published code (timm's ViT as He et al. 2021 use it): pre-norm blocks, one `qkv`
matrix, GELU (erf), LayerNorm eps 1e-6, and sin-cos positions whose first half comes from the column.

Shapes: B images, L patches, K patches seen, N tokens, Q query tokens, S residual branches, D width, H heads, d = D / H;
for images, H W C are height, width and channels.
"""

import math
from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchmill.kernels.gather import gather_patches, gather_tokens
from patchmill.pipeline.plan.masks import MaskPlan
from patchmill.trainer.config.model import ModelConfig
from patchmill.trainer.model.attention import attention
from patchmill.trainer.model.resize_weights import interpolate_positions
from patchmill.trainer.model.targets import Target

LAYER_NORM_EPS = 1e-6


class Attention(nn.Module):
    """Multi-head self-attention. Queries may come from some tokens only; keys and values come from all."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BND: Tensor, queries_BQD: Tensor | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D], or [B, Q, D] with separate query tokens."""
        B, N, D = x_BND.shape
        heads, d = self.num_heads, D // self.num_heads
        if queries_BQD is None:
            q, k, v = self.qkv(x_BND).view(B, N, 3, heads, d).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            weight, bias = self.qkv.weight, self.qkv.bias
            q = F.linear(queries_BQD, weight[:D], bias[:D]).view(B, -1, heads, d).transpose(1, 2)
            kv = F.linear(x_BND, weight[D:], bias[D:]).view(B, N, 2, heads, d)
            k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(attention(q, k, v).transpose(1, 2).reshape(B, -1, D))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x_BND: Tensor, ids_BQ: Tensor | None = None) -> Tensor:
        """Transforms all tokens, or only the tokens `ids_BQ` (int32), which still attend to all.

        The chosen tokens get the same numbers either way; choosing them saves the work for the others.
        """
        normed_BND = self.norm1(x_BND)
        if ids_BQ is None:
            x = x_BND + self.attn(normed_BND)
        else:
            x = gather_tokens(x_BND, ids_BQ) + self.attn(normed_BND, gather_tokens(normed_BND, ids_BQ))
        return x + self.mlp(self.norm2(x))

    def with_scaled_branches(self, x_BND: Tensor, attn_B: Tensor, mlp_B: Tensor) -> Tensor:
        """The block with both residual branches of each image scaled: drop path (Huang et al. 2016)."""
        x_BND = x_BND + attn_B.to(x_BND.dtype)[:, None, None] * self.attn(self.norm1(x_BND))
        return x_BND + mlp_B.to(x_BND.dtype)[:, None, None] * self.mlp(self.norm2(x_BND))


class PatchEmbed(nn.Module):
    """Embeds patches as tokens. The weight keeps the published convolution's shape [D, C, p, p]."""

    def __init__(self, patch_size: int, channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch_size, patch_size)

    def forward(self, patches_BKP: Tensor) -> Tensor:
        """[B, K, P] patches in (row, column, channel) order -> [B, K, D]."""
        weight_DP = self.proj.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(patches_BKP, weight_DP, self.proj.bias)


class EncoderBody(nn.Module):
    """The encoder's parameters, under their published names, and their one forward pass.

    Pretraining models (below), feature extraction (encoder.py) and classifiers (evaluate/classifier.py) build on it.
    They feed it other tokens and norm or pool its output in their own ways.
    """

    cls_token: nn.Parameter
    pos_embed: nn.Parameter
    patch_embed: PatchEmbed
    blocks: nn.ModuleList

    def embed_images(self, images_BCHW: Tensor) -> Tensor:
        """Normalised images [B, C, H, W] -> tokens of all patches with their positions [B, L, D]."""
        return self.patch_embed.proj(images_BCHW).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]

    def run_blocks(self, tokens_BKD: Tensor, path_scales_SB: Tensor | None = None) -> Tensor:
        """Tokens with their positions [B, K, D] -> features before the last norm [B, 1 + K, D], class token first.

        Args:
            path_scales_SB: factor for each residual branch of each image, two branches per block; None for all ones.
        """
        # shape[0], not len(): an exported graph keeps the batch size free
        cls_B1D = (self.cls_token + self.pos_embed[:, :1]).expand(tokens_BKD.shape[0], -1, -1)
        x_BND = torch.cat([cls_B1D, tokens_BKD], dim=1)
        for number, block in enumerate(cast(Iterable[Block], self.blocks)):
            if path_scales_SB is None:
                x_BND = block(x_BND)
            else:
                attn_B, mlp_B = path_scales_SB[2 * number], path_scales_SB[2 * number + 1]
                x_BND = block.with_scaled_branches(x_BND, attn_B, mlp_B)
        return x_BND


class VisionTransformer(EncoderBody):
    """The encoder of every pretraining model. Each model adds a decoder or head, and its target."""

    mask_token: nn.Parameter
    target: Target

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = self.config = config
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.embed_dim))
        self.pos_embed = nn.Parameter(sincos_positions(c.embed_dim, c.grid_hw), requires_grad=False)
        self.patch_embed = PatchEmbed(c.patch_size, c.channels, c.embed_dim)
        self.blocks = nn.ModuleList(Block(c.embed_dim, c.num_heads, c.mlp_ratio) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.embed_dim, eps=LAYER_NORM_EPS)
        self.input_hw = c.image_hw
        """height and width of the current input images; a run with a size schedule starts with smaller ones"""

    @property
    def grid_hw(self) -> tuple[int, int]:
        """Rows and columns of patches of the current input images."""
        return self.input_hw[0] // self.config.patch_size, self.input_hw[1] // self.config.patch_size

    def positions(self, table_1ND: Tensor) -> Tensor:
        """A position table of the model, interpolated if the current input images have another grid of patches."""
        return interpolate_positions(table_1ND, self.config.grid_hw, self.grid_hw)

    def initialise(self) -> None:
        """Draws the published random weights from torch's generator. Models call it at the end of __init__."""
        self.apply(initialise)
        for token in (self.cls_token, self.mask_token):
            nn.init.normal_(token, std=0.02)

    def encode(self, images_BHWC: Tensor, ids_keep_BK: Tensor) -> Tensor:
        """uint8 images and the patches to see (int32) -> normed features [B, 1 + K, D], class token first."""
        c = self.config
        patches_BKP = gather_patches(images_BHWC, ids_keep_BK, c.patch_size, c.mean, c.std, self.pos_embed.dtype)
        return self.transform(self.patch_embed(patches_BKP) + self.positions(self.pos_embed)[0, 1:][ids_keep_BK])

    def transform(self, tokens_BKD: Tensor) -> Tensor:
        """Tokens with their positions [B, K, D] -> normed features [B, 1 + K, D], class token first."""
        return self.norm(self.run_blocks(tokens_BKD))

    def check(self, images_BHWC: Tensor, plan: MaskPlan) -> None:
        """Raises ValueError if images or plan do not have the model's size."""
        expected = (*self.input_hw, self.config.channels)
        if tuple(images_BHWC.shape[1:]) != expected:
            raise ValueError(
                f"images are {tuple(images_BHWC.shape)}; the model takes [B, {', '.join(map(str, expected))}] "
                "(height, width and channels last): set the loader's image size to the model's"
            )
        patches = self.grid_hw[0] * self.grid_hw[1]
        if plan.ids_restore.shape[1] != patches:
            raise ValueError(f"the mask plan has {plan.ids_restore.shape[1]} patches; the model has {patches}")


def sincos_positions(dim: int, grid_hw: tuple[int, int], num_prefix: int = 1) -> Tensor:
    """Computes the fixed 2-D sin-cos position table (published `get_2d_sincos_pos_embed`).

    Each row is [sin(x) | cos(x) | sin(y) | cos(y)]: the column comes first, as published. Prefix rows are zero.

    Returns:
        [1, num_prefix + L, dim] fp32, computed in fp64.
    """
    height, width = grid_hw
    omega = torch.arange(dim // 4, dtype=torch.float64) / (dim / 4)
    omega = torch.exp(-omega * math.log(10000.0))
    y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    angles = [coordinate.reshape(-1, 1) * omega for coordinate in (x, y)]
    table = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
    return torch.cat([torch.zeros(num_prefix, dim, dtype=torch.float64), table]).float()[None]


def initialise(module: nn.Module) -> None:
    """Initialises one module's parameters as published: Xavier-uniform matrices, zero biases, unit norms.

    Pass it to `nn.Module.apply`.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
