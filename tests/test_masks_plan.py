"""Mask plans: the published sorting rule, and draws that depend on the sample alone."""

import pytest
import torch

from patchmill.pipeline.masks import MaskConfig, MaskPlan


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


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="random, block, grid"):
        MaskConfig("blocks")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mask\.ratio"):
        MaskConfig("random", 1.0)


def test_plan_moves_as_one():
    plan = MaskPlan.from_noise(torch.rand(2, 8), 0.5).to("meta")
    assert {t.device.type for t in (plan.ids_keep, plan.ids_mask, plan.ids_restore)} == {"meta"}
