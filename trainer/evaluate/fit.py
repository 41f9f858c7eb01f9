"""Trains a classifier on labelled batches: the loop that probing and fine-tuning share.

    run/
      config.toml  state.safetensors (until it is finished)
      results.json  curve.png  confusion.png  confusion.json  classifier.safetensors

Every draw depends on seed, epoch, step and sample alone, so a resumed run ends with the same weights.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from patchmill.pipeline.batch import Batch
from patchmill.pipeline.loader import Loader
from patchmill.trainer.config.evaluate import FinetuneConfig, FitConfig, ProbeConfig
from patchmill.trainer.config.pretrain import OptimConfig
from patchmill.trainer.engine.optim import learning_rate
from patchmill.trainer.engine.parallel import KEEP_BUFFERS
from patchmill.trainer.engine.step import Guard, PartLoss, set_learning_rate, update
from patchmill.trainer.engine.world import StopVote, World
from patchmill.trainer.evaluate.scores import Scores
from patchmill.trainer.evaluate.state import Learning, fixed_options, load_state, save_state


class Progress(NamedTuple):
    """How far a fit has come."""

    step: int
    total_steps: int
    history: list[dict[str, float]]
    """one entry per epoch: epoch, training loss, and top1, top5, test_loss where the test data were classified"""


class Fitted(NamedTuple):
    """How a fit ended."""

    step: int
    total_steps: int
    history: list[dict[str, float]]
    scores: Scores | None
    """of the last epoch; None when the fit was stopped"""
    interrupted: str | None
    seconds: float
    """spent in this process"""


class Fit(NamedTuple):
    """What to train, and how."""

    run: Path
    learning: Learning
    loss: Callable[[nn.Module, Batch, int], Tensor]
    """scalar loss, given the model to call (perhaps wrapped), a part of a batch and the part's number"""
    test: Callable[[], Scores]
    average: float | None
    """decay of the moving average"""


def fit(
    task: Fit,
    config: ProbeConfig | FinetuneConfig,
    about: dict[str, Any],
    loader: Loader,
    world: World,
    stop: list[str],
    on_progress: Callable[[Progress], None],
) -> Fitted:
    """Trains to the end of the schedule, or until `stop` has an entry; continues from a saved state.

    Args:
        about: facts that a saved state must share with this run, in addition to the config.
    Raises:
        ValueError: the saved state has other options, or the loss is not finite.
        OSError: the run folder cannot be written.
    """
    options = fixed_options(config) | about
    saved = load_state(task.run, task.learning, options) if config.resume == "auto" else None
    step, history = (saved["step"], saved["history"]) if saved else (0, [])
    loss_sum = torch.tensor(saved["loss_sum"] if saved else 0.0, device=world.device, dtype=torch.float64)
    per_epoch = loader.steps_per_epoch
    total = config.fit.epochs * per_epoch
    loader.seek(step // per_epoch, step % per_epoch)
    train_step, batches, vote = _train_step(task, config, world), iter(loader), StopVote(world)
    scores, stopped, began = None, False, time.time()
    while step < total and not stopped:
        rate = _rate(config.optim, config.fit, step, per_epoch)
        loss_sum += train_step(next(batches), rate)
        step += 1
        stopped = vote.cast(bool(stop)) and step < total
        epoch_ends = step % per_epoch == 0
        if epoch_ends:
            entry = {"epoch": step // per_epoch, "loss": _mean_loss(loss_sum, per_epoch, step, world), "lr": rate}
            loss_sum.zero_()
            if step == total or entry["epoch"] % config.fit.test_every_epochs == 0:
                scores = task.test()
                entry |= {"top1": scores.top1, "top5": scores.top5, "test_loss": scores.loss}
            history.append(entry)
        on_progress(Progress(step, total, history))
        if (epoch_ends or stopped or step % config.fit.save_every_steps == 0) and world.is_first:
            # the saved sum is the first rank's; it only feeds the report, no weight depends on it
            state = {"step": step, "history": history, "options": options, "loss_sum": loss_sum.item()}
            save_state(task.run, task.learning, state)
    vote.close()
    if scores is None and step == total:
        scores = task.test()
    world.barrier()
    interrupted = (stop[0] if stop else "a signal to another rank") if step < total else None
    return Fitted(step, total, history, scores, interrupted, time.time() - began)


def check_batch(config: ProbeConfig | FinetuneConfig, world: World) -> None:
    """Raises ValueError when the global batch does not split evenly."""
    parts = world.size * config.fit.accum_steps
    if config.fit.global_batch % parts:
        raise ValueError(
            f"fit.global_batch {config.fit.global_batch} cannot be split evenly over {world.size} ranks and "
            f"fit.accum_steps {config.fit.accum_steps}; choose a multiple of {parts}"
        )


def _train_step(task: Fit, config: ProbeConfig | FinetuneConfig, world: World) -> Callable[[Batch, float], Tensor]:
    """A function of batch and learning rate: one update and its moving average; returns this rank's mean loss."""
    learning, guard = task.learning, Guard(world.device)
    forward, named = _distributed(learning.model, world), dict(learning.model.named_parameters())

    def part_loss(model: nn.Module, part: Batch, number: int) -> PartLoss:
        return PartLoss(task.loss(model, part, number))

    def train_step(batch: Batch, rate: float) -> Tensor:
        set_learning_rate(learning.optimizer, rate)
        accum_steps, clip_grad = config.fit.accum_steps, config.optim.clip_grad
        values = update(
            forward, learning.optimizer, batch, world=world, guard=guard, accum_steps=accum_steps, clip_grad=clip_grad,
            loss=part_loss,
        )  # fmt: skip
        if task.average is not None:
            for name, value in learning.average.items():
                value.lerp_(named[name].detach(), 1 - task.average)
        return values.own_loss

    return train_step


def _rate(optim: OptimConfig, fit: FitConfig, step: int, per_epoch: int) -> float:
    return learning_rate(optim, step, global_batch=fit.global_batch, steps_per_epoch=per_epoch, total_epochs=fit.epochs)


def _mean_loss(loss_sum: Tensor, per_epoch: int, step: int, world: World) -> float:
    mean = float(world.mean(loss_sum / per_epoch))
    if not math.isfinite(mean):
        raise ValueError(
            f"the loss was not finite in the epoch that ended at step {step}; remove state.safetensors and give a "
            "lower --optim.blr, --optim.clip-grad 1.0 or --fit.precision fp32"
        )
    return mean


def _distributed(model: nn.Module, world: World) -> nn.Module:
    if world.size == 1:
        return model
    ids = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, **KEEP_BUFFERS)
