"""Draws the random order of each image's patches: ids_keep, ids_mask and ids_restore.

MAE's random mask is a random order of the patches: the first K are kept, the rest are masked. The published code sorts
uniform noise twice over the batch; here every image's keys are a pure function of (seed, epoch, sample, repeat), sorted
in registers by one program, which writes the order, its split and its inverse. Block masks (BEiT's rectangles) and grid
masks give the same three tensors.

Example, L = 4 and K = 1. The keys 30, 10, 20, 40 order the patches 1, 2, 0, 3, so that

    ids_keep    [1]            ids_mask    [2, 0, 3]
    ids_restore [2, 0, 1, 3]   where patch l stands in the order; it is kept if that is below K

Shapes: B images, L patches, K kept, M = L - K masked. All ids are int32, on the device of the sample ids.
"""

import functools
import math

import numpy as np
import torch
from torch import Tensor

from patchmill.kernels import reference
from patchmill.kernels.arguments import check_tensor
from patchmill.kernels.backend import active_backend, register_as_data_movement
from patchmill.kernels.philox import seed_key
from patchmill.kernels.reference import LARGE_ID_BITS, MAX_PATCHES, MaskIndices, split_order

# BEiT, masking_generator.py: smallest rectangle, and the range of its aspect ratio.
MIN_BLOCK_PATCHES, MIN_BLOCK_ASPECT = 16, 0.3
BLOCK_ROUNDS = 48  # rectangles tried; what they leave open is filled with random patches, so that K is met exactly
ASPECT_STEPS = 64
BLOCK_STREAM_OFFSET = 1 << 16  # rectangle t takes block 2**16 + t of the mask stream; keys take those below 2**10


@torch.library.custom_op("patchmill::mask_indices", mutates_args=())
def _mask_indices(
    sample_ids: Tensor, repeats: Tensor | None, key_0: int, key_1: int, epoch: int, num_patches: int, num_keep: int
) -> tuple[Tensor, Tensor, Tensor]:
    if active_backend(sample_ids) == "triton":
        from patchmill.kernels.permute_triton import mask_indices as launch

        return launch(sample_ids, repeats, (key_0, key_1), epoch, num_patches, num_keep)
    return reference.mask_indices(sample_ids, repeats, (key_0, key_1), epoch, num_patches, num_keep)


@_mask_indices.register_fake
def _(
    sample_ids: Tensor, repeats: Tensor | None, key_0: int, key_1: int, epoch: int, num_patches: int, num_keep: int
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = (num_keep, num_patches - num_keep, num_patches)
    keep, mask, restore = (sample_ids.new_empty(sample_ids.shape[0], size, dtype=torch.int32) for size in sizes)
    return keep, mask, restore


register_as_data_movement(torch.ops.patchmill.mask_indices)


def mask_indices(
    seed: int, epoch: int, sample_ids_B: Tensor, num_patches: int, num_keep: int, repeats_B: Tensor | None = None
) -> MaskIndices:
    """Draw a random mask per image: every order of the patches is equally likely.

    Args:
        seed: 64-bit run seed.
        epoch: epoch number.
        sample_ids_B: int64 sample indices (the low 32 bits count).
        num_patches: L, at most 4096.
        num_keep: K.
        repeats_B: int64 repeat numbers of repeated augmentation; None means 0.

    Returns:
        ids_keep `[B, K]`, ids_mask `[B, L - K]`, ids_restore `[B, L]`, int32.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, device or range, named.
    """
    _check_samples(sample_ids_B, repeats_B, num_patches, num_keep)
    return torch.ops.patchmill.mask_indices(sample_ids_B, repeats_B, *seed_key(seed), epoch, num_patches, num_keep)


def block_mask_indices(
    seed: int,
    epoch: int,
    sample_ids_B: Tensor,
    grid_hw: tuple[int, int],
    num_keep: int,
    repeats_B: Tensor | None = None,
) -> MaskIndices:
    """Mask rectangles (BEiT, Bao et al. 2021, algorithm 1) until M patches are masked; K is met exactly.

    Rectangle t has an area between 16 patches and what is still to mask, and an aspect ratio between 0.3 and 1 / 0.3,
    uniform in its logarithm. It is taken if it masks something new and not more than is left. What 48 rectangles leave
    open (rarely more than a few patches) is filled at random. Arguments and results as mask_indices, for a grid of
    (rows, columns).
    """
    rows, columns = grid_hw
    num_patches = rows * columns
    _check_samples(sample_ids_B, repeats_B, num_patches, num_keep)
    device, key = sample_ids_B.device, seed_key(seed)
    blocks = BLOCK_STREAM_OFFSET + torch.arange(BLOCK_ROUNDS, device=device)
    draws_BT4 = reference.mask_words(sample_ids_B, repeats_B, key, epoch, blocks)
    sides_A2 = _block_sides(rows, columns, device)
    row_L = torch.arange(num_patches, device=device) // columns
    column_L = torch.arange(num_patches, device=device) % columns
    masked_BL = torch.zeros(sample_ids_B.shape[0], num_patches, dtype=torch.bool, device=device)
    # The rounds depend on each other, the images do not; every step is integer arithmetic, equal on every device.
    for draws_B4 in draws_BT4.unbind(1):
        area_word, aspect_word, top_word, left_word = draws_B4[:, :, None].unbind(1)
        left_to_mask = (num_patches - num_keep) - masked_BL.sum(1, keepdim=True)
        smallest = left_to_mask.clamp(max=MIN_BLOCK_PATCHES)
        area = smallest + _below(area_word, left_to_mask - smallest + 1)
        sides = sides_A2[area * ASPECT_STEPS + _below(aspect_word, ASPECT_STEPS)]
        height, width = sides[..., 0], sides[..., 1]
        top, left = _below(top_word, rows - height + 1), _below(left_word, columns - width + 1)
        inside = (row_L >= top) & (row_L < top + height) & (column_L >= left) & (column_L < left + width)
        new_BL = inside & ~masked_BL
        masked_BL |= new_BL & (new_BL.sum(1, keepdim=True) <= left_to_mask)
    keys_BL = reference.mask_keys(sample_ids_B, repeats_B, key, epoch, num_patches).long()
    # Unmasked patches sort before masked ones, in random order, so that the first K of the order are exactly K patches.
    order_BL = (keys_BL + (masked_BL.long() << (LARGE_ID_BITS + 33))).argsort(dim=1)
    return split_order(order_BL, num_keep)


def square_mask_indices(
    seed: int,
    epoch: int,
    sample_ids_B: Tensor,
    grid_hw: tuple[int, int],
    side: int,
    repeats_B: Tensor | None = None,
) -> MaskIndices:
    """Mask one square of side x side patches at a random place, every place equally likely (SimMIM, section 3.2).

    Kept and masked patches stand row by row. Arguments and results as mask_indices, with K = L - side ** 2.
    """
    rows, columns = grid_hw
    num_keep = rows * columns - side**2
    _check_samples(sample_ids_B, repeats_B, rows * columns, num_keep)
    blocks = BLOCK_STREAM_OFFSET + torch.arange(1, device=sample_ids_B.device)
    draws_B4 = reference.mask_words(sample_ids_B, repeats_B, seed_key(seed), epoch, blocks)[:, 0]
    top_B1, left_B1 = _below(draws_B4[:, 2:3], rows - side + 1), _below(draws_B4[:, 3:], columns - side + 1)
    ids_L = torch.arange(rows * columns, device=sample_ids_B.device)
    row_L, column_L = ids_L // columns, ids_L % columns
    is_masked_BL = (row_L >= top_B1) & (row_L < top_B1 + side) & (column_L >= left_B1) & (column_L < left_B1 + side)
    return split_order(is_masked_BL.to(torch.int8).argsort(dim=1, stable=True), num_keep)


def grid_mask_indices(sample_ids_B: Tensor, grid_hw: tuple[int, int]) -> MaskIndices:
    """Keep the patches on even rows and even columns, in order; the same for every image.

    Returns:
        As mask_indices, with K = ceil(rows / 2) * ceil(columns / 2).
    """
    rows, columns = grid_hw
    num_keep = -(-rows // 2) * -(-columns // 2)
    _check_samples(sample_ids_B, None, rows * columns, num_keep)
    ids_L = torch.arange(rows * columns, device=sample_ids_B.device)
    is_masked_L = (ids_L // columns % 2 == 1) | (ids_L % columns % 2 == 1)
    order_L = is_masked_L.to(torch.int8).argsort(stable=True)
    return split_order(order_L.expand(sample_ids_B.shape[0], -1), num_keep)


def _check_samples(sample_ids_B: Tensor, repeats_B: Tensor | None, num_patches: int, num_keep: int) -> None:
    check_tensor("sample_ids", sample_ids_B, ndim=1, dtypes=(torch.int64,))
    if repeats_B is not None:
        check_tensor("repeats", repeats_B, ndim=1, dtypes=(torch.int64,), device=sample_ids_B.device)
        if repeats_B.shape != sample_ids_B.shape:
            raise ValueError(f"repeats has {repeats_B.shape[0]} entries for {sample_ids_B.shape[0]} sample_ids")
    if not 1 <= num_patches <= MAX_PATCHES:
        raise ValueError(f"num_patches must be 1 to {MAX_PATCHES}, got {num_patches}: use larger patches")
    if not 1 <= num_keep <= num_patches:
        raise ValueError(f"num_keep must be 1 to num_patches = {num_patches}, got {num_keep}")


def _below(word: Tensor, bound: Tensor | int) -> Tensor:
    """Scale a 32-bit word to an integer in [0, bound): exact, with a bias below bound / 2**32."""
    return (word * bound) >> 32


@functools.lru_cache(maxsize=16)
def _block_sides(rows: int, columns: int, device: torch.device) -> Tensor:
    """Tabulate the sides of a rectangle by area and aspect step: int64 `[(L + 1) * ASPECT_STEPS, 2]`.

    A table made once on the host keeps exponentials and roots, whose last digit differs between devices, out of the
    draw.
    """
    steps = (np.arange(ASPECT_STEPS) + 0.5) / ASPECT_STEPS
    aspect = np.exp((2 * steps - 1) * -math.log(MIN_BLOCK_ASPECT))
    area = np.arange(rows * columns + 1)[:, None]
    heights = np.clip(np.rint(np.sqrt(area * aspect)), 1, rows)
    widths = np.clip(np.rint(np.sqrt(area / aspect)), 1, columns)
    return torch.from_numpy(np.stack([heights, widths], -1).astype(np.int64)).view(-1, 2).to(device)
