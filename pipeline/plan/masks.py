"""Draws which patches of each image are kept and which are masked.

Legend: B images, L patches, K kept, M masked (K + M = L). `ids_restore` undoes the concatenation of kept and masked:

    L = 4, ids_keep = [2, 0], ids_mask = [3, 1]   ->   ids_restore = [1, 3, 0, 2]
    patch 0 is at place 1 of [2, 0, 3, 1], patch 1 at place 3, patch 2 at place 0, patch 3 at place 2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from patchmill.kernels.permute import block_mask_indices, grid_mask_indices, mask_indices, square_mask_indices
from patchmill.kernels.reference import MaskIndices
from patchmill.pipeline.config import MaskConfig, kept_patches


@dataclass(frozen=True)
class MaskPlan:
    """Kept and masked patches of every image of a batch; all int32, on one device.

    Attributes:
        ids_keep: `[B, K]`, in the encoder's order.
        ids_mask: `[B, M]`, in the order of the prediction.
        ids_restore: `[B, L]`, the place of each patch in the concatenation of the two.
    """

    ids_keep: Tensor
    ids_mask: Tensor
    ids_restore: Tensor

    @classmethod
    def from_noise(cls, noise_BL: Tensor, mask_ratio: float) -> "MaskPlan":
        """Applies the published rule: keeps the K = int(L * (1 - mask_ratio)) patches with the smallest noise.

        Args:
            noise_BL: one number a patch; a stable sort breaks ties by patch number.
        """
        num_keep = kept_patches(noise_BL.shape[1], mask_ratio)
        ids_shuffle_BL = torch.argsort(noise_BL, dim=1, stable=True)
        ids_restore_BL = torch.argsort(ids_shuffle_BL, dim=1)
        ids_shuffle_BL = ids_shuffle_BL.to(torch.int32)
        return cls(
            ids_shuffle_BL[:, :num_keep].contiguous(),
            ids_shuffle_BL[:, num_keep:].contiguous(),
            ids_restore_BL.to(torch.int32),
        )

    @classmethod
    def draw(
        cls,
        config: MaskConfig,
        *,
        seed: int,
        epoch: int,
        sample_ids_B: Tensor,
        grid_hw: tuple[int, int],
        repeats_B: Tensor | None = None,
    ) -> "MaskPlan":
        """Draws masks on the device of `sample_ids_B`, as a pure function of (seed, epoch, sample, repeat).

        Args:
            sample_ids_B: int64 `[B]`.
            grid_hw: patches in a column and in a row; L is their product.
            repeats_B: int64 `[B]`, number of the repeat, for repeated augmentation; None means zeros.
        """
        cells_hw = config.cells(grid_hw)
        num_cells = cells_hw[0] * cells_hw[1]
        num_keep = kept_patches(num_cells, config.ratio)
        if config.kind == "grid":
            ids = grid_mask_indices(sample_ids_B, cells_hw)
        elif config.kind == "block":
            ids = block_mask_indices(seed, epoch, sample_ids_B, cells_hw, num_keep, repeats_B)
        elif config.kind == "square":
            side = config.square_side(grid_hw)
            ids = square_mask_indices(seed, epoch, sample_ids_B, cells_hw, side, repeats_B)
        else:
            ids = mask_indices(seed, epoch, sample_ids_B, num_cells, num_keep, repeats_B)
        return cls(*(ids if config.cell == 1 else _patches_of(ids, cells_hw, config.cell)))

    def to(self, device: torch.device | str) -> "MaskPlan":
        """Copies the plan to another device."""
        return MaskPlan(
            *(ids.to(device, non_blocking=True) for ids in (self.ids_keep, self.ids_mask, self.ids_restore))
        )


def _patches_of(ids: MaskIndices, cells_hw: tuple[int, int], cell: int) -> MaskIndices:
    """Turns indices of cells into indices of their patches; a cell's patches are consecutive, row by row.

    Example: one row of two cells of 2 x 2 patches, [0 1 | 2 3 / 4 5 | 6 7]; keeping cell 1 keeps patches 2, 3, 6, 7.
    """
    rows, columns = cells_hw
    inner = torch.arange(cell, dtype=torch.int32, device=ids[0].device)
    place_11 = inner[:, None] * cell + inner  # of a patch within its cell

    def patches(cells_BN: Tensor) -> Tensor:
        top_BN1, left_BN1 = cells_BN[..., None] // columns * cell, cells_BN[..., None] % columns * cell
        return ((top_BN1 + inner)[..., None] * (columns * cell) + (left_BN1 + inner)[..., None, :]).flatten(1)

    keep_BK, mask_BM, restore_BL = ids
    restore = restore_BL.view(-1, rows, 1, columns, 1) * cell**2 + place_11[:, None]
    return patches(keep_BK), patches(mask_BM), restore.flatten(1)
