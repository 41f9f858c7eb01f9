"""Other image sizes and channels: position tables as published, kernels that keep what they compute."""

import dataclasses

import numpy as np
import pytest
import torch

from patchmill.trainer.checkpoints.interop import build_encoder, resized
from patchmill.trainer.config.model import ModelConfig
from patchmill.trainer.model.mae import MaskedAutoencoder
from patchmill.trainer.model.resize_weights import interpolate_positions
from tests.support.small_models import H14, TINY, random_checkpoint, same_bits


def cubic_weights(old, new):
    """[new, old] weights of cubic convolution with a = -0.75 at half-pixel centres, the edge repeated (Keys 1981)."""
    weights = np.zeros((new, old))
    for row in range(new):
        centre = (row + 0.5) * old / new - 0.5
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            x, a = abs(centre - tap), -0.75
            near = (a + 2) * x**3 - (a + 3) * x**2 + 1
            far = a * (x**3 - 5 * x**2 + 8 * x - 4)
            weights[row, min(max(tap, 0), old - 1)] += near if x <= 1 else far
    return weights


GRIDS = {
    "16 px patches, 224 to 448": ((14, 14), (28, 28)),
    "16 px patches, 224 to 384 x 640": ((14, 14), (24, 40)),
    "14 px patches, 224 to 448": ((16, 16), (32, 32)),
    "14 px patches, 224 to 518 x 336": ((16, 16), (37, 24)),
    "smaller": ((14, 14), (6, 6)),
    "wide to tall": ((8, 20), (20, 8)),
}


@pytest.mark.parametrize("grids", GRIDS)
def test_positions_are_the_published_bicubic_interpolation(grids):
    old, new = GRIDS[grids]
    table = torch.randn(1, 1 + old[0] * old[1], 12, generator=torch.Generator().manual_seed(0))
    found = interpolate_positions(table, old, new)
    down, across = cubic_weights(old[0], new[0]), cubic_weights(old[1], new[1])
    grid = table[0, 1:].double().numpy().reshape(*old, 12)
    expected = np.einsum("yh,xw,hwd->yxd", down, across, grid).reshape(-1, 12)
    assert torch.equal(found[:, 0], table[:, 0])
    np.testing.assert_allclose(found[0, 1:].numpy(), expected, atol=2e-5)  # fp32 sums of 16 products of about 1


def test_published_function_on_a_square_grid():
    """The steps of util/pos_embed.py's interpolate_pos_embed for a square table, in torch's own operators."""
    table = torch.randn(1, 1 + 256, 8, generator=torch.Generator().manual_seed(1))
    grid = table[:, 1:].reshape(-1, 16, 16, 8).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(32, 32), mode="bicubic", align_corners=False)
    published = torch.cat((table[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)
    torch.testing.assert_close(interpolate_positions(table, (16, 16), (32, 32)), published)


def test_the_same_grid_is_the_same_tensor():
    original = random_checkpoint(TINY)
    same = resized(original, image_size=32)
    assert same.config == TINY
    assert same_bits(same.tensors, original.tensors)
    assert all(same.tensors[name] is tensor for name, tensor in original.tensors.items())


@pytest.mark.parametrize("size", [64, (40, 24)])
def test_both_tables_follow_the_image_size(size):
    checkpoint = resized(random_checkpoint(TINY), image_size=size)
    model = MaskedAutoencoder(checkpoint.config)
    model.load_state_dict(checkpoint.tensors)  # strict: every shape is right
    height, width = checkpoint.config.image_hw
    features = build_encoder(checkpoint)(torch.zeros(2, height, width, 3, dtype=torch.uint8))
    assert features.patches.shape == (2, checkpoint.config.num_patches, 32)


def test_sizes_that_patches_do_not_divide():
    with pytest.raises(ValueError, match=r"not a multiple of model\.patch_size 8; the nearest multiple is 32x40"):
        resized(random_checkpoint(TINY), image_size=(32, 42))
    assert dataclasses.replace(H14, image_size=448).grid_hw == (32, 32)


def encode(checkpoint, images):
    with torch.inference_mode():
        return torch.cat([part.flatten() for part in build_encoder(checkpoint).encode(images)])


def test_one_channel_computes_what_three_equal_ones_did():
    original = random_checkpoint(TINY)
    grey = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    single = resized(original, channels=1)
    torch.testing.assert_close(encode(single, grey), encode(original, grey.expand(-1, 3, -1, -1)), rtol=1e-5, atol=1e-5)
    assert list(single.config.mean) == [pytest.approx(sum(TINY.mean) / 3)]


def test_repeated_channels_compute_what_the_originals_did():
    original = random_checkpoint(TINY)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    double = resized(original, channels=6)
    torch.testing.assert_close(
        encode(double, images.repeat(1, 2, 1, 1)), encode(original, images), rtol=1e-5, atol=1e-5
    )
    assert double.config.std == TINY.std * 2


def test_four_channels_follow_timms_rule():
    original = random_checkpoint(TINY)
    kernel = original.tensors["patch_embed.proj.weight"]
    four = resized(original, channels=4, mean=(0.5,) * 4, std=(0.25,) * 4)
    expected = torch.cat([kernel, kernel[:, :1]], dim=1) * 3 / 4
    torch.testing.assert_close(four.tensors["patch_embed.proj.weight"], expected, rtol=1e-6, atol=0)
    assert (four.config.channels, four.config.mean, four.config.std) == (4, (0.5,) * 4, (0.25,) * 4)


def test_the_head_predicts_a_new_channel_as_the_one_it_repeats():
    original = random_checkpoint(TINY)
    four, one = resized(original, channels=4), resized(original, channels=1)
    for name in ("decoder_pred.weight", "decoder_pred.bias"):
        was = original.tensors[name].unflatten(0, (64, 3))
        now = four.tensors[name].unflatten(0, (64, 4))
        assert torch.equal(now[:, :3], was)
        assert torch.equal(now[:, 3], was[:, 0])
        torch.testing.assert_close(one.tensors[name], was.mean(1), rtol=1e-6, atol=1e-7)
    assert isinstance(four.config, ModelConfig)
    MaskedAutoencoder(four.config).load_state_dict(four.tensors)
    MaskedAutoencoder(one.config).load_state_dict(one.tensors)


def test_mean_and_std_must_fit_the_channels():
    with pytest.raises(ValueError, match="give one of each per channel"):
        resized(random_checkpoint(TINY), channels=2, mean=(0.5,))
    with pytest.raises(ValueError, match="channels is 0"):
        resized(random_checkpoint(TINY), channels=0)
