"""Colour jitter: a pure function of the sample, within its range, the same for every decoder."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from patchmill.pipeline.config import MaskConfig
from patchmill.pipeline.decode.colour import jitter, jitter_factors
from patchmill.pipeline.loader import DataConfig, build_loader
from tests.support.photos import make_dataset


def test_factors_are_uniform_and_belong_to_the_sample():
    ids, none = np.arange(20_000), np.zeros(20_000, dtype=np.int64)
    factors = jitter_factors(1, 2, ids, none, 0.4)
    assert factors.min() >= 0.6
    assert factors.max() <= 1.4
    np.testing.assert_allclose(factors.mean(axis=0), 1, atol=0.009)  # five standard errors
    np.testing.assert_array_equal(factors[50:60], jitter_factors(1, 2, ids[50:60], none[50:60], 0.4))
    assert (factors != jitter_factors(1, 3, ids, none, 0.4)).mean() > 0.99
    assert (factors != jitter_factors(1, 2, ids, none + 1, 0.4)).mean() > 0.99


@pytest.mark.parametrize("factors", [(1.3, 1.0, 1.0), (1.0, 0.7, 1.0), (1.0, 1.0, 0.6), (0.8, 1.2, 1.4)])
def test_pillows_enhancers_are_the_reference(factors):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    for kind, factor in zip((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), factors, strict=True):
        image = kind(image).enhance(factor)
    ours = jitter(torch.from_numpy(pixels)[None], torch.tensor([factors]))[0].numpy()
    assert (
        np.abs(ours.astype(int) - np.asarray(image)).max() <= 3
    )  # Pillow cuts to whole numbers after each of three steps


def test_threads_change_no_bit():
    images = torch.randint(0, 256, (3, 200, 300, 3), dtype=torch.uint8)
    factors, threads = torch.tensor([[1.3, 0.6, 1.2], [0.7, 1.4, 0.8], [1.1, 0.9, 1.0]]), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(jitter(images, factors))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_no_strength_changes_nothing_and_other_channels_work():
    images = torch.randint(0, 256, (40, 8, 8, 1), dtype=torch.uint8)
    assert torch.equal(jitter(images, torch.ones(40, 3)), images)
    assert jitter(images.expand(-1, -1, -1, 5), torch.full((40, 3), 0.5)).shape == (40, 8, 8, 5)


def test_the_loader_jitters_alike_with_both_decoders(tmp_path):
    dataset = make_dataset(tmp_path, count=16, sides=(40, 90))

    def batch(decoder, strength):
        with build_loader(
            DataConfig(path=str(dataset), decoder=decoder, colour_jitter=strength),
            image_size=32, patch_size=8, channels=3, mask=MaskConfig(), seed=3, global_batch=16,
        ) as loader:  # fmt: skip
            return next(loader)

    plain, cpu, dali = batch("cpu", 0.0), batch("cpu", 0.4), batch("dali", 0.4)
    factors = jitter_factors(3, 0, plain.sample_ids.numpy(), np.zeros(16, dtype=np.int64), 0.4)
    assert torch.equal(cpu.images, jitter(plain.images, torch.from_numpy(factors)))
    assert not torch.equal(cpu.images, plain.images)
    assert (cpu.images.int() - dali.images.int()).abs().float().mean() < 0.5
