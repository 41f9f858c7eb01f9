"""Defines the smallest run that has everything (mae-tiny at 32 px, 32 wide, batch 8, CPU) and compares two runs."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from patchmill.trainer.checkpoints import checkpoint
from patchmill.trainer.config.pretrain import PretrainConfig
from patchmill.trainer.metrics import read_metrics
from patchmill.trainer.recipes.pretrain import get_recipe, with_options

STEPS = 20
SMALL: dict[str, Any] = {
    "model__image_size": 32,
    "model__embed_dim": 32,
    "model__depth": 2,
    "model__num_heads": 2,
    "model__decoder_embed_dim": 16,
    "model__decoder_num_heads": 2,
    "train__global_batch": 8,
    "train__precision": "fp32",
    "device": "cpu",
}


def small_run(dataset, run, **options) -> PretrainConfig:
    """Its config with `section__option` set."""
    return with_options(get_recipe("mae-tiny"), data__path=str(dataset), out=str(run), **SMALL | options)


def twenty_steps(dataset, run, **options) -> PretrainConfig:
    """A run of `STEPS` updates with a checkpoint half way."""
    settings = {"total_steps": STEPS, "save_every_steps": STEPS // 2, "log_every_steps": 5, "tensorboard": False}
    return small_run(dataset, run, **{f"train__{name}": value for name, value in settings.items()} | options)


def losses(run):
    """Losses of a run by step."""
    return {line["step"]: line["loss"] for line in read_metrics(run)}


def weights(run, step=STEPS):
    """The tensors of a checkpoint's model."""
    return load_file(checkpoint.folder(run, step) / "model.safetensors")


def assert_close_runs(one, other):
    """Compares two runs of `STEPS` updates whose sums were taken in another order."""
    ours, theirs = losses(one), losses(other)
    assert max(ours) == max(theirs) == STEPS
    for step in ours.keys() & theirs.keys():
        # another order of fp32 sums, amplified by twenty updates
        assert ours[step] == pytest.approx(theirs[step], rel=1e-5), step
    for (name, a), b in zip(weights(one).items(), weights(other).values(), strict=True):
        if name.endswith("qkv.bias"):  # the K third has no true gradient: Adam makes steps of its rounding noise
            dim = len(a) // 3
            a, b = torch.cat([a[:dim], a[2 * dim :]]), torch.cat([b[:dim], b[2 * dim :]])
        elif name.endswith("kv.bias"):  # its K half likewise
            a, b = a[len(a) // 2 :], b[len(b) // 2 :]
        assert torch.allclose(a, b, rtol=1e-3, atol=2e-5), (name, (a - b).abs().max())
