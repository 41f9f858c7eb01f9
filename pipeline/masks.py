"""sample indices -> [masks] -> model: which patches of each image are kept, and which are masked.

Legend: B images, L patches, K kept, M masked (K + M = L). `ids_restore` undoes the concatenation of kept and masked:

    L = 4, ids_keep = [2, 0], ids_mask = [3, 1]   ->   ids_restore = [1, 3, 0, 2]
    patch 0 stands at place 1 of [2, 0, 3, 1], patch 1 at place 3, patch 2 at place 0, patch 3 at place 2.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from patchmill.kernels.permute import block_mask_indices, grid_mask_indices, mask_indices
from patchmill.pipeline.choices import check_choices

MaskKind = Literal["random", "block", "grid"]
KINDS: tuple[MaskKind, ...] = get_args(MaskKind)


@dataclass(frozen=True)
class MaskConfig:
    """How patches are masked.

    Attributes:
        kind: "random" (the paper's default), "block" (one or more rectangles, as BEiT) or "grid" (keeps one of four).
        ratio: share of patches that are masked; K = int(L * (1 - ratio)). Grid masks ignore it: theirs is about 0.75.
    """

    kind: MaskKind = "random"
    ratio: float = 0.75

    def __post_init__(self) -> None:
        check_choices(self, "mask")
        if not 0.0 <= self.ratio < 1.0:
            raise ValueError(f"mask.ratio must be in [0, 1), got {self.ratio}")


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
        num_patches = grid_hw[0] * grid_hw[1]
        num_keep = kept_patches(num_patches, config.ratio)
        if config.kind == "grid":
            return cls(*grid_mask_indices(sample_ids_B, grid_hw))
        if config.kind == "block":
            return cls(*block_mask_indices(seed, epoch, sample_ids_B, grid_hw, num_keep, repeats_B))
        return cls(*mask_indices(seed, epoch, sample_ids_B, num_patches, num_keep, repeats_B))

    def to(self, device: torch.device | str) -> "MaskPlan":
        """The same plan on another device."""
        return MaskPlan(
            *(ids.to(device, non_blocking=True) for ids in (self.ids_keep, self.ids_mask, self.ids_restore))
        )


def kept_patches(num_patches: int, mask_ratio: float) -> int:
    """K = int(L * (1 - ratio)) as published, rounding of the floating-point product included."""
    return int(num_patches * (1 - mask_ratio))
