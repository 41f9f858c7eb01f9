"""Crop windows and flips: the published distributions, and pure functions of (seed, epoch, sample, repeat)."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchmill.kernels.philox import STREAM_CROP, draw_numpy
from patchmill.pipeline.plan.draws import crop_windows, flips, framed_windows

GOLDEN = Path(__file__).parent / "golden"
CASES = [
    (rule, shape)
    for rule in ("torchvision", "tf")
    for shape in json.loads((GOLDEN / f"crop_quantiles_{rule}.json").read_text())["by_image_width_x_height"]
]


def windows_of(rule, width, height, count, *, seed=0, epoch=0, **settings):
    ids = np.arange(count)
    return crop_windows(seed, epoch, ids, np.full(count, height), np.full(count, width), rule=rule, **settings)


@pytest.mark.parametrize(("rule", "shape"), CASES)
def test_quantiles_of_the_published_rules(rule, shape):
    """Kolmogorov-Smirnov distance at the 21 stored quantiles of 20,000 published draws against as many of ours.

    Two samples of 20,000 from one distribution differ by more than 0.0195 once in 1,000 comparisons.
    """
    golden = json.loads((GOLDEN / f"crop_quantiles_{rule}.json").read_text())
    width, height = map(int, shape.split("x"))
    scale, ratio = golden["scale"], golden["ratio"]
    top, left, h, w = windows_of(rule, width, height, golden["draws"], scale=scale, ratio=ratio).T.astype(float)
    ours = {
        "area_fraction": h * w / (height * width),
        "aspect": w / h,
        "center_y": (top + h / 2) / height,
        "center_x": (left + w / 2) / width,
    }
    for name, quantiles in golden["by_image_width_x_height"][shape].items():
        for i, value in enumerate(quantiles):
            share = i / (len(quantiles) - 1)
            # the stored values are rounded to four digits, and many draws share one value
            below, up_to = (ours[name] < value - 1e-4).mean(), (ours[name] <= value + 1e-4).mean()
            assert below - 0.0195 <= share <= up_to + 0.0195, (name, i)


def published_torchvision_rule(words_T4, height, width, scale, ratio):
    """torchvision's RandomResizedCrop.get_params, written for one image and fed with our words."""
    for words in words_T4.astype(np.float64):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * words[0] / 2**32)
        log_ratio = math.log(ratio[0]), math.log(ratio[1])
        aspect = math.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * words[1] / 2**32)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(words[2] / 2**32 * (height - h + 1)), int(words[3] / 2**32 * (width - w + 1)), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("shape", [(375, 500), (33, 500), (2000, 40), (1, 1), (5, 3)])
def test_torchvision_rule_one_by_one(shape):
    height, width = shape
    scale, ratio = (0.2, 1.0), (3 / 4, 4 / 3)
    ours = windows_of("torchvision", width, height, 300, seed=9, epoch=4)
    words = draw_numpy(9, STREAM_CROP, np.arange(10), np.arange(300)[:, None], 4)
    expected = [published_torchvision_rule(words[i], height, width, scale, ratio) for i in range(300)]
    np.testing.assert_array_equal(ours, expected)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 4000),
    width=st.integers(1, 4000),
    rule=st.sampled_from(["torchvision", "tf", "fixed", "centre"]),
    aspect=st.sampled_from([1.0, 0.5, 2.0]),
)
def test_windows_lie_inside_the_image(height, width, rule, aspect):
    heights, widths = np.full(64, height), np.full(64, width)
    if rule in ("torchvision", "tf"):
        windows = crop_windows(1, 2, np.arange(64), heights, widths, rule=rule)
    else:
        windows = framed_windows(
            1, 2, np.arange(64), heights, widths, aspect=aspect, fraction=0.875, centre=rule == "centre"
        )
    assert windows.dtype == np.int32
    top, left, h, w = windows.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (h >= 1).all()
    assert (w >= 1).all()
    assert (top + h <= height).all()
    assert (left + w <= width).all()


def test_a_draw_does_not_depend_on_its_batch():
    rng = np.random.default_rng(0)
    ids, heights, widths = rng.integers(0, 2**32, 200), rng.integers(20, 900, 200), rng.integers(20, 900, 200)
    windows, mirrored = crop_windows(3, 5, ids, heights, widths), flips(3, 5, ids)
    order = rng.permutation(200)[:50]
    np.testing.assert_array_equal(windows[order], crop_windows(3, 5, ids[order], heights[order], widths[order]))
    np.testing.assert_array_equal(mirrored[order], flips(3, 5, ids[order]))


def test_seed_epoch_and_repeat_change_the_draw():
    args = (np.arange(500), np.full(500, 375), np.full(500, 500))
    first = crop_windows(3, 5, *args)
    others = [crop_windows(4, 5, *args), crop_windows(3, 6, *args), crop_windows(3, 5, *args, repeats_B=1)]
    for other in others:
        assert (first == other).all(axis=1).sum() <= 2
    mixed = crop_windows(3, 5, *args, repeats_B=np.arange(500) % 2)
    np.testing.assert_array_equal(mixed[::2], first[::2])
    np.testing.assert_array_equal(mixed[1::2], others[2][1::2])


def test_half_of_the_images_are_flipped():
    assert abs(flips(1, 0, np.arange(40_000)).mean() - 0.5) < 0.0125  # five standard errors


def test_framed_windows_have_one_size_and_the_target_aspect():
    ids, heights, widths = np.arange(300), np.full(300, 256), np.full(300, 400)
    centre = framed_windows(0, 0, ids, heights, widths, aspect=1.0, fraction=0.875, centre=True)
    np.testing.assert_array_equal(np.unique(centre, axis=0), [[16, 88, 224, 224]])
    moved = framed_windows(0, 0, ids, heights, widths, aspect=2.0, fraction=0.5, centre=False)
    np.testing.assert_array_equal(np.unique(moved[:, 2:], axis=0), [[100, 200]])
    assert len(np.unique(moved[:, 0])) > 80
    assert moved[:, 0].min() < 10
    assert moved[:, 0].max() > 146


def test_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="torchvision, tf"):
        windows_of("pil", 10, 10, 1)
