"""The published formulation of MAE in plain PyTorch, written for comparison: what Patchmill is measured against.

Every step is the one of the published code: the whole image is normalised and embedded, patches are chosen by two
argsorts of noise, the decoder gets mask tokens by `cat` and `gather`, every patch is predicted, and the loss of all of
them is weighted by the mask. Parameter names are the published ones, so that weights can be shared.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PublishedAttention(nn.Module):
    """Multi-head attention, written out (`explicit`) or through PyTorch's fused kernel (`sdpa`)."""

    def __init__(self, dim: int, heads: int, kind: str) -> None:
        super().__init__()
        self.heads, self.kind, self.scale = heads, kind, (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        if self.kind == "sdpa":
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1) @ v
        return self.proj(out.transpose(1, 2).reshape(B, N, D))


class PublishedMlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class PublishedBlock(nn.Module):
    """Pre-norm block."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, kind: str) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = PublishedAttention(dim, heads, kind)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = PublishedMlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PublishedPatchEmbed(nn.Module):
    """A strided convolution over the whole image."""

    def __init__(self, channels: int, patch: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class PublishedMAE(nn.Module):
    """The published masked autoencoder. `config` is a patchmill ModelConfig; `attention` is `explicit` or `sdpa`."""

    mean: Tensor
    std: Tensor

    def __init__(self, config, attention: str = "sdpa") -> None:
        super().__init__()
        c = self.config = config
        tokens = c.num_patches + 1
        self.patch_embed = PublishedPatchEmbed(c.channels, c.patch_size, c.embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, c.embed_dim), requires_grad=False)
        encoder = [PublishedBlock(c.embed_dim, c.num_heads, c.mlp_ratio, attention) for _ in range(c.depth)]
        self.blocks = nn.ModuleList(encoder)
        self.norm = nn.LayerNorm(c.embed_dim, eps=1e-6)
        E = c.decoder_embed_dim
        self.decoder_embed = nn.Linear(c.embed_dim, E)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, E))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, tokens, E), requires_grad=False)
        decoder = [PublishedBlock(E, c.decoder_num_heads, c.mlp_ratio, attention) for _ in range(c.decoder_depth)]
        self.decoder_blocks = nn.ModuleList(decoder)
        self.decoder_norm = nn.LayerNorm(E, eps=1e-6)
        self.decoder_pred = nn.Linear(E, c.patch_dim)
        mean, std = torch.tensor(c.mean).view(1, -1, 1, 1), torch.tensor(c.std).view(1, -1, 1, 1)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def patchify(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, L, p * p * C] in (row, column, channel) order."""
        c = self.config
        rows, across = c.grid_hw
        x = images.reshape(len(images), c.channels, rows, c.patch_size, across, c.patch_size)
        return torch.einsum("nchpwq->nhwpqc", x).reshape(len(images), rows * across, c.patch_dim)

    def forward(self, images_u8: Tensor, noise: Tensor, mask_ratio: float) -> Tensor:
        """uint8 [B, H, W, C] and noise [B, L] -> loss."""
        images = (images_u8.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        x = self.patch_embed(images) + self.pos_embed[:, 1:]
        B, L, D = x.shape
        kept = int(L * (1 - mask_ratio))
        ids_shuffle = torch.argsort(noise, dim=1)
        ids_restore = torch.argsort(ids_shuffle, dim=1)
        x = torch.gather(x, 1, ids_shuffle[:, :kept, None].repeat(1, 1, D))
        mask = torch.ones(B, L, device=x.device)
        mask[:, :kept] = 0
        mask = torch.gather(mask, 1, ids_restore)
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(B, -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_embed(self.norm(x))
        tokens = self.mask_token.repeat(B, L + 1 - x.shape[1], 1)
        body = torch.cat([x[:, 1:], tokens], dim=1)
        body = torch.gather(body, 1, ids_restore[..., None].repeat(1, 1, x.shape[2]))
        x = torch.cat([x[:, :1], body], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        pred = self.decoder_pred(self.decoder_norm(x))[:, 1:]
        target = self.patchify(images)
        if self.config.norm_pix_loss:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
        loss = ((pred - target) ** 2).mean(-1)
        return (loss * mask).sum() / mask.sum()
