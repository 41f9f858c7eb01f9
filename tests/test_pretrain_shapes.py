"""Any image trains and is reconstructed: 448 px, 1 and 5 channels, oblong, patch 14 and patch 2, from shards to PNG."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from patchmill.pipeline.config import MaskConfig
from patchmill.pipeline.loader import DataConfig, build_loader
from patchmill.tools import cli
from patchmill.trainer.checkpoints.checkpoint import load_model
from patchmill.trainer.evaluate.reconstruct import reconstruct
from patchmill.trainer.metrics import read_metrics
from patchmill.trainer.pretrain import pretrain
from tests.support.photos import make_dataset, photograph
from tests.support.small_runs import small_run

SHAPES: dict[str, dict[str, Any]] = {
    "448 px": {"image_size": 448, "patch_size": 14},
    "1 channel": {"image_size": 32, "patch_size": 8, "channels": 1, "mean": (0.4,), "std": (0.3,)},
    "5 channels": {"image_size": 32, "patch_size": 8, "channels": 5, "mean": (0.4,) * 5, "std": (0.3,) * 5},
    "oblong": {"image_size": (32, 56), "patch_size": 8},
    "patch 14": {"image_size": 42, "patch_size": 14, "norm_pix_loss": True},
    "patch 2": {"image_size": 12, "patch_size": 2},
}
SHEETS = {  # 4 images below each other in 3 columns, enlarged by a whole number to about 144 pixels, 6 between
    "448 px": 144,
    "1 channel": 32 * 4,
    "5 channels": 32 * 4,
    "oblong": 32 * 4,
    "patch 14": 42 * 3,
    "patch 2": 12 * 12,
}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Photographs, and windows of one with its grey values and edges as channels four and five."""
    root = tmp_path_factory.mktemp("data")
    photo = photograph("chelsea.png")
    grey = photo.mean(2, keepdims=True).astype(np.uint8)
    five = np.concatenate([photo, grey, np.roll(grey, 1, 1) - grey], axis=2)
    np.save(root / "five.npy", np.stack([five[i : i + 64, 5 * i : 5 * i + 80] for i in range(0, 64, 4)]))
    assert cli.run("shard", [str(root / "five.npy"), str(root / "five")]) == 0
    return {3: make_dataset(root, count=16), 5: root / "five"}


@pytest.mark.parametrize("name", SHAPES)
def test_it_trains_and_is_reconstructed(name, datasets, tmp_path):
    shape, run, sheet = SHAPES[name], tmp_path / "run", tmp_path / "sheet.png"
    channels = shape.get("channels", 3)
    dataset = datasets[5 if channels == 5 else 3]
    config = small_run(
        dataset,
        run,
        train__global_batch=4,
        train__total_steps=3,
        train__tensorboard=False,
        optim__blr=0.1,
        optim__warmup_epochs=0.0,
        **{f"model__{key}": value for key, value in shape.items()},
    )
    pretrain(config)
    losses = [line["loss"] for line in read_metrics(run)]
    assert len(losses) == 3
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)

    model, _ = load_model(run)
    assert model.config == config.model
    images, plan = images_of(dataset, model.config)
    masked, reconstruction = reconstruct(model, images, plan)
    assert masked.shape == reconstruction.shape == images.shape == (4, *model.config.image_hw, channels)
    hidden = hidden_pixels(plan, model.config)
    assert torch.equal(masked[~hidden], images[~hidden])
    assert torch.equal(reconstruction[~hidden], images[~hidden])
    assert (masked[hidden] == 128).all()
    assert len(reconstruction[hidden].unique()) > 10

    options = ["--checkpoint", str(run), "--data.path", str(dataset), "--out", str(sheet)]
    assert cli.run("reconstruct", [*options, "--images", "4", "--across", "1"]) == 0
    height, width = SHEETS[name], round(SHEETS[name] * model.config.image_hw[1] / model.config.image_hw[0])
    picture = Image.open(sheet)
    assert picture.width == 3 * (width + 6) + 6
    assert 0 < picture.height - 4 * (height + 6) < 100  # the titles


def images_of(dataset, c):
    options = {"image_size": c.image_size, "patch_size": c.patch_size, "channels": c.channels}
    with build_loader(DataConfig(path=str(dataset)), mask=MaskConfig(), seed=1, global_batch=4, **options) as loader:
        batch = next(loader)
    return batch.images, batch.plan


def hidden_pixels(plan, c):
    """bool [B, H, W]: whether a pixel lies in a masked patch."""
    patches = torch.zeros(plan.ids_restore.shape, dtype=torch.bool).scatter_(1, plan.ids_mask.long(), True)
    assert patches.sum(1).eq(c.num_patches - int(c.num_patches * 0.25)).all()
    return patches.unflatten(1, c.grid_hw).repeat_interleave(c.patch_size, 1).repeat_interleave(c.patch_size, 2)
