"""Mixup, cutmix and smoothed labels against calculations by hand."""

import numpy as np
import pytest
import torch

from patchmill.trainer.config.evaluate import AugmentConfig
from patchmill.trainer.evaluate.mixup import Mix, cut_box, draw_mix, mix_images, mix_labels, soft_cross_entropy

IMAGES = torch.stack([torch.full((1, 4, 4), 1.0), torch.full((1, 4, 4), 5.0)])


def test_mixup_by_hand():
    mix = Mix(0.75, None)
    mixed = mix_images(IMAGES, mix)
    assert mixed[0].unique().tolist() == [0.75 * 1 + 0.25 * 5]
    assert mixed[1].unique().tolist() == [0.75 * 5 + 0.25 * 1]
    labels = mix_labels(torch.tensor([0, 2]), 4, 0.2, mix)
    # 0.2 / 4 everywhere; 0.8 * 0.75 on the own class, 0.8 * 0.25 on the other's
    assert labels[0].tolist() == pytest.approx([0.65, 0.05, 0.25, 0.05])
    assert labels[1].tolist() == pytest.approx([0.25, 0.05, 0.65, 0.05])


def test_cutmix_by_hand():
    mix = Mix(1 - 4 / 16, (1, 3, 0, 2))
    mixed = mix_images(IMAGES, mix)
    assert mixed[0, 0].tolist() == [[1, 1, 1, 1], [5, 5, 1, 1], [5, 5, 1, 1], [1, 1, 1, 1]]
    assert mixed[1, 0].tolist() == [[5, 5, 5, 5], [1, 1, 5, 5], [1, 1, 5, 5], [5, 5, 5, 5]]
    assert mix_labels(torch.tensor([1, 0]), 2, 0.0, mix).tolist() == [[0.25, 0.75], [0.75, 0.25]]
    assert IMAGES[0].unique().tolist() == [1.0]


def test_a_box_at_the_border_leaves_the_share_that_it_leaves():
    found = [cut_box(0.5, (10, 20), np.random.default_rng(seed)) for seed in range(200)]
    shares = set()
    for share, box in found:
        assert box is not None
        top, bottom, left, right = box
        assert 0 <= top <= bottom <= 10
        assert 0 <= left <= right <= 20
        assert share == pytest.approx(1 - (bottom - top) * (right - left) / 200)
        shares.add(round(share, 3))
    assert min(shares) == pytest.approx(1 - 6 * 14 / 200)  # int(10 * sqrt 0.5) = 7 rows: 3 to each side
    assert max(shares) > 0.7


def test_draws_follow_the_key_and_switch_between_the_two():
    config = AugmentConfig()
    draws = [draw_mix(config, (224, 224), (7, 1, step, 0, 0)) for step in range(400)]
    assert draws[3] == draw_mix(config, (224, 224), (7, 1, 3, 0, 0))
    assert len({mix.share for mix in draws}) > 350
    assert 160 < sum(mix.box is None for mix in draws) < 240
    assert {draw_mix(AugmentConfig(mixup=0.0), (8, 8), (k,)).box is None for k in range(9)} == {False}
    assert {draw_mix(AugmentConfig(cutmix=0.0), (8, 8), (k,)).box for k in range(9)} == {None}
    assert draw_mix(AugmentConfig(mixup=0.0, cutmix=0.0), (8, 8), (0,)) == Mix(1.0, None)


def test_soft_cross_entropy_is_the_ordinary_one_for_hard_labels():
    logits, labels = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 4, 2, 2, 1, 3])
    target = mix_labels(labels, 5, 0.1, Mix(1.0, None))
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(soft_cross_entropy(logits, target), expected)
