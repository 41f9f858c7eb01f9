"""config -> [pretrain] -> a run folder: the loop that joins loader, model, optimizer and checkpoints.

    runs/first/
      config.toml  metrics.jsonl  tensorboard/  loss.png  quarantine.jsonl (when an image was bad)
      checkpoints/step-XXXXXXXX/

The trajectory is a function of the config alone: weights come from the seed, batches from (seed, epoch, step), and a
resumed run continues bit for bit on the same kind of device.
"""

import dataclasses
import signal
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import nn

from patchmill.pipeline.loader import Loader, build_loader
from patchmill.trainer import checkpoint
from patchmill.trainer.config import PretrainConfig
from patchmill.trainer.config_file import to_toml
from patchmill.trainer.mae import MaskedAutoencoder
from patchmill.trainer.metrics import Metrics, rewind_metrics, train_flops_per_image
from patchmill.trainer.optim import build_optimizer, learning_rate
from patchmill.trainer.step import update
from patchmill.trainer.world import World, autocast_dtype, distribute, join_world, leave_world

MAX_SKIPPED_IN_A_ROW = 20
"""updates with a non-finite gradient in a row after which a run gives up"""


class Progress(NamedTuple):
    """Where a run stands, for whoever draws it."""

    step: int
    total_steps: int
    latest: dict[str, float]
    """the newest line of metrics.jsonl; empty until the first log step"""


class Summary(NamedTuple):
    """How a run ended."""

    run: Path
    step: int
    total_steps: int
    interrupted: str | None
    """name of the signal that stopped it, None when it came to its end"""
    resumed_from: Path | None
    damaged: list[checkpoint.Damage]
    bad_samples: int
    skipped_updates: int
    latest: dict[str, float]


def pretrain(config: PretrainConfig, on_progress: Callable[[Progress], None] = lambda progress: None) -> Summary:
    """Pretrains as the config says and returns how it ended.

    SIGINT and SIGTERM finish the current update, write a checkpoint and end the run in order.

    Raises:
        ValueError: an option that cannot work, with its remedy.
        OSError: data or run folder cannot be read or written.
        FloatingPointError: the gradient stayed non-finite.
    """
    world = join_world(config.device)
    try:
        with _stop_on_signals() as stop:
            return _run(config, world, stop, on_progress)
    finally:
        leave_world()


def _run(config: PretrainConfig, world: World, stop: list[str], on_progress: Callable[[Progress], None]) -> Summary:
    train, run = config.train, Path(config.out)
    torch.use_deterministic_algorithms(train.deterministic)
    with _open_loader(config, world) as loader:
        total_steps = train.total_steps or max(1, round(train.total_epochs * loader.steps_per_epoch))
        torch.manual_seed(config.seed)
        model = MaskedAutoencoder(config.model).to(world.device)
        optimizer = build_optimizer(model, config.optim)
        start, resumed_from, damaged = _resume(config, model, optimizer, loader)
        world.barrier()
        if world.is_first:
            _open_run(run, config, start)
        forward = distribute(_compiled(model) if train.compile else model, world)
        autocast = autocast_dtype(train.precision, world.device)
        flops = train_flops_per_image(config.model, config.mask.ratio)
        metrics = Metrics(
            run, world, global_batch=train.global_batch, flops_per_image=flops, tensorboard=train.tensorboard
        )

        def save(step: int) -> None:
            if world.is_first:
                checkpoint.save(run, step, model, optimizer, {"loader": loader.state_dict()})
                checkpoint.prune(run, train.keep_last)
            world.barrier()

        step, batches = start, iter(loader)
        metrics.start(loader.wait_seconds)
        try:
            while step < total_steps:
                lr = learning_rate(
                    config.optim,
                    step,
                    global_batch=train.global_batch,
                    steps_per_epoch=loader.steps_per_epoch,
                    total_epochs=total_steps / loader.steps_per_epoch,
                )
                values = update(
                    forward,
                    optimizer,
                    next(batches),
                    lr=lr,
                    accum_steps=train.accum_steps,
                    autocast=autocast,
                    clip_grad=config.optim.clip_grad,
                )
                step += 1
                metrics.add(step, step / loader.steps_per_epoch, lr, values)
                ending = step == total_steps or world.any(bool(stop))
                if ending or step % train.log_every_steps == 0:
                    metrics.flush(loader.wait_seconds)
                    _check_finite(metrics, step)
                on_progress(Progress(step, total_steps, metrics.latest))
                if ending or step % train.save_every_steps == 0:
                    save(step)
                if ending:
                    break
        finally:
            metrics.close()
        interrupted = (stop[0] if stop else "a signal to another rank") if step < total_steps else None
        return Summary(
            run,
            step,
            total_steps,
            interrupted,
            resumed_from,
            damaged,
            loader.bad_samples,
            metrics.skipped,
            metrics.latest,
        )


def _open_loader(config: PretrainConfig, world: World) -> Loader:
    parts = world.size * config.train.accum_steps
    if config.train.global_batch % parts:
        raise ValueError(
            f"train.global_batch {config.train.global_batch} cannot be split evenly over {world.size} ranks and "
            f"train.accum_steps {config.train.accum_steps}; choose a multiple of {parts}"
        )
    quarantine = config.data.quarantine_path or str(Path(config.out) / "quarantine.jsonl")
    return build_loader(
        dataclasses.replace(config.data, quarantine_path=quarantine),
        image_size=config.model.image_size,
        patch_size=config.model.patch_size,
        channels=config.model.channels,
        mask=config.mask,
        seed=config.seed,
        global_batch=config.train.global_batch,
        rank=world.rank,
        world_size=world.size,
        device=world.device,
    )


def _resume(
    config: PretrainConfig, model: MaskedAutoencoder, optimizer: torch.optim.Optimizer, loader: Loader
) -> tuple[int, Path | None, list[checkpoint.Damage]]:
    """Puts model, optimizer and loader where `config.resume` says; returns updates done, whence, what was damaged."""
    run = Path(config.out)
    damaged: list[checkpoint.Damage] = []
    if config.resume == "never":
        if checkpoint.all_checkpoints(run):
            raise ValueError(f"{run} already holds a run; choose another --out, or --resume auto to continue it")
        return 0, None, damaged
    if config.resume == "auto":
        path, damaged = checkpoint.newest_valid(run)
        if path is None and damaged:
            raise ValueError(
                f"no checkpoint of {run} can be used ({damaged[0].path.name}: {damaged[0].reason}); "
                "choose another --out to start anew"
            )
    else:
        path = Path(config.resume)
        reason = checkpoint.find_damage(path) if path.is_dir() else "no such folder"
        if reason is not None:
            raise ValueError(f"cannot resume from {path}: {reason}; give a folder checkpoints/step-XXXXXXXX of a run")
    if path is None:
        return 0, None, damaged
    state = checkpoint.restore(path, model, optimizer)
    loader.load_state_dict(state["loader"])
    return state["step"], path, damaged


def _open_run(run: Path, config: PretrainConfig, start: int) -> None:
    try:
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.toml").write_text(to_toml(config), encoding="utf-8")
        rewind_metrics(run, start)
    except OSError as error:
        raise OSError(f"cannot write run folder {run}: {error.strerror or error}; choose another --out") from error


def _compiled(model: MaskedAutoencoder) -> nn.Module:
    return cast(nn.Module, torch.compile(model, fullgraph=True))


def _check_finite(metrics: Metrics, step: int) -> None:
    if metrics.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise FloatingPointError(
            f"the gradient was not finite for {metrics.skipped_in_a_row} updates in a row up to step {step}; "
            "resume with a lower --optim.blr, --optim.clip-grad 1.0 or --train.precision fp32"
        )


@contextmanager
def _stop_on_signals() -> Iterator[list[str]]:
    """A list that SIGINT or SIGTERM puts its name into; a second one takes the default way."""
    names: list[str] = []

    def note(number: int, frame: types.FrameType | None) -> None:
        names.append(signal.Signals(number).name)
        for each, handler in before.items():
            signal.signal(each, handler)

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {each: signal.signal(each, note) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield names
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
