"""Mixes images and labels: label smoothing, mixup and cutmix.

Image i is mixed with image B - 1 - i, with one share for the whole batch, as in the published fine-tuning (timm's
`Mixup`, mode "batch", which picks mixup or cutmix with equal probability). The draw is a function of the caller's key:
seed, epoch, step, rank and part of the batch.

Shapes: B images, A classes.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from patchmill.trainer.config.evaluate import AugmentConfig


class Mix(NamedTuple):
    """The draw for one batch."""

    share: float
    """weight of each image's own label, 0 to 1"""
    box: tuple[int, int, int, int] | None
    """rows and columns [top, bottom) x [left, right) taken from the other image; None: all pixels are blended"""


def draw_mix(config: AugmentConfig, size_hw: tuple[int, int], key: tuple[int, ...]) -> Mix:
    """Draws mixup or cutmix; the share is 1 when both are off."""
    rng = np.random.default_rng(key)
    switch, (mixup, cutmix) = rng.random(), (config.mixup, config.cutmix)
    if cutmix and (not mixup or switch < 0.5):
        return cut_box(rng.beta(cutmix, cutmix), size_hw, rng)
    return Mix(float(rng.beta(mixup, mixup)), None) if mixup else Mix(1.0, None)


def cut_box(share: float, size_hw: tuple[int, int], rng: np.random.Generator) -> Mix:
    """Draws a box of area (1 - share), clips it at the border, and returns it with the share that remains."""
    height, width = size_hw
    rows, columns = (int(side * math.sqrt(1 - share)) for side in size_hw)
    y, x = int(rng.integers(height)), int(rng.integers(width))
    top, bottom = max(y - rows // 2, 0), min(y + rows // 2, height)
    left, right = max(x - columns // 2, 0), min(x + columns // 2, width)
    return Mix(1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))


def mix_images(images_BCHW: Tensor, mix: Mix) -> Tensor:
    """Returns the mixed images; leaves the argument unchanged."""
    if mix.share == 1:
        return images_BCHW
    other_BCHW = images_BCHW.flip(0)
    if mix.box is None:
        return images_BCHW * mix.share + other_BCHW * (1 - mix.share)
    top, bottom, left, right = mix.box
    mixed_BCHW = images_BCHW.clone()
    mixed_BCHW[:, :, top:bottom, left:right] = other_BCHW[:, :, top:bottom, left:right]
    return mixed_BCHW


def mix_labels(labels_B: Tensor, num_classes: int, smoothing: float, mix: Mix) -> Tensor:
    """Soft labels fp32 [B, A] that sum to 1.

    Example: labels [0, 2], 4 classes, smoothing 0.2, share 0.75: row 0 is 0.05 everywhere, plus 0.8 * 0.75 at class 0
    and 0.8 * 0.25 at class 2: [0.65, 0.05, 0.25, 0.05].
    """
    hard_BA = F.one_hot(labels_B, num_classes).float()
    mixed_BA = hard_BA * mix.share + hard_BA.flip(0) * (1 - mix.share)
    return mixed_BA * (1 - smoothing) + smoothing / num_classes


def soft_cross_entropy(logits_BA: Tensor, target_BA: Tensor) -> Tensor:
    """Mean over the batch of -sum target * log softmax(logits); scalar fp32."""
    return torch.sum(-target_BA * F.log_softmax(logits_BA.float(), -1), -1).mean()
