"""Table 1 of He et al. 2021: a recipe for every row, each trains, and the augmentations are what their names say."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from patchmill.pipeline.config import DataConfig, MaskConfig
from patchmill.pipeline.loader import build_loader
from patchmill.trainer.config.model import ModelConfig
from patchmill.trainer.config.pretrain import OptimConfig, PretrainConfig, TrainConfig
from patchmill.trainer.config.toml import from_toml, to_toml
from patchmill.trainer.model.target_files import write_target
from patchmill.trainer.pretrain import pretrain
from patchmill.trainer.recipes.pretrain import RECIPES, get_recipe
from patchmill.trainer.recipes.table1 import ROWS, TABLE1
from tests.support.photos import make_dataset

DEFAULT = get_recipe("table1-a-depth-8")
"""what six rows of the paper's table are"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"), count=24)


def differences(config, other=DEFAULT, prefix=""):
    """Options that differ, by name."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        a, b = getattr(config, field.name), getattr(other, field.name)
        if dataclasses.is_dataclass(a):
            found |= differences(a, b, f"{prefix}{field.name}.")
        elif a != b:
            found[prefix + field.name] = a
    return found


def test_the_default_setting_is_the_paper_s():
    model, train = DEFAULT.model, DEFAULT.train
    assert (model.embed_dim, model.depth, model.num_heads, model.patch_size, model.image_size) == (
        1024,
        24,
        16,
        16,
        224,
    )
    assert (model.decoder_depth, model.decoder_embed_dim, model.norm_pix_loss, model.target) == (
        8,
        512,
        False,
        "pixels",
    )
    assert (train.global_batch, train.total_epochs, DEFAULT.mask) == (4096, 800, MaskConfig("random", 0.75))
    assert (DEFAULT.data.crop, DEFAULT.data.scale, DEFAULT.data.flip) == ("random", (0.2, 1.0), True)
    for row in ("b-width-512", "c-without-mask-tokens", "d-pixels", "e-crop-random", "f-random-75"):
        assert get_recipe(f"table1-{row}") == DEFAULT


def test_each_row_changes_what_its_name_says_and_nothing_else():
    changed = {row: differences(get_recipe(f"table1-{row}")) for row in ROWS}
    assert {row: values for row, values in changed.items() if values} == {
        **{f"a-depth-{n}": {"model.decoder_depth": n} for n in (1, 2, 4, 12)},
        **{f"b-width-{n}": {"model.decoder_embed_dim": n} for n in (128, 256, 768, 1024)},
        "c-with-mask-tokens": {"model.encoder_mask_tokens": True},
        "d-normalised-pixels": {"model.norm_pix_loss": True},
        "d-pca": {"model.target": "pca"},
        "d-dvae": {"model.target": "dvae"},
        "e-none": {"data.crop": "centre", "data.flip": False},
        "e-crop-fixed": {"data.crop": "fixed"},
        "e-crop-colour": {"data.colour_jitter": 0.4},
        "f-block-50": {"mask.kind": "block", "mask.ratio": 0.5},
        "f-block-75": {"mask.kind": "block"},
        "f-grid-75": {"mask.kind": "grid"},
    }
    assert (get_recipe("table1-d-pca").model.pred_dim, get_recipe("table1-d-dvae").model.pred_dim) == (96, 8192)
    kept = {row: get_recipe(f"table1-{row}").mask.kept((14, 14)) for row in ROWS if row.startswith("f-")}
    assert kept == {"f-random-75": 49, "f-block-50": 98, "f-block-75": 49, "f-grid-75": 49}


def test_every_recipe_resolves_and_survives_its_config_file(tmp_path):
    for name in RECIPES:
        config = get_recipe(name)
        (tmp_path / "config.toml").write_text(to_toml(config))
        assert from_toml(tmp_path / "config.toml") == config, name


def small(name, dataset, out):
    """A recipe's method in a model that trains in a second."""
    recipe = TABLE1[name]()
    model: ModelConfig = dataclasses.replace(
        recipe.model,
        image_size=32,
        patch_size=8,
        embed_dim=32,
        depth=1,
        num_heads=2,
        decoder_embed_dim=recipe.model.decoder_embed_dim // 16,
        decoder_num_heads=2,
    )
    return PretrainConfig(
        model=model,
        data=dataclasses.replace(recipe.data, path=str(dataset)),
        mask=recipe.mask,
        optim=OptimConfig(warmup_epochs=0),
        train=TrainConfig(global_batch=8, total_steps=3, save_every_steps=3, tensorboard=False, precision="fp32"),
        out=str(out),
        device="cpu",
    )


@pytest.mark.parametrize("name", [name for name in TABLE1 if name != "table1-d-dvae"])
def test_every_row_trains_three_steps(name, dataset, tmp_path):
    """But for dvae, whose three steps are in test_target_fit.py."""
    config = small(name, dataset, tmp_path / "run")
    if config.model.target == "pca":
        path = tmp_path / "pca.safetensors"
        basis = torch.linalg.qr(torch.randn(192, 96, generator=torch.Generator().manual_seed(0))).Q
        write_target({"mean": torch.zeros(192), "basis": basis}, config.model, path)
        config = dataclasses.replace(config, target_path=str(path))
    summary = pretrain(config)
    assert (summary.step, summary.skipped_updates) == (3, 0)
    assert 0 < summary.latest["loss"] < 10


def batches(dataset, data, epochs=2):
    """Images of some epochs of all samples, by epoch: [epochs, samples, H, W, C], in the order of the samples."""
    data = dataclasses.replace(data, path=str(dataset), shuffle="none", decoder="cpu")
    options: dict[str, Any] = {
        "image_size": 32,
        "patch_size": 8,
        "channels": 3,
        "mask": MaskConfig(),
        "seed": 0,
        "global_batch": 24,
    }
    with build_loader(data, **options) as loader:
        return np.stack([next(loader).images.numpy() for _ in range(epochs)])


def test_augmentations_of_table_1e(dataset):
    none = batches(dataset, TABLE1["table1-e-none"]().data)
    fixed = batches(dataset, TABLE1["table1-e-crop-fixed"]().data)
    random = batches(dataset, TABLE1["table1-e-crop-random"]().data)
    colour = batches(dataset, TABLE1["table1-e-crop-colour"]().data)
    assert np.array_equal(none[0], none[1])
    assert np.array_equal(none[0], batches(dataset, DataConfig(crop="centre", flip=False))[0])
    for moving in (fixed, random, colour):
        same = [np.array_equal(a, b) for a, b in zip(moving[0], moving[1], strict=True)]
        assert sum(same) <= 1  # a small photograph has few places for a crop of fixed size
    assert not np.array_equal(fixed, random)
    # jitter keeps the random crops and changes their colours
    assert not np.array_equal(colour, random)
    alike = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(colour[0], random[0], strict=True)]
    assert min(alike) > 0.8
