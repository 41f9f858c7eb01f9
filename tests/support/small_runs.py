"""The smallest run that has everything, for tests that pretrain: mae-tiny at 32 px, 32 wide, batch 8, on the CPU."""

from typing import Any

from patchmill.trainer.config.pretrain import PretrainConfig
from patchmill.trainer.recipes.pretrain import get_recipe, with_options

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
