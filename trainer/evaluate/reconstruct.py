"""Reconstructs masked images with a pretrained model (He et al. 2021, Figure 2)."""

import torch
from torch import Tensor

from patchmill.kernels.gather import gather_patches
from patchmill.pipeline.plan.masks import MaskPlan
from patchmill.trainer.model.vit import VisionTransformer

GREY = 128
"""grey level of a masked patch"""


@torch.no_grad()
def reconstruct(model: VisionTransformer, images_BHWC: Tensor, plan: MaskPlan) -> tuple[Tensor, Tensor]:
    """Returns the masked images and their reconstructions (visible patches unchanged, masked ones predicted).

    A model of normalised pixels does not predict a patch's mean and standard deviation; they come from the true patch,
    as in the published demo. Brightness and contrast of its patches are therefore given, not predicted.

    Args:
        images_BHWC: uint8.
        plan: which patches the model sees.
    Returns:
        two uint8 tensors [B, H, W, C].
    Raises:
        ValueError: the model predicts dvae tokens, which cannot be drawn.
    """
    c = model.config
    pred_BMP = model.target.patches(model(images_BHWC, plan).pred, images_BHWC, plan.ids_mask)
    unit = ((0.0,) * c.channels, (1.0,) * c.channels)
    per_value = c.patch_size**2
    mean, std = (torch.tensor(v, device=pred_BMP.device).repeat(per_value) for v in (c.mean, c.std))
    levels_BMP = ((pred_BMP * std + mean) * 255).round().clamp(0, 255)
    visible_BKP = gather_patches(images_BHWC, plan.ids_keep, c.patch_size, *unit, torch.float32) * 255
    hidden_BMP = torch.full_like(levels_BMP, GREY)
    return tuple(
        _unpatchify(torch.cat([visible_BKP.round(), filling], dim=1), plan, model.grid_hw, c.patch_size)
        for filling in (hidden_BMP, levels_BMP)
    )  # type: ignore[return-value]


def _unpatchify(patches_BLP: Tensor, plan: MaskPlan, grid_hw: tuple[int, int], patch_size: int) -> Tensor:
    """Puts patches in shuffled order (kept, then masked) back into uint8 images [B, H, W, C]."""
    order = plan.ids_restore.long()[..., None].expand(-1, -1, patches_BLP.shape[-1])
    rows, across = grid_hw
    grid = patches_BLP.gather(1, order).view(len(patches_BLP), rows, across, patch_size, patch_size, -1)
    return grid.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2).to(torch.uint8)
