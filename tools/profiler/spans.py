"""loader -> [profile_spans] -> wall and CPU seconds of its stages, taken from outside: the loader itself has no clocks.

The objects of one loader are wrapped in place (its feeder, its decoder's two methods, its last stage); other loaders,
and every training run, stay as they are. A span costs under two microseconds, an image a millisecond and more.
"""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from patchmill.pipeline.decode.cpu import CpuDecoder
from patchmill.pipeline.loader import Loader
from patchmill.pipeline.plan.feed import StepPlan
from patchmill.trainer.config.pretrain import PretrainConfig
from patchmill.trainer.engine.world import World
from patchmill.trainer.pretrain import open_loader as open_run_loader

PLAN, FETCH, DECODE, RESIZE, TASK, BATCH, COPY = "plan", "fetch", "decode", "resize", "task", "batch", "copy"


class Total(NamedTuple):
    """What was spent in a stage, over all threads."""

    calls: int
    wall: float
    cpu: float

    def minus(self, other: "Total") -> "Total":
        """What was spent since `other` was taken."""
        return Total(self.calls - other.calls, self.wall - other.wall, self.cpu - other.cpu)


class Spans:
    """Adds up the seconds that threads spend in named stages. Each thread has its own sums, so that none waits."""

    def __init__(self) -> None:
        self._sums: dict[tuple[int, str], list[float]] = {}

    def add(self, name: str, wall: float, cpu: float) -> None:
        """Counts one call of a stage by this thread."""
        sums = self._sums.setdefault((threading.get_ident(), name), [0, 0.0, 0.0])
        sums[0] += 1
        sums[1] += wall
        sums[2] += cpu

    def total(self, name: str) -> Total:
        """What all threads have spent in a stage so far."""
        found = [sums for (_, stage), sums in list(self._sums.items()) if stage == name]
        return Total(*(sum(column) for column in zip(*found, strict=True))) if found else Total(0, 0.0, 0.0)

    def snapshot(self) -> dict[str, Total]:
        """What all threads have spent in every stage so far."""
        return {name: self.total(name) for name in (PLAN, FETCH, DECODE, RESIZE, TASK, BATCH, COPY)}

    def timed(self, name: str, function: Callable) -> Callable:
        """The function, counted as a stage."""

        def call(*args: Any, **options: Any) -> Any:
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return function(*args, **options)
            finally:
                self.add(name, time.perf_counter() - wall, time.thread_time() - cpu)

        return call


class TimedFeeder:
    """A feeder whose planning, reading and decoding are counted; all else is the feeder's own."""

    def __init__(self, feeder: Any, spans: Spans) -> None:
        self._feeder, self._spans = feeder, spans
        self.fetch = spans.timed(FETCH, feeder.fetch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._feeder, name)

    def plans(self, epoch: int, step: int) -> Iterator[StepPlan]:
        """As the feeder's; planning happens in the iterator's steps."""
        plans = self._feeder.plans(epoch, step)
        following = self._spans.timed(PLAN, plans.__next__)
        while True:
            yield following()

    def decoded(self, plan: StepPlan, slot: int, data: bytes, decode: Callable) -> Any:
        """As the feeder's, with the decoder's call counted."""
        return self._feeder.decoded(plan, slot, data, self._spans.timed(DECODE, decode))


def open_loader(config: PretrainConfig, device: torch.device, **data: Any) -> Loader:
    """The loader of a run on one rank, with options of its data changed."""
    return open_run_loader(replace(config, data=replace(config.data, **data)), World(0, 1, device))


def watch(loader: Loader) -> Spans:
    """Counts the stages of a loader that has not begun; what it yields stays the same."""
    spans = Spans()
    maker, decoder = loader.maker, loader.maker.decoder
    decoder.feeder = TimedFeeder(decoder.feeder, spans)  # type: ignore[assignment]
    if isinstance(decoder, CpuDecoder):
        for name, stage in (("_decode", TASK), ("_resize", RESIZE)):
            setattr(decoder, name, spans.timed(stage, getattr(decoder, name)))
    for name, stage in (("_batch", BATCH), ("_to_device", COPY)):
        setattr(maker, name, spans.timed(stage, getattr(maker, name)))
    return spans
