"""sample indices -> [masks] -> model: which patches of each image are kept, and which are masked.

Legend: B images, L patches, K kept, M masked (K + M = L). `ids_restore` undoes the concatenation of kept and masked:

    L = 4, ids_keep = [2, 0], ids_mask = [3, 1]   ->   ids_restore = [1, 3, 0, 2]
    patch 0 stands at place 1 of [2, 0, 3, 1], patch 1 at place 3, patch 2 at place 0, patch 3 at place 2.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from patchmill.kernels.permute import block_mask_indices, grid_mask_indices, mask_indices, square_mask_indices
from patchmill.kernels.reference import MaskIndices
from patchmill.pipeline.config import check_choices

MaskKind = Literal["random", "block", "grid", "square"]
KINDS: tuple[MaskKind, ...] = get_args(MaskKind)


@dataclass(frozen=True)
class MaskConfig:
    """How patches are masked.

    Attributes:
        kind: "random" (the paper's default), "block" (one or more rectangles, as BEiT), "grid" (keeps one of four) or
            "square" (one square at a random place, as SimMIM's).
        ratio: share of patches that are masked; K = int(L * (1 - ratio)). Grid masks ignore it: theirs is about 0.75.
            The side of a square is the whole number nearest to it.
        cell: patches on a side of the squares that are masked or kept as one, whatever the kind (SimMIM masks 32 px at
            a time: 2 patches of 16). L above is then the number of cells.
    """

    kind: MaskKind = "random"
    ratio: float = 0.75
    cell: int = 1

    def __post_init__(self) -> None:
        check_choices(self, "mask")
        if not 0.0 <= self.ratio < 1.0:
            raise ValueError(f"mask.ratio must be in [0, 1), got {self.ratio}")
        if self.cell < 1:
            raise ValueError(f"mask.cell must be at least 1, got {self.cell}")

    def cells(self, grid_hw: tuple[int, int]) -> tuple[int, int]:
        """Cells down and across. Raises ValueError where they do not fill the grid of patches."""
        rows, columns = grid_hw
        if rows % self.cell or columns % self.cell:
            raise ValueError(
                f"mask.cell {self.cell} does not divide the grid of {rows} x {columns} patches; take a divisor of both"
            )
        return rows // self.cell, columns // self.cell

    def square_side(self, grid_hw: tuple[int, int]) -> int:
        """Of square masks: cells on a side."""
        rows, columns = self.cells(grid_hw)
        return min(round(math.sqrt(self.ratio * rows * columns)), rows, columns)

    def kept(self, grid_hw: tuple[int, int]) -> int:
        """K: patches that are kept of an image with that grid. Raises ValueError as `cells`."""
        rows, columns = self.cells(grid_hw)
        if self.kind == "grid":
            kept = -(-rows // 2) * -(-columns // 2)
        elif self.kind == "square":
            kept = rows * columns - self.square_side(grid_hw) ** 2
        else:
            kept = kept_patches(rows * columns, self.ratio)
        return kept * self.cell**2


@dataclass(frozen=True)
class MaskPlan:
    """Kept and masked patches of every image of a batch; all int32, on one device.

    Attributes:
        ids_keep: `[B, K]`, in the order in which the encoder sees them.
        ids_mask: `[B, M]`, in the order of the prediction.
        ids_restore: `[B, L]`, place of each patch in the concatenation of the two.
    """

    ids_keep: Tensor
    ids_mask: Tensor
    ids_restore: Tensor

    @classmethod
    def from_noise(cls, noise_BL: Tensor, mask_ratio: float) -> "MaskPlan":
        """The published rule: sort the noise, keep the smallest K = int(L * (1 - mask_ratio)) of each row.

        Args:
            noise_BL: one number for each patch; a stable sort breaks ties by patch number.
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
        """Draws the masks of samples, on the device of `sample_ids_B`: a pure function of (seed, epoch, sample,
        repeat).

        Args:
            sample_ids_B: int64 `[B]`.
            grid_hw: patches in a column and in a row; L is their product.
            repeats_B: int64 `[B]`, number of the repeat, for repeated augmentation; None is all zeros.
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
        """The same plan on another device."""
        return MaskPlan(
            *(ids.to(device, non_blocking=True) for ids in (self.ids_keep, self.ids_mask, self.ids_restore))
        )


def _patches_of(ids: MaskIndices, cells_hw: tuple[int, int], cell: int) -> MaskIndices:
    """Indices of cells -> indices of their patches; a cell's patches stand together, row by row.

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


def kept_patches(num_patches: int, mask_ratio: float) -> int:
    """K = int(L * (1 - ratio)) as published, rounding of the floating-point product included."""
    return int(num_patches * (1 - mask_ratio))
