"""Computes U-MAE's uniformity term of the loss, which works against dimensional collapse.

    R = mean over all pairs (i, j), i = j included, of cosine(feature i, feature j) ** 2
    loss = reconstruction + weight * R                (Zhang et al. 2022, arXiv 2210.08344, section 4; weight 0.01)

R is 1 when all features are collinear and at best 1 / D for many features of width D. It does not need the N x N
cosines: with unit rows Z, R = |Z Z^T|^2 / N^2 = |Z^T Z|^2 / N^2, and Z^T Z [D, D] is a sum over images. Each rank sums
its own part, and one all-reduce of D * D numbers replaces gathering all features; value and gradient are the same.

The published code (zhangq327/U-MAE, loss_func.py and models_mae.py) has two properties that `as-published` keeps:

- Its gather gives each rank only its own slice of the gradient. Every rank's loss is R of the whole batch, and DDP
  averages over ranks: the result is the gradient of R divided by the number of ranks.
- The class token passes the encoder's last norm twice: it is taken from features that are already normed.

`global-gradient` fixes both: the gradient is that of R for any number of ranks, and the norm is applied once.
With W ranks, `as-published` with weight w has the gradient of `global-gradient` with weight w / W, apart from the norm;
the published run had 8 GPUs. The published matrix products run in fp16 under autocast; here they run in fp32.

Shapes: B images of this rank, W ranks, N = B * W, D width.
"""

from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from patchmill.trainer.config.model import ModelConfig

Form = Literal["as-published", "global-gradient"]


def uniformity_loss(features_BD: Tensor, form: Form = "as-published") -> Tensor:
    """Computes the mean squared cosine over all pairs of features of all ranks, each with itself included.

    It is a collective call if a process group is open; every rank must have the same number of features. With gradient
    accumulation it covers one micro-batch, as published.

    Args:
        features_BD: floating point; half precision is computed in fp32.
        form: which gradient the average over ranks has (see above); the value is the same.
    Returns:
        a scalar in fp32 (fp64 for fp64 features), the same on every rank.
    """
    features_BD = features_BD if features_BD.dtype == torch.float64 else features_BD.float()
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if form == "global-gradient" and ranks > 1:
        held_BD = features_BD.detach()
        features_BD = held_BD + ranks * (features_BD - held_BD)  # same values, W times the gradient
    with torch.autocast(features_BD.device.type, enabled=False):
        unit_BD = F.normalize(features_BD, dim=-1)
        moments_DD = unit_BD.T @ unit_BD
        if ranks > 1:
            total_DD = moments_DD.detach().clone()
            dist.all_reduce(total_DD)
            moments_DD = total_DD + (
                moments_DD - moments_DD.detach()
            )  # value: sum over all ranks; gradient: this rank's part
        return moments_DD.square().sum() / (len(unit_BD) * ranks) ** 2


def add_uniformity(loss: Tensor, cls_BD: Tensor, norm: nn.Module, config: ModelConfig) -> tuple[Tensor, Tensor | None]:
    """Adds the weighted term to the loss; returns (loss, term), or (loss, None) unchanged if the weight is 0.

    Args:
        cls_BD: class tokens after the encoder's last norm.
        norm: that norm, which the published form applies again.
    """
    if config.uniformity_weight == 0:
        return loss, None
    features_BD = norm(cls_BD) if config.uniformity_form == "as-published" else cls_BD
    term = uniformity_loss(features_BD, config.uniformity_form)
    return loss + config.uniformity_weight * term, term
