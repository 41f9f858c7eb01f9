"""Measures how many directions features use, which shows their collapse.

The spectrum is the features' standard deviation along each principal axis: the singular values of the centred features
[N, D], divided by sqrt(N) to be independent of the number of images. Centring leaves min(N - 1, D) of them.

    effective rank = exp(-sum p ln p),  p = singular values over their sum

(Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality"; the values themselves are
normalised, not their squares.) It is 1 when one direction is left and min(N - 1, D) when all are equal. RankMe
(Garrido et al. 2023) is the same formula without centring.

Shapes: B images of this rank, N images, D width.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from patchmill.pipeline.batch import Batch
from patchmill.trainer.engine.step import micro_batches
from patchmill.trainer.engine.world import World


class Spectrum(NamedTuple):
    """Spread of a set of features."""

    effective_rank: float
    """0 where all features are equal; NaN where one is not finite"""
    singular_values: list[float]
    """min(N - 1, D) of them, largest first; none where a feature is not finite"""
    images: int
    """N"""


def take_spectrum(features_ND: Tensor) -> Spectrum:
    """Computes the spectrum of the features of at least two images, in fp64 on their device.

    Example: [[0, 0], [2, 0], [0, 2], [2, 2]] spreads equally along both axes: singular values 1, 1; effective rank 2.
    """
    count, width = features_ND.shape
    if not features_ND.isfinite().all():
        return Spectrum(math.nan, [], count)
    centred_ND = features_ND.double() - features_ND.double().mean(0)
    values = torch.linalg.svdvals(centred_ND)[: min(count - 1, width)] / math.sqrt(count)
    return Spectrum(effective_rank(values), values.tolist(), count)


def effective_rank(singular_values: Tensor) -> float:
    """exp of the entropy of the singular values over their sum; 0 where all are 0."""
    total = singular_values.sum()
    if total == 0:
        return 0.0
    return float(torch.special.entr(singular_values / total).sum().exp())


@torch.no_grad()
def batch_features(model: nn.Module, batch: Batch, parts: int, world: World) -> Tensor:
    """Class tokens of a global training batch (cropped, masked): fp32 [N, D] in main memory.

    A collective call that waits for the device; it draws nothing and leaves the model unchanged. It runs without
    autocast, because half precision's noise would hide how far the small singular values have fallen.

    Args:
        model: the bare model; calling it gathers sharded weights.
        parts: number of passes to split this rank's images into.
    """
    cls_BD = torch.cat([model(part.images, part.plan).latent[:, 0].float() for part in micro_batches(batch, parts)])
    return torch.cat(world.gather(cls_BD))
