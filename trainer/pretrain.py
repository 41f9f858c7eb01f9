"""config -> [pretrain] -> a run folder (run_folder.py): the loop that joins loader, model, optimizer and checkpoints.

The trajectory is a function of the config alone: weights come from the seed, batches from (seed, epoch, step), and a
resumed run continues bit for bit on the same kind of device with the same number of ranks.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from patchmill.pipeline.batch import Batch
from patchmill.pipeline.loader import Loader, build_loader
from patchmill.trainer import checkpoint
from patchmill.trainer.config import PretrainConfig
from patchmill.trainer.cuda_graph import GraphedUpdate
from patchmill.trainer.evaluate import OnlineEvaluation
from patchmill.trainer.metrics import Metrics, mask_token_norm, train_flops_per_image
from patchmill.trainer.models import build_model
from patchmill.trainer.optim import build_optimizer, learning_rate
from patchmill.trainer.parallel import distribute
from patchmill.trainer.pictures import reconstruct
from patchmill.trainer.run_folder import open_run, write_status
from patchmill.trainer.saver import Saver
from patchmill.trainer.sheets import Column, write_sheet
from patchmill.trainer.signals import stop_on_signals
from patchmill.trainer.size_schedule import first_steps, size_at
from patchmill.trainer.spectrum import batch_features, take_spectrum
from patchmill.trainer.step import Guard, StepValues, set_learning_rate, update
from patchmill.trainer.target_files import load_target
from patchmill.trainer.vit import VisionTransformer
from patchmill.trainer.warm_start import begin_from
from patchmill.trainer.world import StopVote, World, autocast_dtype, joined_world

PICTURE_IMAGES = 8


class Progress(NamedTuple):
    """Where a run stands, for whoever draws it."""

    step: int
    total_steps: int
    latest: dict[str, float]
    """the newest line of metrics.jsonl; empty until the first log step"""
    evaluation: dict[str, float]
    """the newest line of evaluations.jsonl; empty until there is one"""


class Summary(NamedTuple):
    """How a run ended."""

    run: Path
    step: int
    total_steps: int
    interrupted: str | None
    """name of the signal that stopped it, None when it came to its end"""
    began_from: str | None
    """what was taken of config.init, None where nothing was"""
    resumed_from: Path | None
    damaged: list[checkpoint.Damage]
    bad_samples: int
    skipped_updates: int
    latest: dict[str, float]
    evaluation: dict[str, float]


class Trainee(NamedTuple):
    """What is trained, and all of its state but the loader's."""

    model: VisionTransformer
    optimizer: torch.optim.Optimizer
    guard: Guard
    update: Callable[[Batch], StepValues]


def pretrain(config: PretrainConfig, on_progress: Callable[[Progress], None] = lambda progress: None) -> Summary:
    """Pretrains as the config says and returns how it ended.

    SIGINT, SIGTERM and SIGUSR1 finish the current update, write a checkpoint and end the run in order.

    Raises:
        ValueError: an option that cannot work, with its remedy.
        OSError: data or run folder cannot be read or written; a rank died or hangs (ConnectionError).
        FloatingPointError: loss or gradient stayed unusable.
    """
    with (
        stop_on_signals() as stop,
        joined_world(config.device, config.train.rank_timeout_seconds) as world,
        open_loader(config, world) as loader,
    ):
        online = OnlineEvaluation(config.eval, config.data, world) if config.eval.every_epochs else None
        trainee = build_trainee(config, world)
        start, resumed_from, damaged = _resume(config, world, trainee, loader)
        began_from = begin_from(trainee.model, config.init) if config.init and resumed_from is None else None
        total_steps, run = config.train.steps(loader.steps_per_epoch), Path(config.out)
        if start > total_steps:
            raise ValueError(f"{resumed_from} is past the end of this run ({total_steps} steps); give it more steps")
        phases = first_steps(config.train.size_schedule, loader.steps_per_epoch, total_steps)
        if world.is_first:
            open_run(run, config, start)
            write_status(run, "running", start, total_steps)
        world.barrier()
        metrics = _metrics(config, world)
        try:
            step = _train(
                config, world, trainee, loader, metrics, online, phases, start, total_steps, stop, on_progress
            )
        except (OSError, ValueError, ArithmeticError, RuntimeError) as error:
            if world.is_first:
                write_status(run, "failed", int(metrics.latest.get("step", start)), total_steps, str(error))
            raise
        finally:
            metrics.close()
        interrupted = (stop[0] if stop else "a signal to another rank") if step < total_steps else None
        if world.is_first:
            write_status(run, "stopped" if interrupted else "finished", step, total_steps, interrupted)
        return Summary(
            run,
            step,
            total_steps,
            interrupted,
            began_from,
            resumed_from,
            damaged,
            loader.bad_samples,
            metrics.skipped,
            metrics.latest,
            metrics.latest_evaluation,
        )


def _train(
    config: PretrainConfig,
    world: World,
    trainee: Trainee,
    loader: Loader,
    metrics: Metrics,
    online: OnlineEvaluation | None,
    phases: list[tuple[int, int]],
    start: int,
    total_steps: int,
    stop: list[str],
    on_progress: Callable[[Progress], None],
) -> int:
    """The loop. Returns updates done: total_steps, or less when a signal came."""
    train, model = config.train, trainee.model
    saver, vote = Saver(Path(config.out), train, world), StopVote(world)
    per_epoch = loader.steps_per_epoch
    rate = functools.partial(
        learning_rate,
        config.optim,
        global_batch=train.global_batch,
        steps_per_epoch=per_epoch,
        total_epochs=total_steps / per_epoch,
    )

    def flush() -> None:
        watched = mask_token_norm(model)
        if phases:
            watched["image_size"] = torch.tensor(model.input_hw[0])
        metrics.flush(loader.wait_seconds, **watched)
        _check_skipped(metrics, train.max_skipped_steps)

    metrics.start(loader.wait_seconds)
    step, ending = start, start == total_steps
    while not ending:
        if phases and model.input_hw[0] != size_at(phases, step):
            flush()
            _take_size(size_at(phases, step), config, model, loader, metrics)
        batch = next(loader)
        set_learning_rate(trainee.optimizer, rate(step))
        values = trainee.update(batch)
        metrics.add(step + 1, (step + 1) / per_epoch, rate(step), values, batch.sample_ids)
        step += 1
        stopped = step < total_steps and vote.cast(bool(stop))
        ending = step == total_steps or stopped
        due = online is not None and online.is_due(step, per_epoch) and not stopped
        spread = train.spectrum_every_epochs and _crosses(step, train.spectrum_every_epochs * per_epoch)
        if ending or due or spread or step % train.log_every_steps == 0:
            flush()
        if online is not None and due:  # before the checkpoint, which then stands for it too
            found = online(model, autocast_dtype(train.precision, world.device))
            metrics.add_evaluation(step, step / per_epoch, found)
            metrics.start(loader.wait_seconds)
        if spread:
            features = batch_features(model, batch, train.accum_steps, world)
            if world.is_first:
                metrics.add_spectrum(step, step / per_epoch, take_spectrum(features))
            metrics.start(loader.wait_seconds)
        if ending or step % train.save_every_steps == 0:
            saver.save(step, model, trainee.optimizer, trainee.guard, {"loader": loader.state_dict()})
        if train.picture_every_epochs and _crosses(step, train.picture_every_epochs * per_epoch):
            _draw(Path(config.out) / "pictures" / f"step-{step:08d}.png", model, batch, world)
        on_progress(Progress(step, total_steps, metrics.latest, metrics.latest_evaluation))
    vote.close()
    saver.finish()
    return step


def open_loader(config: PretrainConfig, world: World) -> Loader:
    """The loader of a run, of this rank. Raises ValueError and OSError as build_loader does."""
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


def build_trainee(config: PretrainConfig, world: World) -> Trainee:
    """Model, optimizer and guard of a run as it begins, and its update."""
    train = config.train
    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(train.deterministic)
    torch.manual_seed(config.seed)
    model = build_model(config.model).to(world.device)
    forward = distribute(model, train, world)
    optimizer = build_optimizer(model, config.optim)
    autocast = autocast_dtype(train.precision, world.device)
    guard = Guard(world.device, fp16=autocast == torch.float16, spike_factor=train.spike_factor)
    step: Callable[[Batch], StepValues] = functools.partial(
        update,
        forward,
        optimizer,
        world=world,
        guard=guard,
        accum_steps=train.accum_steps,
        autocast=autocast,
        clip_grad=config.optim.clip_grad,
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


def _take_size(size: int, config: PretrainConfig, model: VisionTransformer, loader: Loader, metrics: Metrics) -> None:
    """Goes over to square images of another size: the loader, the model's positions, and what an image costs."""
    loader.set_image_size((size, size))
    model.input_hw = (size, size)
    metrics.flops_per_image = train_flops_per_image(dataclasses.replace(config.model, image_size=size), config.mask)


def _resume(
    config: PretrainConfig, world: World, trainee: Trainee, loader: Loader
) -> tuple[int, Path | None, list[checkpoint.Damage]]:
    """Puts everything where `config.resume` says; returns updates done, whence, and what was damaged.

    The first rank looks for the newest valid checkpoint and all take that one.
    """
    run = Path(config.out)
    damaged: list[checkpoint.Damage] = []
    path: Path | None = None
    if config.resume == "never":
        if checkpoint.all_checkpoints(run):
            raise ValueError(f"{run} already holds a run; choose another --out, or --resume auto to continue it")
    elif config.resume == "auto":
        if world.is_first:
            path, damaged = checkpoint.newest_valid(run)
            if path is None and damaged:
                raise ValueError(
                    f"no checkpoint of {run} can be used ({damaged[0].path.name}: {damaged[0].reason}); "
                    "choose another --out to start anew"
                )
        step = world.agree(-1 if path is None else checkpoint.step_of(path))
        path = None if step < 0 else checkpoint.folder(run, step)
    else:
        path = Path(config.resume)
        reason = checkpoint.find_damage(path) if path.is_dir() else "no such folder"
        if reason is not None:
            raise ValueError(f"cannot resume from {path}: {reason}; give a folder checkpoints/step-XXXXXXXX of a run")
    if path is None:
        load_target(trainee.model, config.target_path)
        return 0, None, damaged
    state = checkpoint.restore(path, trainee.model, trainee.optimizer, trainee.guard)
    loader.load_state_dict(state["loader"])
    return state["step"], path, damaged


def _check_skipped(metrics: Metrics, most: int) -> None:
    if metrics.skipped_in_a_row >= most:
        raise FloatingPointError(
            f"{metrics.skipped_in_a_row} updates in a row up to step {metrics.latest['step']} were left out (loss or "
            f"gradient not finite, or a spike); {metrics.run / 'skipped.jsonl'} names their samples. Resume from an "
            "earlier checkpoint (--resume PATH) with a lower --optim.blr, --optim.clip-grad 1 or --train.precision fp32"
        )


def _crosses(step: int, interval: float) -> bool:
    """Whether a multiple of `interval` lies in (step - 1, step]."""
    return step // interval > (step - 1) // interval


def _draw(path: Path, model: VisionTransformer, batch: Batch, world: World) -> None:
    """A grid of masked | reconstruction | original. Every rank must call it: sharded weights are gathered."""
    plan = dataclasses.replace(batch.plan, **{name: ids[:PICTURE_IMAGES] for name, ids in vars(batch.plan).items()})
    images = batch.images[:PICTURE_IMAGES]
    masked, reconstruction = reconstruct(model, images, plan)
    if world.is_first:
        path.parent.mkdir(exist_ok=True)
        columns = {"masked": masked, "reconstruction": reconstruction, "original": images}
        write_sheet([Column(*column) for column in columns.items()], path, across=2)
