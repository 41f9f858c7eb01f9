"""Defines the recipes for pretraining: named functions that return a full config.

The published recipes are those of He et al. 2021, Table 8, with the decoder of section 3: 8 blocks of width 512.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from patchmill.trainer.config.model import ModelConfig
from patchmill.trainer.config.pretrain import OptimConfig, PretrainConfig, TrainConfig
from patchmill.trainer.recipes.cifar import CIFAR_PRETRAIN
from patchmill.trainer.recipes.table1 import TABLE1

Recipe = TypeVar("Recipe", bound=Callable[[], Any])


def mae_vit_b16() -> PretrainConfig:
    """ViT-B/16 at 224 px, published hyper-parameters: batch 4096, 800 epochs."""
    return PretrainConfig()


def mae_vit_l16() -> PretrainConfig:
    """ViT-L/16 at 224 px, published hyper-parameters."""
    return PretrainConfig(model=ModelConfig(embed_dim=1024, depth=24, num_heads=16))


def mae_vit_h14() -> PretrainConfig:
    """ViT-H/14 at 224 px, published hyper-parameters."""
    return PretrainConfig(model=ModelConfig(patch_size=14, embed_dim=1280, depth=32, num_heads=16))


def mae_vit_h14_448() -> PretrainConfig:
    """ViT-H/14 at 448 px: four times the patches; recomputes activations to fit a useful batch."""
    model = ModelConfig(image_size=448, patch_size=14, embed_dim=1280, depth=32, num_heads=16)
    return PretrainConfig(model=model, train=TrainConfig(activation_checkpointing=True))


def mae_vit_b16_progressive() -> PretrainConfig:
    """The published ViT-B/16 run with growing images (160, 192, 224 px, as DailyMAE): 69 % of its FLOPs."""
    return with_options(mae_vit_b16(), train__size_schedule=((0.0, 160), (0.4, 192), (0.8, 224)))


def mae_vit_b16_1gpu() -> PretrainConfig:
    """The published ViT-B/16 run on one GPU: batch 4096 as 4 parts of 1024, compiled."""
    return with_options(mae_vit_b16(), train__accum_steps=4, train__compile=True)


def mae_vit_l16_1gpu() -> PretrainConfig:
    """The published ViT-L/16 run on one GPU: batch 4096 as 8 parts of 512, compiled."""
    return with_options(mae_vit_l16(), train__accum_steps=8, train__compile=True)


def mae_vit_h14_1gpu() -> PretrainConfig:
    """The published ViT-H/14 run on one GPU: batch 4096 as 16 parts of 256, compiled."""
    return with_options(mae_vit_h14(), train__accum_steps=16, train__compile=True)


def umae_vit_b16() -> PretrainConfig:
    """U-MAE with ViT-B/16 as published (Zhang et al. 2022; zhangq327/U-MAE): batch 1024, 200 epochs, weight 0.01.

    The published form divides the term's gradient by the number of ranks, which was 8: on W ranks give
    --model.uniformity-weight 0.00125 times W for the same gradient. Warm-up is 20 epochs, as its authors state (their
    script has 40).
    """
    return _umae(mae_vit_b16())


def umae_vit_l16() -> PretrainConfig:
    """U-MAE with ViT-L/16, the setting of `umae-vit-b16`."""
    return _umae(mae_vit_l16())


def simmim_vit_b16() -> PretrainConfig:
    """SimMIM with ViT-B/16 (Xie et al. 2022; microsoft/SimMIM, vit_base__800ep): cells of 32 px masked at 60 %, L1.

    The published run has relative positions, LayerScale, drop path 0.1 and a learning rate that drops once, at epoch
    700; here the encoder is MAE's and the rate follows a cosine.
    """
    return with_options(
        mae_vit_b16(),
        model__kind="simmim",
        model__norm_pix_loss=False,
        data__scale=(0.67, 1.0),
        mask__ratio=0.6,
        mask__cell=2,
        optim__blr=5e-5,
        optim__betas=(0.9, 0.999),
        optim__clip_grad=5.0,
        optim__warmup_epochs=10.0,
        train__global_batch=2048,
    )


def crossmae_vit_b16() -> PretrainConfig:
    """ViT-B/16 with a decoder of 12 cross-attention blocks (Fu et al. 2024). Not the same model as MAE: crossmae.py."""
    return with_options(mae_vit_b16(), model__kind="crossmae", model__decoder_depth=12)


def mae_tiny() -> PretrainConfig:
    """A model that learns on a laptop's CPU in minutes: 96 px, patch 8, 4 blocks of 192, decoder 2 x 128."""
    model = ModelConfig(
        image_size=96,
        patch_size=8,
        embed_dim=192,
        depth=4,
        num_heads=6,
        decoder_embed_dim=128,
        decoder_depth=2,
        decoder_num_heads=4,
        norm_pix_loss=False,
    )
    return PretrainConfig(
        model=model,
        optim=OptimConfig(blr=1.6e-2, warmup_epochs=4.0, clip_grad=1.0),
        train=TrainConfig(global_batch=32, total_epochs=50.0, save_every_steps=500),
    )


RECIPES: dict[str, Callable[[], PretrainConfig]] = {
    "mae-tiny": mae_tiny,
    "mae-vit-b16": mae_vit_b16,
    "mae-vit-l16": mae_vit_l16,
    "mae-vit-h14": mae_vit_h14,
    "mae-vit-h14-448": mae_vit_h14_448,
    "umae-vit-b16": umae_vit_b16,
    "umae-vit-l16": umae_vit_l16,
    "simmim-vit-b16": simmim_vit_b16,
    "crossmae-vit-b16": crossmae_vit_b16,
    "mae-vit-b16-progressive": mae_vit_b16_progressive,
    "mae-vit-b16-1gpu": mae_vit_b16_1gpu,
    "mae-vit-l16-1gpu": mae_vit_l16_1gpu,
    "mae-vit-h14-1gpu": mae_vit_h14_1gpu,
    **CIFAR_PRETRAIN,
    **TABLE1,
}


def get_recipe(name: str) -> PretrainConfig:
    """Finds a recipe by name. Raises ValueError that suggests similar names."""
    return find_recipe(RECIPES, name)()


def find_recipe(recipes: Mapping[str, Recipe], name: str) -> Recipe:
    """Finds a recipe by name. Raises ValueError that suggests similar names."""
    if name not in recipes:
        similar = difflib.get_close_matches(name, recipes, n=3, cutoff=0.5)
        question = f"did you mean {' or '.join(similar)}? " if similar else ""
        raise ValueError(f"no recipe {name!r}; {question}`patchmill recipes` lists all")
    return recipes[name]


def with_options(config: PretrainConfig, **changes: Any) -> PretrainConfig:
    """Returns a config with some options (`section__option`, or a top-level `option`) changed, and checks it.

    Example:
        with_options(mae_tiny(), train__total_steps=20, seed=3)
    """
    top: dict[str, Any] = {}
    sections: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        section, _, option = name.partition("__")
        if option:
            sections.setdefault(section, {})[option] = value
        else:
            top[name] = value
    replaced = {section: dataclasses.replace(getattr(config, section), **these) for section, these in sections.items()}
    return dataclasses.replace(config, **top, **replaced)


def _umae(config: PretrainConfig) -> PretrainConfig:
    return with_options(
        config,
        model__uniformity_weight=0.01,
        train__global_batch=1024,
        train__total_epochs=200.0,
        optim__warmup_epochs=20.0,
    )
