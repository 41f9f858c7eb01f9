"""Mask plans: the published sorting rule, and draws that depend on the sample alone."""

import pytest
import torch

from patchmill.pipeline.config import MaskConfig
from patchmill.pipeline.plan.masks import MaskPlan


def published_random_masking(noise, mask_ratio):
    """The index part of the published random_masking (models_mae.py)."""
    keep = int(noise.shape[1] * (1 - mask_ratio))
    ids_shuffle = torch.argsort(noise, dim=1)
    return ids_shuffle[:, :keep], torch.argsort(ids_shuffle, dim=1)


@pytest.mark.parametrize(("patches", "ratio"), [(196, 0.75), (49, 0.6), (4, 0.5), (10, 0.9), (196, 0.0)])
def test_noise_gives_the_published_plan(patches, ratio):
    noise = torch.rand(5, patches, generator=torch.Generator().manual_seed(patches))
    plan = MaskPlan.from_noise(noise, ratio)
    ids_keep, ids_restore = published_random_masking(noise, ratio)
    assert {plan.ids_keep.dtype, plan.ids_mask.dtype, plan.ids_restore.dtype} == {torch.int32}
    assert torch.equal(plan.ids_keep.long(), ids_keep)
    assert torch.equal(plan.ids_restore.long(), ids_restore)
    both = torch.cat([plan.ids_keep, plan.ids_mask], dim=1)
    assert torch.equal(torch.gather(both, 1, plan.ids_restore.long()), torch.arange(patches).expand(5, -1).int())


def test_worked_example_of_the_module():
    plan = MaskPlan.from_noise(torch.tensor([[0.2, 0.9, 0.1, 0.3]]), 0.5)
    assert plan.ids_keep.tolist() == [[2, 0]]
    assert plan.ids_mask.tolist() == [[3, 1]]
    assert plan.ids_restore.tolist() == [[1, 3, 0, 2]]


@pytest.mark.parametrize("kind", ["random", "block"])
def test_draws_depend_on_the_sample_alone(kind):
    ids = torch.arange(12)

    def draw(ids, epoch=1, seed=2, repeats=None):
        config = MaskConfig(kind, 0.75)
        return MaskPlan.draw(config, seed=seed, epoch=epoch, sample_ids_B=ids, grid_hw=(14, 10), repeats_B=repeats)

    plan = draw(ids)
    assert plan.ids_keep.shape == (12, 35)
    assert plan.ids_mask.shape == (12, 105)
    assert torch.equal(plan.ids_mask[5:8], draw(ids[5:8]).ids_mask)
    assert torch.equal(plan.ids_keep, draw(ids, repeats=torch.zeros(12, dtype=torch.int64)).ids_keep)
    for other in (draw(ids, epoch=2), draw(ids, seed=3), draw(ids, repeats=torch.ones(12, dtype=torch.int64))):
        assert not any(torch.equal(plan.ids_mask[i], other.ids_mask[i]) for i in range(12))


def test_grid_keeps_even_rows_and_columns():
    plan = MaskPlan.draw(MaskConfig("grid"), seed=0, epoch=0, sample_ids_B=torch.arange(2), grid_hw=(4, 4))
    assert plan.ids_keep.tolist() == [[0, 2, 8, 10]] * 2
    assert plan.ids_mask.shape == (2, 12)


def draw(config, grid_hw, count=40, epoch=0):
    return MaskPlan.draw(config, seed=3, epoch=epoch, sample_ids_B=torch.arange(count), grid_hw=grid_hw)


def masked_grid(plan, grid_hw):
    """bool [B, rows, columns], after a check that the three tensors agree."""
    both = torch.cat([plan.ids_keep, plan.ids_mask], dim=1)
    assert both.dtype == plan.ids_restore.dtype == torch.int32
    assert torch.equal(
        torch.gather(both, 1, plan.ids_restore.long()), torch.arange(both.shape[1]).expand_as(both).int()
    )
    masked = torch.zeros(both.shape, dtype=torch.bool).scatter_(1, plan.ids_mask.long(), True)
    return masked.view(-1, *grid_hw)


def test_worked_example_of_cells():
    config = MaskConfig("random", 0.5, cell=2)
    plans = draw(config, (2, 4))
    kept = {tuple(ids) for ids in plans.ids_keep.tolist()}
    assert kept == {(0, 1, 4, 5), (2, 3, 6, 7)}
    assert masked_grid(plans, (2, 4)).shape == (40, 2, 4)


@pytest.mark.parametrize("kind", ["random", "block", "square", "grid"])
@pytest.mark.parametrize("cell", [1, 2, 3])
def test_cells_are_masked_or_kept_as_one(kind, cell):
    grid_hw = (12, 18)
    config = MaskConfig(kind, 0.6, cell=cell)
    plan = draw(config, grid_hw)
    masked = masked_grid(plan, grid_hw)
    assert plan.ids_keep.shape[1] == config.kept(grid_hw) == (~masked[0]).sum()
    cells = masked.view(-1, 12 // cell, cell, 18 // cell, cell)
    assert torch.equal(cells.all((2, 4)), cells.any((2, 4)))
    coarse = draw(MaskConfig(kind, 0.6), (12 // cell, 18 // cell))
    assert torch.equal(cells[:, :, 0, :, 0], masked_grid(coarse, (12 // cell, 18 // cell)))


def test_simmim_s_mask_at_224_px():
    """7 x 7 cells of 32 px, of which ceil(0.6 * 49) = 30 are masked (its MaskGenerator)."""
    config = MaskConfig("random", 0.6, cell=2)
    assert draw(config, (14, 14)).ids_mask.shape[1] == 30 * 4


def test_a_square_is_a_square_at_any_place_with_equal_chance():
    config = MaskConfig("square", 0.5)
    masked = masked_grid(draw(config, (5, 6), count=4000), (5, 6))
    assert config.square_side((5, 6)) == 4  # sqrt(15) = 3.87
    rows, columns = masked.any(2), masked.any(1)
    assert rows.sum(1).tolist() == columns.sum(1).tolist() == [4] * 4000
    assert masked.sum((1, 2)).tolist() == [16] * 4000
    places = torch.stack([rows.int().argmax(1), columns.int().argmax(1)], 1)
    found, counts = places.unique(dim=0, return_counts=True)
    assert len(found) == 2 * 3
    assert (counts - 4000 / 6).abs().max() < 4 * (4000 / 6) ** 0.5  # four standard deviations, with this seed
    assert not torch.equal(masked, masked_grid(draw(config, (5, 6), count=4000, epoch=1), (5, 6)))


@pytest.mark.parametrize(("ratio", "kept"), [(0.75, 49), (0.5, 98), (0.4, 117)])
def test_blocks_meet_the_ratio_exactly_with_few_rectangles(ratio, kept):
    masked = masked_grid(draw(MaskConfig("block", ratio), (14, 14)), (14, 14))
    assert (~masked).sum((1, 2)).tolist() == [kept] * 40
    # masked patches stand together: far fewer borders between masked and kept than random masks have
    borders = (masked[:, 1:] != masked[:, :-1]).sum() + (masked[:, :, 1:] != masked[:, :, :-1]).sum()
    random = masked_grid(draw(MaskConfig("random", ratio), (14, 14)), (14, 14))
    others = (random[:, 1:] != random[:, :-1]).sum() + (random[:, :, 1:] != random[:, :, :-1]).sum()
    assert borders < 0.6 * others


def test_cells_that_do_not_fill_the_grid_are_refused():
    with pytest.raises(ValueError, match=r"mask\.cell 4 does not divide the grid of 14 x 14 patches"):
        draw(MaskConfig(cell=4), (14, 14))
    with pytest.raises(ValueError, match=r"mask\.cell must be at least 1"):
        MaskConfig(cell=0)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="random, block, grid, square"):
        MaskConfig("blocks")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mask\.ratio"):
        MaskConfig("random", 1.0)


def test_plan_moves_as_one():
    plan = MaskPlan.from_noise(torch.rand(2, 8), 0.5).to("meta")
    assert {t.device.type for t in (plan.ids_keep, plan.ids_mask, plan.ids_restore)} == {"meta"}
