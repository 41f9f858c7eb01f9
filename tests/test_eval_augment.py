"""RandAugment's operations against Pillow's; its draws, and those of random erasing, by sample."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from patchmill.trainer.config.evaluate import AugmentConfig
from patchmill.trainer.evaluate import augment
from tests.support.photos import photo_crop

LEVEL = 0.9


def photo():
    return np.asarray(Image.fromarray(photo_crop(np.random.default_rng(3), "astronaut.png", (64, 64))))


def tensor_of(pixels):
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255


def pixels_of(tensor):
    return (tensor[0].permute(1, 2, 0) * 255).round().clamp(0, 255).numpy()


PILLOW: dict[str, Callable[[Image.Image], Image.Image]] = {
    "autocontrast": ImageOps.autocontrast,
    "equalize": ImageOps.equalize,
    "invert": ImageOps.invert,
    "posterize": lambda image: ImageOps.posterize(image, 4 - 3),  # int(0.9 * 4) = 3
    "solarize": lambda image: ImageOps.solarize(image, 256 - 230),  # int(0.9 * 256) = 230
    "solarize_add": lambda image: image.point([min(255, v + 99) if v < 128 else v for v in range(256)] * 3),
    "colour": lambda image: ImageEnhance.Color(image).enhance(1.81),
    "contrast": lambda image: ImageEnhance.Contrast(image).enhance(1.81),
    "brightness": lambda image: ImageEnhance.Brightness(image).enhance(1.81),
    "sharpness": lambda image: ImageEnhance.Sharpness(image).enhance(1.81),
}


@pytest.mark.parametrize("name", augment.TONAL)
def test_tonal_operations_are_pillows_to_one_step(name):
    pixels, one = photo(), torch.ones(1)
    ours = pixels_of(augment._tone(name, LEVEL * one, one)(tensor_of(pixels)).clamp(0, 1))
    theirs = np.asarray(PILLOW[name](Image.fromarray(pixels))).astype(float)
    # Pillow truncates to whole steps where we keep fractions; a threshold moves by the same
    assert np.abs(ours - theirs).max() <= 1 or np.mean(np.abs(ours - theirs) > 1) < 0.02


def test_a_shift_moves_pixels_and_fills_with_the_mean():
    x = tensor_of(photo()[:40, :40])
    moved = augment._warp(x, "translate_x", torch.tensor([10 / (0.45 * 40)]), (0.1, 0.2, 0.3))
    torch.testing.assert_close(moved[..., 10:], x[..., :-10], atol=1e-4, rtol=0)
    assert moved[0, :, 5, 4].tolist() == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize(("name", "transform"), [("rotate", None), ("shear_x", (1, 0.27)), ("shear_y", (0.27, 1))])
def test_geometry_is_pillows_inside_the_image(name, transform):
    pixels = photo()
    ours = pixels_of(augment._warp(tensor_of(pixels), name, torch.tensor([-LEVEL]), (0.5, 0.5, 0.5)).clamp(0, 1))
    image, centre = Image.fromarray(pixels), 31.5
    if transform is None:
        theirs = image.rotate(27, Image.Resampling.BICUBIC)
        theirs_other = image.rotate(-27, Image.Resampling.BICUBIC)
    else:
        x, y = (0.27, 0) if name == "shear_x" else (0, 0.27)
        matrices = [(1, s * x, -s * x * (centre + 0.5), s * y, 1, -s * y * (centre + 0.5)) for s in (1, -1)]
        theirs, theirs_other = (
            image.transform(image.size, Image.Transform.AFFINE, m, Image.Resampling.BICUBIC) for m in matrices
        )
    inside = (slice(22, 42), slice(22, 42))
    errors = [np.abs(ours[inside] - np.asarray(t)[inside].astype(float)).mean() for t in (theirs, theirs_other)]
    # one direction of the two is meant by the sign; the two interpolations differ in their kernel's parameter
    assert min(errors) < 3
    assert max(errors) > 3 * min(errors)


def test_an_image_is_augmented_by_its_own_index_alone():
    config, ids = AugmentConfig(), np.array([5, 9, 1000, 7, 2**31])
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    whole = augment.rand_augment(images, ids, (0.5, 0.5, 0.5), config, seed=3, epoch=2)
    erased = augment.random_erase(images.clone(), ids, 1.0, seed=3, epoch=2)
    for i in range(5):
        alone = augment.rand_augment(images[i : i + 1], ids[i : i + 1], (0.5, 0.5, 0.5), config, seed=3, epoch=2)
        torch.testing.assert_close(alone[0], whole[i], atol=1e-6, rtol=0)
        one = augment.random_erase(images[i : i + 1].clone(), ids[i : i + 1], 1.0, seed=3, epoch=2)
        assert torch.equal(one[0], erased[i])
    other = augment.rand_augment(images, ids, (0.5, 0.5, 0.5), config, seed=3, epoch=3)
    assert not torch.equal(other, whole)


def test_half_of_the_operations_are_left_out_and_the_others_are_even():
    choice, level, sign = augment.draw_operations(np.arange(60_000), AugmentConfig(), seed=0, epoch=0, layer=1)
    counts = np.bincount(choice + 1, minlength=16)
    assert abs(counts[0] - 30_000) < 600
    assert np.abs(counts[1:] - 2000).max() < 250
    assert abs(level.mean() - 0.9) < 0.01
    assert level.max() == 1.0
    assert abs(sign.mean()) < 0.02


def test_erased_boxes_have_the_drawn_share_and_hold_normal_noise():
    ids = np.arange(4000)
    boxes = augment.draw_boxes(ids, (32, 48), 0.25, seed=1, epoch=0)
    erased = boxes[boxes[:, 2] > 0]
    assert abs(len(erased) / 4000 - 0.25) < 0.03
    share = erased[:, 2] * erased[:, 3] / (32 * 48)
    assert share.min() > 0.012
    assert share.max() < 0.36
    assert ((erased[:, 0] >= 0) & (erased[:, 0] + erased[:, 2] <= 32)).all()
    assert ((erased[:, 1] >= 0) & (erased[:, 1] + erased[:, 3] <= 48)).all()
    images = augment.random_erase(torch.full((400, 3, 32, 48), 9.0), ids[:400], 1.0, seed=1, epoch=0)
    noise = images[images != 9.0]
    assert len(noise) > 100_000
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02


def test_augmentation_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"3 channels.*--augment.ops 0"):
        augment.check_kornia(AugmentConfig(), 4)
    augment.check_kornia(AugmentConfig(ops=0), 4)
