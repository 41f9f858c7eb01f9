"""Pretrains as a config says: builds loader, model and optimizer, resumes, and runs the loop of loop.py.

The config alone determines the trajectory: weights come from the seed, batches from (seed, epoch, step). A resumed run
continues bit for bit on the same kind of device with the same number of ranks.
"""

import dataclasses
import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from patchmill.pipeline.batch import Batch
from patchmill.pipeline.loader import Loader, build_loader
from patchmill.pipeline.observe import NOBODY, Observer
from patchmill.trainer.checkpoints import checkpoint
from patchmill.trainer.checkpoints.warm_start import begin_from
from patchmill.trainer.config.pretrain import PretrainConfig
from patchmill.trainer.engine.cuda_graph import GraphedUpdate
from patchmill.trainer.engine.optim import build_optimizer
from patchmill.trainer.engine.parallel import distribute
from patchmill.trainer.engine.signals import stop_on_signals
from patchmill.trainer.engine.step import Guard, StepValues, update
from patchmill.trainer.engine.world import World, autocast_dtype, joined_world
from patchmill.trainer.flops import train_flops_per_image
from patchmill.trainer.loop import Loop, Progress, Trainee
from patchmill.trainer.metrics import Metrics
from patchmill.trainer.model.attention import describe_backends
from patchmill.trainer.model.build import build_model
from patchmill.trainer.model.target_files import load_target
from patchmill.trainer.run_folder import State, open_run, write_status

logger = logging.getLogger("patchmill.trainer")


class Summary(NamedTuple):
    """How a run ended."""

    run: Path
    step: int
    total_steps: int
    interrupted: str | None
    """name of the signal that stopped it; None if it reached its end"""
    began_from: str | None
    """what was loaded from config.init, in words; None if nothing"""
    resumed_from: Path | None
    damaged: list[checkpoint.Damage]
    bad_samples: int
    skipped_updates: int
    latest: dict[str, float]
    evaluation: dict[str, float]
    attention: str
    """what computed attention, by shape"""


class Start(NamedTuple):
    """Where a run starts."""

    step: int
    began_from: str | None
    resumed_from: Path | None
    damaged: list[checkpoint.Damage]
    """newer checkpoints that could not be used"""


def pretrain(
    config: PretrainConfig,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    observer: Observer = NOBODY,
) -> Summary:
    """Pretrains as the config says and returns how the run ended.

    On SIGINT, SIGTERM and SIGUSR1 it finishes the current update, writes a checkpoint and returns.

    Args:
        on_progress: called after every update.
        observer: sees the stages of loader and loop at work (pipeline/observe.py).
    Raises:
        ValueError: an option cannot work; the message has the remedy.
        OSError: data or run folder cannot be read or written; a rank died or hangs (ConnectionError).
        FloatingPointError: too many updates in a row were skipped.
    """
    with (
        stop_on_signals() as stop,
        joined_world(config.device, config.train.rank_timeout_seconds) as world,
        open_loader(config, world, observer) as loader,
    ):
        world.require_same(loader.fingerprint, "give every rank the same data and options")
        total_steps, run = config.train.steps(loader.steps_per_epoch), Path(config.out)
        trainee = build_trainee(config, world, observer)
        dtype = autocast_dtype(config.train.precision, world.device) or torch.float32
        attention = describe_backends(config.model, config.mask, world.device, dtype)
        logger.info("attention on %s: %s", world.device, attention)
        loop = Loop(config, world, trainee, loader, total_steps, observer)
        start = _start(config, world, trainee, loader, total_steps)

        def report(state: State, step: int, why: str | None = None) -> None:
            if world.is_first:
                write_status(run, state, step, total_steps, why)

        if world.is_first:
            open_run(run, config, start.step)
        world.barrier()
        metrics = _metrics(config, world)
        report("running", start.step)
        try:
            step = loop.run(start.step, metrics, stop, on_progress)
        except (OSError, ValueError, ArithmeticError, RuntimeError) as error:
            report("failed", int(metrics.latest.get("step", start.step)), str(error))
            raise
        finally:
            metrics.close()
        interrupted = (stop[0] if stop else "a signal to another rank") if step < total_steps else None
        report("stopped" if interrupted else "finished", step, interrupted)
        return Summary(
            run,
            step,
            total_steps,
            interrupted,
            start.began_from,
            start.resumed_from,
            start.damaged,
            loader.bad_samples,
            metrics.skipped,
            metrics.latest,
            metrics.latest_evaluation,
            attention,
        )


def open_loader(config: PretrainConfig, world: World, observer: Observer = NOBODY) -> Loader:
    """Builds this rank's loader for a run. Raises ValueError and OSError as build_loader does."""
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
        observer=observer,
    )


def build_trainee(config: PretrainConfig, world: World, observer: Observer = NOBODY) -> Trainee:
    """Builds the model, optimizer and guard of a run, as they are at its start, and its update function."""
    train = config.train
    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(train.deterministic)
    torch.manual_seed(config.seed)
    model = build_model(config.model).to(world.device)
    forward = distribute(model, train, world)
    optimizer = build_optimizer(model, config.optim)
    autocast = autocast_dtype(train.precision, world.device)
    guard = Guard(
        world.device,
        fp16=autocast == torch.float16,
        spike_factor=train.spike_factor,
        named_parameters=model.named_parameters(),
    )
    step: Callable[[Batch], StepValues] = functools.partial(
        update,
        forward,
        optimizer,
        world=world,
        guard=guard,
        accum_steps=train.accum_steps,
        autocast=autocast,
        clip_grad=config.optim.clip_grad,
        observer=observer,
    )
    if train.cuda_graph:
        if world.size > 1 or world.device.type != "cuda" or not isinstance(optimizer, torch.optim.AdamW):
            raise ValueError("train.cuda_graph needs one GPU and optim.kind adamw; leave it out")
        step = GraphedUpdate(step, optimizer)
    return Trainee(model, optimizer, guard, step)


def _metrics(config: PretrainConfig, world: World) -> Metrics:
    return Metrics(
        Path(config.out),
        world,
        global_batch=config.train.global_batch,
        flops_per_image=train_flops_per_image(config.model, config.mask),
        tensorboard=config.train.tensorboard,
        wandb=config.train.wandb,
        uniformity_weight=config.model.uniformity_weight,
    )


def _start(config: PretrainConfig, world: World, trainee: Trainee, loader: Loader, total_steps: int) -> Start:
    """Brings trainee and loader to where `config.resume` and `config.init` say."""
    path, damaged = _find_checkpoint(config, world)
    if path is None:
        load_target(trainee.model, config.target_path)
        began_from = begin_from(trainee.model, config.init) if config.init else None
        return Start(0, began_from, None, damaged)
    state = checkpoint.restore(path, trainee.model, trainee.optimizer, trainee.guard)
    loader.load_state_dict(state["loader"])
    if state["step"] > total_steps:
        raise ValueError(f"{path} is past the end of this run ({total_steps} steps); give it more steps")
    return Start(state["step"], None, path, damaged)


def _find_checkpoint(config: PretrainConfig, world: World) -> tuple[Path | None, list[checkpoint.Damage]]:
    """The checkpoint to resume from, if any, and newer ones that are damaged; the same checkpoint on every rank."""
    run = Path(config.out)
    if config.resume == "never":
        if checkpoint.all_checkpoints(run):
            raise ValueError(f"{run} already holds a run; choose another --out, or --resume auto to continue it")
        return None, []
    if config.resume != "auto":
        path = Path(config.resume)
        reason = checkpoint.find_damage(path) if path.is_dir() else "no such folder"
        if reason is not None:
            raise ValueError(f"cannot resume from {path}: {reason}; give a folder checkpoints/step-XXXXXXXX of a run")
        return path, []
    newest: Path | None = None
    damaged: list[checkpoint.Damage] = []
    if world.is_first:  # one rank verifies the checksums and decides for all
        newest, damaged = checkpoint.newest_valid(run)
        if newest is None and damaged:
            raise ValueError(
                f"no checkpoint of {run} can be used ({damaged[0].path.name}: {damaged[0].reason}); "
                "choose another --out to start over"
            )
    step = world.agree(-1 if newest is None else checkpoint.step_of(newest))
    return (None if step < 0 else checkpoint.folder(run, step)), damaged
