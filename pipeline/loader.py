"""Loads batches onto the training device ahead of their use.

    with build_loader(DataConfig(path="shards"), image_size=224, patch_size=16, channels=3, mask=MaskConfig(),
                      seed=0, global_batch=256) as loader:
        for batch in loader:
            ...

A thread pulls batches through the stages, which are generators, into a bounded queue. The loader's whole state is the
epoch and the step of the next batch.
"""

import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, Self

import torch
from torch import Tensor

from patchmill.pipeline.batch import Batch
from patchmill.pipeline.config import DataConfig as DataConfig
from patchmill.pipeline.config import MaskConfig
from patchmill.pipeline.decode.colour import jitter, jitter_factors
from patchmill.pipeline.decode.cpu import CpuDecoder
from patchmill.pipeline.decode.dali import DaliDecoder
from patchmill.pipeline.decode.resident import ResidentDecoder
from patchmill.pipeline.observe import NOBODY, Observer
from patchmill.pipeline.plan.feed import AnyFeeder, StepPlan
from patchmill.pipeline.plan.masks import MaskPlan
from patchmill.pipeline.plan.open_data import open_feeder
from patchmill.pipeline.plan.spec import BatchSpec
from patchmill.pipeline.read.threads import Prefetcher
from patchmill.pipeline.waits import Waits

Decoder = CpuDecoder | DaliDecoder | ResidentDecoder


class BatchMaker:
    """The last stage: moves decoded images to the device and draws their masks there.

    The prefetching thread holds this object and not the loader: a loader that is dropped without `close` can be freed.
    """

    def __init__(
        self,
        feeder: AnyFeeder,
        make_decoder: Callable[[BatchSpec], Decoder],
        mask: MaskConfig,
        spec: BatchSpec,
        device: torch.device,
        colour_jitter: float,
    ) -> None:
        self.feeder, self.make_decoder, self.mask, self.spec = feeder, make_decoder, mask, spec
        self.device, self.colour_jitter = device, colour_jitter
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.decoder = make_decoder(spec)

    def remake(self, spec: BatchSpec) -> None:
        """Makes batches of this spec from the next call of `batches` on."""
        self.spec, self.decoder = spec, self.make_decoder(spec)

    def batches(self, epoch: int, step: int) -> Iterator[tuple[Batch, torch.cuda.Event | None]]:
        """Yields batches from a step on, without end, each with the event that marks it ready on a GPU."""
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            for plan, images in self.decoder.batches(epoch, step):
                batch = self._batch(plan, images)
                yield batch, self.stream.record_event() if self.stream else None

    def _batch(self, plan: StepPlan, images: Tensor) -> Batch:
        span, rows = self.feeder.observer.span, len(plan.sample_ids_B)
        with span("copy", rows):
            columns = plan.sample_ids_B, plan.repeats_B, plan.labels_B
            ids_B, repeats_B, labels_B = (self._to_device(torch.from_numpy(column)) for column in columns)
            images = self._to_device(images)
        with span("masks", rows):
            mask = MaskPlan.draw(
                self.mask,
                seed=self.spec.seed,
                epoch=plan.epoch,
                sample_ids_B=ids_B,
                grid_hw=self.spec.grid_hw,
                repeats_B=repeats_B,
            )
        if self.colour_jitter:
            with span("colour", rows):
                factors_B3 = jitter_factors(
                    self.spec.seed, plan.epoch, plan.sample_ids_B, plan.repeats_B, self.colour_jitter
                )
                images = jitter(images, self._to_device(torch.from_numpy(factors_B3)))
        return Batch(images, mask, labels_B, ids_B, plan.epoch, plan.step)

    def _to_device(self, tensor: Tensor) -> Tensor:
        """Returns the tensor on the training device, in memory that torch owns.

        DALI's GPU buffers are copied too: DALI overwrites them without waiting for the stream that trains on them.
        """
        if self.device.type != "cuda":
            return tensor
        if tensor.is_cuda:
            return tensor.clone()
        return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(self.device, non_blocking=True)


class Loader:
    """Yields one rank's batches without end, epoch after epoch. `build_loader` makes it.

    Attributes:
        steps_per_epoch: the same on every rank.
        num_samples: samples in the dataset.
        waits: how long the training stream, and the host, have waited for batches.
    """

    def __init__(self, maker: BatchMaker, config: DataConfig, fingerprint: dict[str, Any]) -> None:
        self.maker, self.config, self.fingerprint = maker, config, fingerprint
        self.steps_per_epoch = maker.feeder.steps_per_epoch
        self.num_samples = maker.feeder.num_samples
        self.waits = Waits(maker.device)
        self._next = (0, 0)
        self._prefetcher: Prefetcher | None = None

    @property
    def wait_seconds(self) -> float:
        """Total time that the host has waited in `next`."""
        return self.waits.host_seconds

    @property
    def bad_samples(self) -> int:
        """Number of distinct bad samples that this process has found and replaced."""
        return self.maker.feeder.quarantine.bad_samples

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._prefetcher is None:
            self._prefetcher = Prefetcher(self.maker.batches(*self._next), self.config.prefetch_batches)
        observer = self.maker.feeder.observer
        observer.queue(len(self._prefetcher))
        with observer.span("wait", self.maker.spec.local_batch), self.waits.waiting():
            batch, ready = self._prefetcher.get(self.config.timeout_seconds)
            if ready is not None:
                _hand_over(batch, ready)
        self.seek(batch.epoch, batch.step + 1, keep_running=True)
        return batch

    def seek(self, epoch: int, step: int, keep_running: bool = False) -> None:
        """Moves to a step. The step after an epoch's last one is the first of the next epoch."""
        if not keep_running:
            self._stop()
        self._next = (epoch + 1, 0) if step >= self.steps_per_epoch else (epoch, step)

    def set_image_size(self, size_hw: tuple[int, int]) -> None:
        """Changes the size of the next batches, with the same width / height: same samples, windows and flips.

        Restarts the threads and drops the batches that were ready.

        Raises:
            ValueError: the patch size does not divide the size, or the decoder cannot make it.
        """
        if size_hw == self.maker.spec.size_hw:
            return
        spec = dataclasses.replace(self.maker.spec, size_hw=size_hw)  # raises before anything is stopped
        self._stop()
        self.maker.remake(spec)

    def state_dict(self) -> dict[str, Any]:
        """Returns epoch and step of the next batch, and all that the order depends on, as plain values for JSON."""
        epoch, step = self._next
        return {"epoch": epoch, "step": step, "fingerprint": dict(self.fingerprint)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state`. Raises ValueError that names the differences when it is of other data or settings."""
        was, now = state["fingerprint"], self.fingerprint
        changed = [name for name in sorted({*was, *now}) if was.get(name) != now.get(name)]
        if changed:
            listed = "; ".join(f"{name}: was {was.get(name)}, is {now.get(name)}" for name in changed)
            raise ValueError(f"the loader's state is of other data ({listed}): restore these, or start a new run")
        self.seek(state["epoch"], state["step"])

    def close(self) -> None:
        """Stops the threads and closes the files."""
        self._stop()
        self.maker.feeder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _stop(self) -> None:
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None


def _hand_over(batch: Batch, ready: torch.cuda.Event) -> None:
    """Lets the consumer's stream wait for a batch, and tells the allocator that this stream uses it."""
    stream = torch.cuda.current_stream(batch.images.device)
    stream.wait_event(ready)
    plan = batch.plan
    for tensor in (batch.images, batch.labels, batch.sample_ids, plan.ids_keep, plan.ids_mask, plan.ids_restore):
        tensor.record_stream(stream)


def build_loader(
    config: DataConfig,
    *,
    image_size: int | tuple[int, int],
    patch_size: int,
    channels: int,
    mask: MaskConfig,
    seed: int,
    global_batch: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    start_epoch: int = 0,
    start_step: int = 0,
    observer: Observer = NOBODY,
) -> Loader:
    """Opens the data and builds the stages.

    Args:
        config: see DataConfig.
        image_size: of the batch's images: the side of a square, or (height, width).
        patch_size: side of a patch; divides height and width.
        channels: 1 to 4; up to 8 with the CPU decoder.
        mask: see MaskConfig.
        seed: 64-bit run seed.
        global_batch: images of a step on all ranks together.
        rank, world_size: this process among those that train together.
        device: where the batches go.
        start_epoch, start_step: the first batch; like `load_state_dict`, without its checks.
        observer: sees the stages at work; see observe.py.

    Raises:
        ValueError, FileNotFoundError: what is wrong, and how to mend it.
    """
    device = torch.device(device)
    spec = BatchSpec(
        size_hw=(image_size, image_size) if isinstance(image_size, int) else image_size,
        patch_size=patch_size,
        channels=channels,
        seed=seed,
        global_batch=global_batch,
        repeats=config.repeats,
        rank=rank,
        world_size=world_size,
    )
    feeder, fingerprint = open_feeder(config, spec, observer)
    make_decoder = functools.partial(_make_decoder, config, feeder, device)
    maker = BatchMaker(feeder, make_decoder, mask, spec, device, config.colour_jitter)
    loader = Loader(maker, config, fingerprint)
    loader.seek(start_epoch, start_step)
    return loader


def _has_dali() -> bool:
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # no NVIDIA package at all: find_spec imports the parent package
        return False


def _make_decoder(config: DataConfig, feeder: AnyFeeder, device: torch.device, spec: BatchSpec) -> Decoder:
    options: dict[str, Any] = {
        "image_size": spec.size_hw,
        "channels": spec.channels,
        "interpolation": config.interpolation,
        "workers": config.workers or len(os.sched_getaffinity(0)),
    }
    name = config.decoder
    if name == "auto":
        name = "dali" if device.type == "cuda" and _has_dali() else "cpu"
    if name == "dali":
        if spec.channels > 4:
            raise ValueError(f"data.decoder=dali takes 1 to 4 channels, got {spec.channels}: use data.decoder=cpu")
        return DaliDecoder(feeder, **options, batches_ahead=config.prefetch_batches, device=device)
    if name == "resident":
        return ResidentDecoder(feeder, **options, device=device, path=config.path)
    pin_memory = device.type == "cuda"
    return CpuDecoder(feeder, **options, batches_ahead=config.prefetch_batches, pin_memory=pin_memory)
