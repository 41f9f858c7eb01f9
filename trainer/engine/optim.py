"""Builds the optimizer and computes the learning rate: which parameters decay, and the schedule.

Source: the published `optim_factory.param_groups_weight_decay`, `lr_sched.adjust_learning_rate` and `lr_decay`
(He et al. 2021, Tables 8 and 9).
"""

import importlib
import importlib.util
import math
from types import ModuleType

import torch
from torch import nn

from patchmill.trainer.config.pretrain import OptimConfig


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: yes for parameters of two or more dimensions, except biases.

    Class and mask token have three dimensions and are decayed, as published.
    """
    return parameter.ndim > 1 and not name.endswith(".bias")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Splits the trainable parameters into two groups: decayed and not decayed."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in trainable if is_decayed(name, p)], "weight_decay": weight_decay},
        {"params": [p for name, p in trainable if not is_decayed(name, p)], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Builds the optimizer for the trainable parameters: torch's fused AdamW, or one of NVIDIA apex.

    Raises:
        ValueError: the config asks for apex and it is not installed.
    """
    groups = parameter_groups(model, config.weight_decay)
    if config.kind == "adamw":
        return torch.optim.AdamW(groups, lr=config.blr, betas=config.betas, fused=True)
    apex = find_apex()
    if config.kind == "apex-adam":
        return apex.FusedAdam(groups, lr=config.blr, betas=config.betas, adam_w_mode=True)
    # switch off LAMB's own clipping: optim.clip_grad decides about clipping
    return apex.FusedLAMB(groups, lr=config.blr, betas=config.betas, adam_w_mode=True, max_grad_norm=0.0)


def find_apex() -> ModuleType:
    """Imports NVIDIA's `apex.optimizers` and checks that its CUDA code is present.

    Raises:
        ValueError: apex is missing, was built without CUDA code, or is PyPI's unrelated package of that name.
    """
    remedy = "build NVIDIA apex from source (docs/scale.md) or leave optim.kind at adamw, which is just as fast"
    if importlib.util.find_spec("apex") is None:
        raise ValueError(f"optim.kind needs NVIDIA apex, which is not installed; {remedy}")
    try:
        optimizers = importlib.import_module("apex.optimizers")
        importlib.import_module("amp_C")
    except ImportError as error:
        if error.name == "amp_C":
            raise ValueError(f"NVIDIA apex was installed without its CUDA code (amp_C is missing); {remedy}") from error
        raise ValueError(
            "the installed package `apex` is not NVIDIA's (PyPI's apex is an unrelated project): "
            f"pip uninstall apex, then {remedy}"
        ) from error
    return optimizers


def learning_rate(
    config: OptimConfig, step: int, *, global_batch: int, steps_per_epoch: int, total_epochs: float
) -> float:
    """Computes the learning rate of an update: linear warm-up to blr * global batch / 256, then a cosine to min_lr.

    Args:
        step: updates done since the start of the run.
        total_epochs: end of the cosine; may be fractional.
    """
    peak = config.blr * global_batch / 256
    epoch = step / steps_per_epoch
    if epoch < config.warmup_epochs:
        return peak * epoch / config.warmup_epochs
    progress = (epoch - config.warmup_epochs) / max(total_epochs - config.warmup_epochs, 1 / steps_per_epoch)
    return config.min_lr + (peak - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def layer_scale(name: str, depth: int, decay: float) -> float:
    """Returns a parameter's learning-rate factor in fine-tuning: decay ** (layers above it) (published `lr_decay`).

    Embeddings are layer 0, block i is layer i + 1, everything after the blocks has factor 1.
    """
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed."):
        layer = 0
    elif name.startswith("blocks."):
        layer = int(name.split(".")[1]) + 1
    else:
        layer = depth + 1
    return decay ** (depth + 1 - layer)
