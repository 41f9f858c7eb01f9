"""Defines the recipes for CIFAR-10 at 32 px: pretraining, probing and fine-tuning.

`nano` is a model that two CPU cores train in minutes; docs/results.md has its accuracies. ViT-Tiny and -Small, at
patch 4 or 2, are for a GPU. The probe uses the published optimizer with a batch suited to 50,000 images.
"""

import dataclasses
from collections.abc import Callable

from patchmill.pipeline.config import EpochConfig
from patchmill.trainer.config.evaluate import FinetuneConfig, FitConfig, ProbeConfig, SubjectConfig, TestConfig
from patchmill.trainer.config.model import ModelConfig
from patchmill.trainer.config.pretrain import OptimConfig, PretrainConfig, TrainConfig

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
"""of the training images, in 0..1 units"""


def cifar_model(width: int, depth: int, heads: int, patch_size: int, decoder: tuple[int, int, int]) -> ModelConfig:
    """A model at 32 px; `decoder` is its width, blocks and heads."""
    return ModelConfig(
        image_size=32,
        patch_size=patch_size,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        decoder_embed_dim=decoder[0],
        decoder_depth=decoder[1],
        decoder_num_heads=decoder[2],
        mean=MEAN,
        std=STD,
    )


NANO = cifar_model(192, 4, 3, 4, (96, 1, 3))


def mae_cifar_nano_p4() -> PretrainConfig:
    """4 blocks of width 192, patch 4, 16 epochs: for a CPU."""
    return PretrainConfig(
        model=NANO,
        optim=OptimConfig(blr=2.4e-3, warmup_epochs=2),
        train=TrainConfig(global_batch=128, total_epochs=16, save_every_steps=500),
    )


def umae_cifar_nano_p4() -> PretrainConfig:
    """`mae-cifar-nano-p4` with U-MAE's term at its published weight, otherwise unchanged."""
    config = mae_cifar_nano_p4()
    return dataclasses.replace(config, model=dataclasses.replace(config.model, uniformity_weight=0.01))


def mae_cifar_tiny_p4() -> PretrainConfig:
    """ViT-Tiny, patch 4, 800 epochs."""
    return _mae(cifar_model(192, 12, 3, 4, (192, 4, 3)))


def mae_cifar_tiny_p2() -> PretrainConfig:
    """ViT-Tiny, patch 2 (256 patches), 800 epochs."""
    return _mae(cifar_model(192, 12, 3, 2, (192, 4, 3)))


def mae_cifar_small_p4() -> PretrainConfig:
    """ViT-Small, patch 4, 800 epochs."""
    return _mae(cifar_model(384, 12, 6, 4, (256, 4, 4)))


def mae_cifar_small_p2() -> PretrainConfig:
    """ViT-Small, patch 2 (256 patches), 800 epochs."""
    return _mae(cifar_model(384, 12, 6, 2, (256, 4, 4)))


def probe_cifar() -> ProbeConfig:
    """Linear probe with batch 1024, 90 epochs."""
    return ProbeConfig(test=TestConfig(crop_fraction=1.0), fit=FitConfig(global_batch=1024, epochs=90))


def probe_cifar_nano() -> ProbeConfig:
    """Linear probe for a CPU: batch 256, 6 epochs; so few updates need a much larger base rate."""
    return ProbeConfig(
        test=TestConfig(crop_fraction=1.0),
        optim=OptimConfig(blr=4.0, warmup_epochs=1, weight_decay=0.0),
        fit=FitConfig(global_batch=256, epochs=6, test_every_epochs=3),
    )


def finetune_cifar() -> FinetuneConfig:
    """Fine-tuning with batch 1024, 100 epochs; larger crops than at 224 px."""
    return FinetuneConfig(
        data=EpochConfig(scale=(0.4, 1.0)),
        test=TestConfig(crop_fraction=1.0),
        optim=OptimConfig(blr=1e-3, min_lr=1e-6, warmup_epochs=5, betas=(0.9, 0.999)),
    )


def finetune_cifar_nano() -> FinetuneConfig:
    """Fine-tuning for a CPU: batch 128, 3 epochs, without the regularisation that only pays in long schedules."""
    config = finetune_cifar()
    return dataclasses.replace(
        config,
        augment=dataclasses.replace(config.augment, ops=0, mixup=0.0, cutmix=0.0, erase=0.0),
        drop_path=0.0,
        optim=dataclasses.replace(config.optim, blr=2e-3, warmup_epochs=1),
        fit=FitConfig(global_batch=128, epochs=3),
    )


def scratch_cifar_nano() -> FinetuneConfig:
    """Supervised training of the nano model from random weights: the same schedule, no layer decay."""
    return dataclasses.replace(finetune_cifar_nano(), subject=SubjectConfig(model=NANO), layer_decay=1.0)


def _mae(model: ModelConfig) -> PretrainConfig:
    return PretrainConfig(
        model=model,
        optim=OptimConfig(blr=6e-4, warmup_epochs=40),
        train=TrainConfig(global_batch=1024, total_epochs=800),
    )


CIFAR_PRETRAIN: dict[str, Callable[[], PretrainConfig]] = {
    "mae-cifar-nano-p4": mae_cifar_nano_p4,
    "umae-cifar-nano-p4": umae_cifar_nano_p4,
    "mae-cifar-tiny-p4": mae_cifar_tiny_p4,
    "mae-cifar-tiny-p2": mae_cifar_tiny_p2,
    "mae-cifar-small-p4": mae_cifar_small_p4,
    "mae-cifar-small-p2": mae_cifar_small_p2,
}

CIFAR_PROBE: dict[str, Callable[[], ProbeConfig]] = {
    "probe-cifar": probe_cifar,
    "probe-cifar-nano": probe_cifar_nano,
}

CIFAR_FINETUNE: dict[str, Callable[[], FinetuneConfig]] = {
    "finetune-cifar": finetune_cifar,
    "finetune-cifar-nano": finetune_cifar_nano,
    "scratch-cifar-nano": scratch_cifar_nano,
}
