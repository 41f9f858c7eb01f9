"""metrics, predictions -> [pictures] -> PNG: what people would rather look at.

Figure 2 of He et al. 2021 for reconstructions (masked | reconstruction | original) and the loss curve of a run.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchmill.kernels.gather import gather_patches
from patchmill.pipeline.masks import MaskPlan
from patchmill.trainer.vit import VisionTransformer

GREY = 128
"""grey level of a masked patch"""


@torch.no_grad()
def reconstruct(model: VisionTransformer, images_BHWC: Tensor, plan: MaskPlan) -> tuple[Tensor, Tensor]:
    """The masked images and their reconstructions (visible patches as they are, masked ones as predicted).

    A model of normalised pixels predicts each patch up to its mean and standard deviation: those of the true patch are
    used, as the published demo does, so that brightness and contrast of its patches are given, not predicted.

    Args:
        images_BHWC: uint8.
        plan: which patches the model sees.
    Returns:
        two uint8 tensors [B, H, W, C].
    Raises:
        ValueError: a model of dvae tokens, which have no look.
    """
    c = model.config
    pred_BMP = model.target.patches(model(images_BHWC, plan).pred, images_BHWC, plan.ids_mask)
    unit = ((0.0,) * c.channels, (1.0,) * c.channels)
    per_value = c.patch_size**2
    mean, std = (torch.tensor(v, device=pred_BMP.device).repeat(per_value) for v in (c.mean, c.std))
    levels_BMP = ((pred_BMP * std + mean) * 255).round().clamp(0, 255)
    visible_BKP = gather_patches(images_BHWC, plan.ids_keep, c.patch_size, *unit, torch.float32) * 255
    hidden_BMP = torch.full_like(levels_BMP, GREY)
    return tuple(
        _unpatchify(torch.cat([visible_BKP.round(), filling], dim=1), plan, model.grid_hw, c.patch_size)
        for filling in (hidden_BMP, levels_BMP)
    )  # type: ignore[return-value]


def write_loss_curve(lines: list[dict], path: Path, evaluations: Sequence[dict] = ()) -> None:
    """Writes a PNG of the loss over the steps of a run, raw and smoothed, with the learning rate beside it; below it
    the accuracies of `evaluations` (lines of evaluations.jsonl), where there are any."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = [line for line in lines if line["loss"] is not None]
    steps, losses = [line["step"] for line in points], np.array([line["loss"] for line in points])
    window = max(1, len(losses) // 50)
    smooth = np.convolve(
        np.pad(losses, (window // 2, window - 1 - window // 2), "edge"), np.ones(window) / window, "valid"
    )
    panels = 2 if evaluations else 1
    figure, column = pyplot.subplots(
        panels, 1, figsize=(8, 1.5 + 3 * panels), dpi=120, layout="constrained", sharex=True, squeeze=False
    )
    axes = column[0, 0]
    axes.plot(steps, losses, color="#b9c7d9", linewidth=1, label="each step")
    axes.plot(steps, smooth, color="#1f4e8c", linewidth=2, label=f"mean of {window} steps")
    axes.set(ylabel="loss (masked patches)", title="Pretraining loss")
    column[-1, 0].set_xlabel("step")
    axes.grid(alpha=0.25)
    rate = axes.twinx()
    rate.plot(
        steps, [line["lr"] for line in points], color="#c98a2b", linewidth=1, linestyle=":", label="learning rate"
    )
    rate.set_ylabel("learning rate")
    axes.legend(handles=[*axes.get_lines(), *rate.get_lines()], loc="upper right")
    if evaluations:
        _draw_accuracies(column[1, 0], evaluations)
    figure.savefig(path)
    pyplot.close(figure)


def _draw_accuracies(axes: Any, evaluations: Sequence[dict]) -> None:
    steps = [line["step"] for line in evaluations]
    for key, name, color in (("knn_top1", "kNN", "#1f4e8c"), ("probe_top1", "linear probe", "#2f7d4f")):
        axes.plot(steps, [100 * line[key] for line in evaluations], color=color, marker="o", markersize=3, label=name)
    axes.set(ylabel="top-1 accuracy (%)", title="What the features are worth so far")
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right")


def _unpatchify(patches_BLP: Tensor, plan: MaskPlan, grid_hw: tuple[int, int], patch_size: int) -> Tensor:
    """Patches in shuffled order (kept, then masked) back to uint8 images [B, H, W, C]."""
    order = plan.ids_restore.long()[..., None].expand(-1, -1, patches_BLP.shape[-1])
    rows, across = grid_hw
    grid = patches_BLP.gather(1, order).view(len(patches_BLP), rows, across, patch_size, patch_size, -1)
    return grid.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2).to(torch.uint8)
