"""The published MAE formulation, in plain PyTorch: what the operators must equal, and what they are timed against.

Written from the paper (He et al. 2021) and the behaviour of facebookresearch/mae: normalise the whole image, make every
patch, gather, repeat and concatenate mask tokens, and take the loss over the full sequence times the mask. Every
function is differentiable and works in the dtype of its arguments, so that float64 makes it an oracle.

Shapes: B images, H W C pixels, L patches, K kept, P values per patch, D encoder width, E decoder width.
"""

import torch
from torch import Tensor


def normalize_images(images_u8_BHWC: Tensor, mean_C: Tensor, std_C: Tensor) -> Tensor:
    """Make the float image batch `[B, C, H, W]` in the dtype of mean and std: (byte / 255 - mean) / std."""
    images = images_u8_BHWC.permute(0, 3, 1, 2).to(mean_C.dtype).div(255)
    return (images - mean_C.view(-1, 1, 1)) / std_C.view(-1, 1, 1)


def patchify(images_BCHW: Tensor, patch_size: int) -> Tensor:
    """Cut images into patches `[B, L, P]`, values in the order (row, column, channel)."""
    batch, channels, height, width = images_BCHW.shape
    grid = images_BCHW.reshape(
        batch, channels, height // patch_size, patch_size, width // patch_size, patch_size
    ).permute(0, 2, 4, 3, 5, 1)
    return grid.reshape(batch, -1, patch_size * patch_size * channels)


def random_masking(noise_BL: Tensor, num_keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort noise into ids_keep `[B, K]`, ids_restore `[B, L]` and the mask `[B, L]` (1 is removed)."""
    ids_shuffle = noise_BL.argsort(dim=1)
    ids_restore = ids_shuffle.argsort(dim=1)
    mask = torch.ones_like(noise_BL)
    mask[:, :num_keep] = 0
    return ids_shuffle[:, :num_keep], ids_restore, mask.gather(1, ids_restore)


def gather_rows(x_BLD: Tensor, ids_BK: Tensor) -> Tensor:
    """Gather rows by repeated indices: `[B, K, D]`."""
    return x_BLD.gather(1, ids_BK.long().unsqueeze(-1).repeat(1, 1, x_BLD.shape[2]))


def unshuffle(x_BNE: Tensor, mask_token_E: Tensor, pos: Tensor, ids_restore_BL: Tensor, num_prefix: int) -> Tensor:
    """Append mask tokens, restore the order, put the prefix back and add positions: `[B, num_prefix + L, E]`."""
    batch, num_tokens, width = x_BNE.shape
    missing = ids_restore_BL.shape[1] + num_prefix - num_tokens
    tokens = torch.cat([x_BNE[:, num_prefix:], mask_token_E.view(1, 1, width).repeat(batch, missing, 1)], dim=1)
    return torch.cat([x_BNE[:, :num_prefix], gather_rows(tokens, ids_restore_BL)], dim=1) + pos


def masked_loss(pred_BLP: Tensor, target_BLP: Tensor, mask_BL: Tensor, norm_pix: bool, power: int) -> Tensor:
    """Error of every patch, averaged over the masked ones; power 2 is the published loss, 1 SimMIM's."""
    if norm_pix:
        mean = target_BLP.mean(dim=-1, keepdim=True)
        variance = target_BLP.var(dim=-1, keepdim=True)
        target_BLP = (target_BLP - mean) / (variance + 1e-6) ** 0.5
    error = pred_BLP - target_BLP
    per_patch = (error**2 if power == 2 else error.abs()).mean(dim=-1)
    return (per_patch * mask_BL).sum() / mask_BL.sum()
