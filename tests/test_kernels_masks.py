"""Mask indices: equal to the NumPy reference, uniform over permutations, exact in number; block and grid masks."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from benchmarks.check_kernels import check_mask_indices
from patchmill.kernels import permute
from patchmill.kernels.permute import block_mask_indices, grid_mask_indices, mask_indices
from patchmill.kernels.philox import STREAM_MASK, draw_numpy
from patchmill.kernels.reference import split_order

# The draws are fixed by their seed, so that these tests cannot flicker; a biased shuffle falls far below.
SMALLEST_P = 1e-4


def assert_is_plan(ids_keep, ids_mask, ids_restore):
    order = torch.cat([ids_keep, ids_mask], dim=1)
    places = torch.arange(order.shape[1], dtype=torch.int32).expand_as(order)
    assert torch.equal(order.sort(dim=1).values, places)
    assert torch.equal(order.gather(1, ids_restore.long()), places)
    assert all(t.is_contiguous() and t.dtype == torch.int32 for t in (ids_keep, ids_mask, ids_restore))


def test_mask_indices_equal_the_numpy_reference():
    check_mask_indices("cpu")


def test_split_order_example():
    keep, mask, restore = split_order(torch.tensor([[30, 10, 20, 40]]).argsort(1), 1)
    assert (keep.tolist(), mask.tolist(), restore.tolist()) == ([[1]], [[2, 0, 3]], [[2, 0, 1, 3]])


@pytest.mark.parametrize(("num_patches", "num_keep"), [(1, 1), (2, 1), (196, 49), (256, 255), (1024, 9), (4096, 64)])
def test_mask_indices_are_a_plan(num_patches, num_keep):
    plan = mask_indices(1, 2, torch.arange(7), num_patches, num_keep)
    assert [t.shape for t in plan] == [(7, num_keep), (7, num_patches - num_keep), (7, num_patches)]
    assert_is_plan(*plan)


def test_a_mask_is_a_function_of_seed_epoch_sample_and_repeat_alone():
    samples = torch.arange(64)
    base = mask_indices(1, 2, samples, 196, 49)[0]
    picked = mask_indices(1, 2, samples[[9, 3]], 196, 49)[0]
    assert torch.equal(picked, base[[9, 3]])
    others: list[tuple[int, int, torch.Tensor, torch.Tensor | None]] = [
        (2, 2, samples, None),
        (1 + 2**32, 2, samples, None),
        (1, 3, samples, None),
        (1, 2, samples + 64, None),
    ]
    others.append((1, 2, samples, torch.ones_like(samples)))
    for seed, epoch, ids_B, repeats_B in others:
        other = mask_indices(seed, epoch, ids_B, 196, 49, repeats_B)[0]
        assert (other != base).any(dim=1).all()


@pytest.mark.parametrize("num_patches", [4, 5])
def test_every_permutation_is_equally_likely(num_patches):
    draws = 2000 * math.factorial(num_patches)
    restore = mask_indices(11, 0, torch.arange(draws), num_patches, 1)[2].numpy()
    codes = restore @ (num_patches ** np.arange(num_patches))
    counts = np.unique(codes, return_counts=True)[1]
    assert len(counts) == math.factorial(num_patches)
    statistic = ((counts - 2000) ** 2 / 2000).sum()
    assert SMALLEST_P < chi2.sf(statistic, len(counts) - 1) < 1 - SMALLEST_P


def test_every_patch_is_equally_likely_in_every_place():
    draws, size = 8000, 196
    restore = mask_indices(12, 0, torch.arange(draws), size, 49)[2].numpy()
    counts = np.bincount((restore + size * np.arange(size)).ravel(), minlength=size * size)
    statistic = ((counts - draws / size) ** 2 / (draws / size)).sum()
    assert SMALLEST_P < chi2.sf(statistic, (size - 1) ** 2) < 1 - SMALLEST_P


@pytest.mark.parametrize("epochs", [False, True])
def test_every_pair_of_patches_is_in_order_half_of_the_time(epochs):
    """Over samples of one epoch, and over epochs of one sample: the counter words must mix equally well."""
    draws, size = 3000, 196
    if epochs:
        plans = [mask_indices(13, epoch, torch.tensor([77]), size, 49)[2] for epoch in range(draws)]
        restore = torch.cat(plans).short()
    else:
        restore = mask_indices(13, 0, torch.arange(draws), size, 49)[2].short()
    before = sum((part[:, :, None] < part[:, None, :]).sum(0) for part in restore.split(500))
    z = ((before - draws / 2) / math.sqrt(draws / 4))[torch.triu(torch.ones(size, size), 1).bool()]
    assert z.abs().max() < 5.5  # 19,110 pairs: beyond 5.5 deviations once in 1,400 seeds
    assert abs(z.square().mean() - 1) < 0.1


def block_mask_by_the_book(seed, epoch, sample, grid_hw, num_keep):
    """One image of BEiT's algorithm with the draws of our counters, and the order of our keys."""
    rows, columns = grid_hw
    sides = permute._block_sides(rows, columns, torch.device("cpu")).numpy()
    masked, to_mask = np.zeros(grid_hw, dtype=bool), rows * columns - num_keep

    def below(word, bound):
        return int(word) * bound >> 32

    for t in range(permute.BLOCK_ROUNDS):
        words = draw_numpy(seed, STREAM_MASK, (1 << 16) + t, sample, epoch)
        left_to_mask = to_mask - int(masked.sum())
        smallest = min(16, left_to_mask)
        area = smallest + below(words[0], left_to_mask - smallest + 1)
        height, width = (int(side) for side in sides[area * 64 + below(words[1], 64)])
        top, left = below(words[2], rows - height + 1), below(words[3], columns - width + 1)
        taken = masked.copy()
        taken[top : top + height, left : left + width] = True
        if taken.sum() <= to_mask:
            masked = taken
    return masked


@pytest.mark.parametrize(("grid_hw", "ratio"), [((14, 14), 0.4), ((14, 14), 0.75), ((7, 12), 0.5), ((2, 3), 0.5)])
def test_block_masks_are_rectangles_and_meet_the_ratio_exactly(grid_hw, ratio):
    size = grid_hw[0] * grid_hw[1]
    num_keep, samples = int(size * (1 - ratio)), torch.arange(60)
    plan = block_mask_indices(5, 2, samples, grid_hw, num_keep)
    assert plan[0].shape == (60, num_keep)
    assert_is_plan(*plan)
    is_masked = (plan[2] >= num_keep).view(60, *grid_hw).numpy()
    filled = 0
    for sample in range(60):
        rectangles = block_mask_by_the_book(5, 2, sample, grid_hw, num_keep)
        assert is_masked[sample][rectangles].all()
        filled += is_masked[sample].sum() - rectangles.sum()
    # BEiT leaves such patches unmasked; there must be few, or the masks would not be blocks.
    assert filled / 60 < 0.03 * size


def test_block_mask_order_is_random_within_its_halves():
    keep = block_mask_indices(5, 2, torch.arange(400), (14, 14), 49)[0].float()
    assert abs((keep[:, :-1] < keep[:, 1:]).float().mean() - 0.5) < 0.02


def test_grid_masks_keep_even_rows_and_columns():
    plan = grid_mask_indices(torch.arange(2), (3, 4))
    assert_is_plan(*plan)
    assert plan[0].tolist() == [[0, 2, 8, 10]] * 2
    assert plan[1].tolist() == [[1, 3, 4, 5, 6, 7, 9, 11]] * 2
