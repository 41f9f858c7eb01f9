"""Defines the recipes for linear probing and fine-tuning.

Sources: He et al. 2021, Tables 9 (fine-tuning), 10 (linear probe) and 11 (from scratch). Where the published code
(its FINETUNE.md) differs, its values are used: ViT-B layer decay 0.65, drop path 0.1, 0.2 and 0.3 for B, L and H.
"""

import dataclasses
from collections.abc import Callable

from patchmill.trainer.config.evaluate import AugmentConfig, FinetuneConfig, FitConfig, ProbeConfig, SubjectConfig
from patchmill.trainer.config.model import ModelConfig
from patchmill.trainer.config.pretrain import OptimConfig
from patchmill.trainer.recipes.cifar import CIFAR_FINETUNE, CIFAR_PROBE
from patchmill.trainer.recipes.pretrain import mae_vit_b16, mae_vit_h14, mae_vit_l16


def probe_vit_b16() -> ProbeConfig:
    """Linear probe of ViT-B: batch 16384, 90 epochs, LARS with lr 0.1 * batch / 256 (67.8 % on ImageNet, published)."""
    return ProbeConfig()


def probe_vit_l16() -> ProbeConfig:
    """Linear probe of ViT-L and ViT-H: 50 epochs (76.0 % and 77.2 %, published)."""
    return ProbeConfig(fit=FitConfig(global_batch=16384, epochs=50))


def finetune_vit_b16() -> FinetuneConfig:
    """Fine-tuning of ViT-B: batch 1024, 100 epochs, layer decay 0.65 (83.6 %, published)."""
    return FinetuneConfig(layer_decay=0.65)


def finetune_vit_l16() -> FinetuneConfig:
    """Fine-tuning of ViT-L: 50 epochs, base lr 1e-3, drop path 0.2 (85.9 %, published)."""
    config = FinetuneConfig(drop_path=0.2, fit=FitConfig(epochs=50))
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, blr=1e-3))


def finetune_vit_h14() -> FinetuneConfig:
    """Fine-tuning of ViT-H: as ViT-L with drop path 0.3 (86.9 %, published)."""
    return dataclasses.replace(finetune_vit_l16(), drop_path=0.3)


def scratch_vit_b16() -> FinetuneConfig:
    """Supervised ViT-B from random weights: batch 4096, 300 epochs, weight decay 0.3, moving average (82.3 %)."""
    return _scratch(mae_vit_b16().model, epochs=300, drop_path=0.1)


def scratch_vit_l16() -> FinetuneConfig:
    """Supervised ViT-L from random weights: 200 epochs, drop path 0.2 (82.6 %, published)."""
    return _scratch(mae_vit_l16().model, epochs=200, drop_path=0.2)


def scratch_vit_h14() -> FinetuneConfig:
    """Supervised ViT-H from random weights: as ViT-L (83.1 %, published)."""
    return _scratch(mae_vit_h14().model, epochs=200, drop_path=0.2)


def _scratch(model: ModelConfig, *, epochs: int, drop_path: float) -> FinetuneConfig:
    return FinetuneConfig(
        subject=SubjectConfig(model=model),
        layer_decay=1.0,
        drop_path=drop_path,
        average=0.9999,
        augment=AugmentConfig(erase=0.0),
        optim=OptimConfig(blr=1e-4, warmup_epochs=20, weight_decay=0.3, betas=(0.9, 0.95)),
        fit=FitConfig(global_batch=4096, epochs=epochs),
    )


PROBE_RECIPES: dict[str, Callable[[], ProbeConfig]] = {
    "probe-vit-b16": probe_vit_b16,
    "probe-vit-l16": probe_vit_l16,
    "probe-vit-h14": probe_vit_l16,
    **CIFAR_PROBE,
}

FINETUNE_RECIPES: dict[str, Callable[[], FinetuneConfig]] = {
    "finetune-vit-b16": finetune_vit_b16,
    "finetune-vit-l16": finetune_vit_l16,
    "finetune-vit-h14": finetune_vit_h14,
    "scratch-vit-b16": scratch_vit_b16,
    "scratch-vit-l16": scratch_vit_l16,
    "scratch-vit-h14": scratch_vit_h14,
    **CIFAR_FINETUNE,
}
