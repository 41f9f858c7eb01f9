"""Runs one update: forward, backward, guard, optimizer. Nothing here waits for the device.

The guard checks on the device whether loss and gradient, averaged over ranks, are finite; all ranks decide alike. If
they are not, the fused optimizer leaves weights and moments unchanged. The host finds out at the next log step.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from patchmill.pipeline.batch import Batch
from patchmill.pipeline.observe import NOBODY, Observer
from patchmill.pipeline.plan.masks import MaskPlan
from patchmill.trainer.engine.world import World

SPIKE_WARMUP_STEPS = 100.0
"""losses to average before a loss can count as a spike"""
USUAL_LOSS_WEIGHT = 0.02
"""weight of a new loss in the running mean (the usual loss)"""
FP16_FIRST_SCALE, FP16_GROWTH_STEPS = 2.0**16, 2000.0
"""initial loss scale of fp16, and the number of good updates after which it doubles (as torch.amp.GradScaler)"""


class StepValues(NamedTuple):
    """The values of an update: fp32 scalars on the device."""

    loss: Tensor
    """mean over the images of all ranks"""
    grad_norm: Tensor
    """L2 norm of the averaged gradient before clipping"""
    skipped: Tensor
    """1 if the update was skipped, else 0"""
    own_loss: Tensor
    """mean over this rank's images; shows which rank had a loss that is not finite"""
    uniformity: Tensor
    """U-MAE's term over the images of all ranks, averaged over micro-batches; 0 for a model without it"""
    first_bad: Tensor
    """position in `Guard.names` of the first gradient that is not finite on this rank; -1 if there is none"""


class PartLoss(NamedTuple):
    """The loss of a micro-batch, for models whose output does not hold one."""

    loss: Tensor
    """mean over the images of the micro-batch"""
    uniformity: Tensor | None = None


def masked_loss(model: nn.Module, part: Batch, number: int) -> Any:
    """Runs a masked autoencoder on a micro-batch; its output has `loss`, and `uniformity` or None."""
    del number
    return model(part.images, part.plan)


class Guard:
    """Decides on the device whether to skip an update, and scales the loss for fp16. Checkpoints hold its state.

    It skips an update if loss or gradient norm is not finite, or if the loss exceeds `spike_factor` times the usual
    one. In fp16 each skipped update halves the loss scale; 2,000 good ones double it.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        fp16: bool = False,
        spike_factor: float | None = None,
        named_parameters: Iterable[tuple[str, nn.Parameter]] = (),
    ) -> None:
        """Starts with the state of a new run.

        Args:
            named_parameters: those of the model, in its order, for `first_bad`.
        """
        self.fp16, self.spike_factor = fp16, spike_factor
        # what is computed last comes first, as in the backward pass
        self._trained = [(name, p) for name, p in named_parameters if p.requires_grad][::-1]
        self.state = {
            "loss_scale": torch.tensor(FP16_FIRST_SCALE if fp16 else 1.0, device=device),
            "good_steps": torch.zeros((), device=device),
            "usual_loss": torch.zeros((), device=device),
            "losses_seen": torch.zeros((), device=device),
        }

    @property
    def names(self) -> list[str]:
        """Names of the trained parameters, roughly in the order in which the backward pass reaches them."""
        return [name for name, _ in self._trained]

    def first_bad(self, norms: dict[Tensor, Tensor]) -> Tensor:
        """Returns the position in `names` of the first parameter whose gradient norm is not finite; -1 for none.

        A value that is not finite spreads from there to the gradients of all layers below. The host does not wait.

        Args:
            norms: gradient norms of this rank by parameter.
        """
        device = self.state["loss_scale"].device
        fine = torch.zeros((), device=device)
        if not self._trained:
            return fine - 1
        bad_P = ~torch.isfinite(torch.stack([norms.get(parameter, fine) for _, parameter in self._trained]))
        return torch.where(bad_P.any(), bad_P.byte().argmax().float(), fine - 1)

    def skip(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Returns 1.0 to skip the update, else 0.0. Loss and gradient norm must be the same on all ranks."""
        state = self.state
        good = torch.isfinite(loss) & torch.isfinite(grad_norm)
        if self.spike_factor is not None:
            known = state["losses_seen"] >= SPIKE_WARMUP_STEPS
            good &= ~(known & (loss > self.spike_factor * state["usual_loss"]))
            weight = torch.where(state["losses_seen"] == 0, 1.0, USUAL_LOSS_WEIGHT)
            state["usual_loss"].copy_(torch.where(good, state["usual_loss"].lerp(loss, weight), state["usual_loss"]))
            state["losses_seen"] += good
        if self.fp16:
            state["good_steps"].copy_(torch.where(good, state["good_steps"] + 1, 0.0))
            grown = good & (state["good_steps"] >= FP16_GROWTH_STEPS)
            state["good_steps"].copy_(torch.where(grown, 0.0, state["good_steps"]))
            state["loss_scale"] *= torch.where(good, torch.where(grown, 2.0, 1.0), 0.5)
        return (~good).float()


def update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    world: World,
    guard: Guard,
    accum_steps: int = 1,
    autocast: torch.dtype | None = None,
    clip_grad: float | None = None,
    loss: Callable[[nn.Module, Batch, int], Any] = masked_loss,
    observer: Observer = NOBODY,
) -> StepValues:
    """Updates the weights once, with the optimizer's current learning rate.

    Args:
        batch: this rank's images; their number is a multiple of accum_steps.
        accum_steps: micro-batches per update.
        autocast: dtype of matrix products; None for fp32.
        clip_grad: largest gradient norm; None for no clipping.
        loss: maps the model, a micro-batch and its number, from 0, to a `PartLoss` or a model's own output.
        observer: sees the forward passes.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    scale = guard.state["loss_scale"]
    own_loss, uniformity = (torch.zeros((), device=batch.images.device) for _ in range(2))
    parts = micro_batches(batch, accum_steps)
    for number, part in enumerate(parts):
        _reduce_gradients(model, last=number == len(parts) - 1)
        with (
            observer.span("forward", len(part.images)),
            torch.autocast(batch.images.device.type, dtype=autocast, enabled=autocast is not None),
        ):
            output = loss(model, part, number)
            part_loss = output.loss / accum_steps
        (part_loss * scale if guard.fp16 else part_loss).backward()
        own_loss += part_loss.detach()
        if output.uniformity is not None:
            uniformity += output.uniformity.detach() / accum_steps
    reached = [p for p in parameters if p.grad is not None]
    gradients = cast(list[Tensor], [p.grad for p in reached])
    if guard.fp16:
        torch._foreach_mul_(gradients, 1 / scale)
    norms = _norms(gradients)
    own_norm = whole(torch.linalg.vector_norm(torch.stack(norms)))  # as torch.nn.utils.get_total_norm
    first_bad = guard.first_bad(dict(zip(reached, map(_shard, norms), strict=True)))
    # after this all ranks hold the same numbers and decide alike
    mean_loss, grad_norm = world.mean(torch.stack([own_loss, own_norm]))
    if clip_grad is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_grad, grad_norm)
    skipped = guard.skip(mean_loss, grad_norm)
    _apply(optimizer, skipped)
    return StepValues(mean_loss, grad_norm, skipped, own_loss, uniformity, first_bad)


def whole(tensor: Any) -> Tensor:
    """Gathers a sharded tensor (DTensor) on every rank, a collective call; returns any other tensor unchanged."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _norms(gradients: list[Tensor]) -> list[Tensor]:
    if hasattr(gradients[0], "to_local"):
        return [torch.linalg.vector_norm(gradient) for gradient in gradients]
    return list(torch._foreach_norm(gradients))


def _shard(tensor: Any) -> Tensor:
    """Returns this rank's part of a sharded tensor (DTensor), and any other tensor unchanged."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of all parameter groups, times the group's `rate_scale` if it has one."""
    for group in optimizer.param_groups:
        rate = lr * group.get("rate_scale", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)  # a CUDA graph reads it from the device
        else:
            group["lr"] = rate


def _apply(optimizer: torch.optim.Optimizer, skipped: Tensor) -> None:
    if getattr(optimizer, "_step_supports_amp_scaling", False):  # torch's fused optimizers and evaluate/lars.py
        optimizer.grad_scale, optimizer.found_inf = None, skipped  # type: ignore[attr-defined]
        optimizer.step()
    elif not skipped.item():  # apex takes no flag on the device: only here the host waits
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _reduce_gradients(model: nn.Module, last: bool) -> None:
    """Lets only the backward pass of the last micro-batch average gradients over ranks."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = last
    elif hasattr(model, "set_requires_gradient_sync"):  # FSDP2 replaces the model's class with its own
        model.set_requires_gradient_sync(last)  # type: ignore[operator]


def micro_batches(batch: Batch, count: int) -> list[Batch]:
    """Splits a batch into `count` equal parts."""
    plan = batch.plan
    plans = zip(plan.ids_keep.chunk(count), plan.ids_mask.chunk(count), plan.ids_restore.chunk(count), strict=True)
    parts = zip(batch.images.chunk(count), plans, batch.labels.chunk(count), batch.sample_ids.chunk(count), strict=True)
    return [
        dataclasses.replace(batch, images=images, plan=MaskPlan(*plan), labels=labels, sample_ids=ids)
        for images, plan, labels, ids in parts
    ]
