"""labelled batches -> [fit] -> a trained classifier: the loop that probing and fine-tuning share.

    run/
      config.toml  state.safetensors (until it is finished)
      results.json  curve.png  confusion.png  confusion.json  classifier.safetensors

Every draw depends on seed, epoch, step and sample alone, so that a resumed run ends with the same weights.
"""

import dataclasses
import json
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
from patchmill.trainer.engine.world import StopVote, World
from patchmill.trainer.evaluate.scores import Scores
from patchmill.trainer.evaluate.state import Learning, load_state, save_state

FREE_OPTIONS = {
    *("out", "device", "resume", "test", "subject.checkpoint", "fit.test_every_epochs", "fit.save_every_steps"),
    *(f"data.{name}" for name in ("path", "decoder", "workers", "prefetch_batches", "quarantine_path")),
    *(f"data.{name}" for name in ("timeout_seconds", "cache_dir", "cache_limit_gib")),
}
"""places, devices and what only reports: a run may go on with others"""


class Progress(NamedTuple):
    """Where a fit stands, for whoever draws it."""

    step: int
    total_steps: int
    history: list[dict[str, float]]
    """one entry an epoch: epoch, loss (of training), and top1, top5, test_loss where the test data were classified"""


class Fitted(NamedTuple):
    """How a fit ended."""

    step: int
    total_steps: int
    history: list[dict[str, float]]
    scores: Scores | None
    """of the last epoch; None when it was stopped"""
    interrupted: str | None
    seconds: float
    """of this process"""


class Fit(NamedTuple):
    """What there is to fit."""

    run: Path
    learning: Learning
    loss: Callable[[nn.Module, Batch, int], Tensor]
    """of the model as it is called (perhaps wrapped), a part of a batch, and the part's number; scalar"""
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
    """Trains to the end of the schedule, or until `stop` has an entry; goes on where a saved state stands.

    Args:
        about: what a state must agree with to be continued, beside the config.
    Raises:
        ValueError: a state of other options, or a loss that is not finite.
        OSError: the run folder cannot be written.
    """
    options = fixed_options(config) | about
    saved = load_state(task.run, task.learning, options) if config.resume == "auto" else None
    step, history = (saved["step"], saved["history"]) if saved else (0, [])
    loss_sum = torch.tensor(saved["loss_sum"] if saved else 0.0, device=world.device, dtype=torch.float64)
    per_epoch = loader.steps_per_epoch
    total = config.fit.epochs * per_epoch
    loader.seek(step // per_epoch, step % per_epoch)
    forward, batches, vote, began = _distributed(task.learning.model, world), iter(loader), StopVote(world), time.time()
    scores, stopped = None, False
    while step < total and not stopped:
        rate = _rate(config.optim, config.fit, step, per_epoch)
        loss_sum += update(forward, task, next(batches), rate, config.fit.accum_steps, config.optim.clip_grad)
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
            # the sum so far is this rank's alone: it is for the report, and no weight depends on it
            state = {"step": step, "history": history, "options": options, "loss_sum": loss_sum.item()}
            save_state(task.run, task.learning, state)
    vote.close()
    if scores is None and step == total:
        scores = task.test()
    world.barrier()
    interrupted = (stop[0] if stop else "a signal to another rank") if step < total else None
    return Fitted(step, total, history, scores, interrupted, time.time() - began)


def update(
    forward: nn.Module, task: Fit, batch: Batch, rate: float, accum_steps: int, clip_grad: float | None
) -> Tensor:
    """One update of what learns, and of its moving average; the mean loss of this rank's images."""
    optimizer, total = task.learning.optimizer, torch.zeros((), device=batch.images.device)
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate_scale", 1.0)
    for number, part in enumerate(_parts(batch, accum_steps)):
        if isinstance(forward, DistributedDataParallel):
            forward.require_backward_grad_sync = number == accum_steps - 1
        loss = task.loss(forward, part, number) / accum_steps
        loss.backward()
        total += loss.detach()
    if clip_grad is not None:
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip_grad)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if task.average is not None:
        now = dict(task.learning.model.named_parameters())
        for name, value in task.learning.average.items():
            value.lerp_(now[name].detach(), 1 - task.average)
    return total


def fixed_options(config: ProbeConfig | FinetuneConfig) -> dict[str, Any]:
    """The options that shape the weights, flat and fit for JSON: without places, devices and what only reports."""

    def flat(value: Any, name: str) -> dict[str, Any]:
        if name in FREE_OPTIONS:
            return {}
        if isinstance(value, dict):
            return {k: v for key, each in value.items() for k, v in flat(each, f"{name}.{key}".lstrip(".")).items()}
        return {name: value}

    return json.loads(json.dumps(flat(dataclasses.asdict(config), "")))


def check_batch(config: ProbeConfig | FinetuneConfig, world: World) -> None:
    """Raises ValueError when a global batch cannot be split evenly."""
    parts = world.size * config.fit.accum_steps
    if config.fit.global_batch % parts:
        raise ValueError(
            f"fit.global_batch {config.fit.global_batch} cannot be split evenly over {world.size} ranks and "
            f"fit.accum_steps {config.fit.accum_steps}; choose a multiple of {parts}"
        )


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
    return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)


def _parts(batch: Batch, count: int) -> list[Batch]:
    pieces = zip(batch.images.chunk(count), batch.labels.chunk(count), batch.sample_ids.chunk(count), strict=True)
    return [dataclasses.replace(batch, images=i, labels=k, sample_ids=s) for i, k, s in pieces]
