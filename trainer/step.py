"""batch -> [one update] -> model: forward, backward, guard, optimizer. Nothing here waits for the device.

A non-finite loss or gradient is found on the device and handed to the fused optimizer, which then leaves weights and
moments as they were; the host learns of it at the next log step.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from patchmill.pipeline.batch import Batch
from patchmill.pipeline.masks import MaskPlan


class StepValues(NamedTuple):
    """What an update leaves on the device; fp32 scalars."""

    loss: Tensor
    """mean over this rank's images"""
    grad_norm: Tensor
    """L2 norm of the averaged gradient before clipping"""
    skipped: Tensor
    """1 where the update was left out because loss or gradient was not finite, else 0"""


def update(
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    batch: Batch,
    *,
    lr: float,
    accum_steps: int = 1,
    autocast: torch.dtype | None = None,
    clip_grad: float | None = None,
) -> StepValues:
    """One update of the weights.

    Args:
        batch: this rank's images; its size is a multiple of accum_steps.
        lr: learning rate of this update.
        autocast: dtype of matrix products, None for fp32.
        clip_grad: largest gradient norm, None for no clipping.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    device = batch.images.device.type
    loss = torch.zeros((), device=batch.images.device)
    parts = list(_micro_batches(batch, accum_steps))
    for number, (images, plan) in enumerate(parts, 1):
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = number == len(parts)
        with torch.autocast(device, dtype=autocast, enabled=autocast is not None):
            part_loss = model(images, plan).loss / accum_steps
        part_loss.backward()
        loss += part_loss.detach()
    gradients = [p.grad for p in parameters if p.grad is not None]
    grad_norm = torch.nn.utils.get_total_norm(gradients)
    if clip_grad is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_grad, grad_norm)
    # DDP has averaged the gradients, so that one rank's NaN is in every rank's norm and all decide alike
    skipped = 1.0 - torch.isfinite(grad_norm).float()
    optimizer.grad_scale, optimizer.found_inf = None, skipped  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepValues(loss, grad_norm, skipped)


def _micro_batches(batch: Batch, count: int) -> list[tuple[Tensor, MaskPlan]]:
    plan = batch.plan
    ids = zip(plan.ids_keep.chunk(count), plan.ids_mask.chunk(count), plan.ids_restore.chunk(count), strict=True)
    return [(images, MaskPlan(*parts)) for images, parts in zip(batch.images.chunk(count), ids, strict=True)]
