"""Runs the training loop: update, log, evaluate, checkpoint.

Evaluations, spectra and pictures draw no random numbers and change nothing: the trajectory is the same without them.
The time they take does not count in images/s.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from patchmill.pipeline.batch import Batch
from patchmill.pipeline.loader import Loader
from patchmill.pipeline.observe import NOBODY, Observer
from patchmill.trainer.checkpoints.save import Saver
from patchmill.trainer.config.pretrain import PretrainConfig
from patchmill.trainer.config.size_schedule import first_steps, size_at
from patchmill.trainer.draw.sheet import Column, write_sheet
from patchmill.trainer.engine.optim import learning_rate
from patchmill.trainer.engine.step import Guard, StepValues, set_learning_rate
from patchmill.trainer.engine.world import StopVote, World, autocast_dtype
from patchmill.trainer.evaluate.online import OnlineEvaluation
from patchmill.trainer.evaluate.reconstruct import reconstruct
from patchmill.trainer.evaluate.spectrum import batch_features, take_spectrum
from patchmill.trainer.flops import train_flops_per_image
from patchmill.trainer.metrics import Metrics, mask_token_norm
from patchmill.trainer.model.vit import VisionTransformer

PICTURE_IMAGES = 8
"""images on a sheet of reconstructions"""


class Progress(NamedTuple):
    """The state of a run, for a progress display."""

    step: int
    total_steps: int
    latest: dict[str, float]
    """latest line of metrics.jsonl; empty before the first log step"""
    evaluation: dict[str, float]
    """latest line of evaluations.jsonl; empty before the first"""


class Trainee(NamedTuple):
    """A model in training, with all of its state except the loader's."""

    model: VisionTransformer
    optimizer: torch.optim.Optimizer
    guard: Guard
    update: Callable[[Batch], StepValues]


class Due(NamedTuple):
    """The evaluations due after an update."""

    evaluation: bool
    spectrum: bool
    picture: bool


class Loop:
    """The updates of one run."""

    def __init__(
        self,
        config: PretrainConfig,
        world: World,
        trainee: Trainee,
        loader: Loader,
        total_steps: int,
        observer: Observer = NOBODY,
    ) -> None:
        """Opens and checks the evaluation data and the size schedule before training starts.

        Args:
            observer: sees updates, metrics, evaluations and checkpoints.
        Raises:
            ValueError, FileNotFoundError: the evaluation data or the size schedule cannot be used.
        """
        self.config, self.world, self.trainee, self.loader = config, world, trainee, loader
        self.observer = observer
        self.total_steps, self.per_epoch = total_steps, loader.steps_per_epoch
        self.online = OnlineEvaluation(config.eval, config.data, world) if config.eval.every_epochs else None
        self.phases = first_steps(config.train.size_schedule, self.per_epoch, total_steps)
        self.rate = functools.partial(
            learning_rate,
            config.optim,
            global_batch=config.train.global_batch,
            steps_per_epoch=self.per_epoch,
            total_epochs=total_steps / self.per_epoch,
        )

    def run(self, start: int, metrics: Metrics, stop: list[str], on_progress: Callable[[Progress], None]) -> int:
        """Trains from update `start` on, and returns the number of updates done.

        Args:
            stop: names of stop signals; once it has one, all ranks save and stop after the same update.
            on_progress: called after every update.
        """
        train, trainee, loader, span = self.config.train, self.trainee, self.loader, self.observer.span
        saver, vote = Saver(Path(self.config.out), train, self.world), StopVote(self.world)
        metrics.start(loader.waits)
        step, ending = start, start == self.total_steps
        while not ending:
            self._set_image_size(step, metrics)
            batch, lr = next(loader), self.rate(step)
            set_learning_rate(trainee.optimizer, lr)
            with span("update", len(batch.images)):
                values = trainee.update(batch)
            step += 1
            metrics.add(step, step / self.per_epoch, lr, values, batch.sample_ids)

            stopped = step < self.total_steps and vote.cast(bool(stop))
            ending = stopped or step == self.total_steps
            due = self._due(step, stopped)
            if ending or any(due) or step % train.log_every_steps == 0:
                self._flush(metrics)
            if any(due):  # before the checkpoint: a run resumed from it need not repeat the evaluation
                with span("evaluate", len(batch.images)):
                    self._look(due, step, batch, metrics)
            if ending or step % train.save_every_steps == 0:
                state = {"loader": loader.state_dict()}
                with span("save", len(batch.images)):
                    saver.save(step, trainee.model, trainee.optimizer, trainee.guard, state)
            on_progress(Progress(step, self.total_steps, metrics.latest, metrics.latest_evaluation))
        vote.close()
        saver.finish()
        return step

    def _due(self, step: int, stopped: bool) -> Due:
        train = self.config.train
        return Due(
            # a run that was asked to stop has no time for a whole evaluation
            self.online is not None and self.online.is_due(step, self.per_epoch) and not stopped,
            _crosses(step, train.spectrum_every_epochs, self.per_epoch),
            _crosses(step, train.picture_every_epochs, self.per_epoch),
        )

    def _look(self, due: Due, step: int, batch: Batch, metrics: Metrics) -> None:
        model, train, epoch = self.trainee.model, self.config.train, step / self.per_epoch
        if due.evaluation and self.online is not None:
            metrics.add_evaluation(step, epoch, self.online(model, autocast_dtype(train.precision, self.world.device)))
        if due.spectrum:
            features = batch_features(model, batch, train.accum_steps, self.world)
            if self.world.is_first:
                metrics.add_spectrum(step, epoch, take_spectrum(features))
        if due.picture:
            _draw(Path(self.config.out) / "pictures" / f"step-{step:08d}.png", model, batch, self.world)
        metrics.start(self.loader.waits)

    def _flush(self, metrics: Metrics) -> None:
        with self.observer.span("metrics", self.config.train.global_batch // self.world.size):
            watched = mask_token_norm(self.trainee.model)
            if self.phases:
                watched["image_size"] = torch.tensor(self.trainee.model.input_hw[0])
            metrics.flush(self.loader.waits, self.trainee.guard.names, **watched)
        _check_skipped(metrics, self.config.train.max_skipped_steps)

    def _set_image_size(self, step: int, metrics: Metrics) -> None:
        """Follows the size schedule: switches loader, model and FLOPs per image when a new phase begins."""
        if not self.phases or self.trainee.model.input_hw[0] == size_at(self.phases, step):
            return
        self._flush(metrics)  # lines of the last phase are written with its image size
        size = size_at(self.phases, step)
        self.loader.set_image_size((size, size))
        self.trainee.model.input_hw = (size, size)
        model = dataclasses.replace(self.config.model, image_size=size)
        metrics.flops_per_image = train_flops_per_image(model, self.config.mask)


def _check_skipped(metrics: Metrics, most: int) -> None:
    if metrics.skipped_in_a_row >= most:
        raise FloatingPointError(
            f"{metrics.skipped_in_a_row} updates in a row up to step {metrics.latest['step']} were skipped (last: "
            f"{metrics.why_skipped}); {metrics.run / 'skipped.jsonl'} lists their samples. Resume from an "
            "earlier checkpoint (--resume PATH) with a lower --optim.blr, --optim.clip-grad 1 or --train.precision fp32"
        )


def _crosses(step: int, every_epochs: float | None, steps_per_epoch: int) -> bool:
    """Whether update `step` reaches a multiple of `every_epochs`; never if that is unset."""
    if every_epochs is None:
        return False
    interval = every_epochs * steps_per_epoch
    return step // interval > (step - 1) // interval


def _draw(path: Path, model: VisionTransformer, batch: Batch, world: World) -> None:
    """Draws masked, reconstructed and original images. Every rank must call it: it gathers sharded weights."""
    plan = dataclasses.replace(batch.plan, **{name: ids[:PICTURE_IMAGES] for name, ids in vars(batch.plan).items()})
    images = batch.images[:PICTURE_IMAGES]
    masked, reconstruction = reconstruct(model, images, plan)
    if world.is_first:
        path.parent.mkdir(exist_ok=True)
        columns = {"masked": masked, "reconstruction": reconstruction, "original": images}
        write_sheet([Column(*column) for column in columns.items()], path, across=2)
