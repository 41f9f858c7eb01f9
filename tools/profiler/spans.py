"""Adds up the wall and CPU seconds of the stages that a loader or a training loop reports."""

import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch

from patchmill.pipeline.loader import Loader
from patchmill.pipeline.observe import NOBODY, Observer, Span
from patchmill.trainer.config.pretrain import PretrainConfig
from patchmill.trainer.engine.world import World
from patchmill.trainer.pretrain import open_loader as open_run_loader
from patchmill.trainer.recipes.pretrain import with_options


class Seconds(NamedTuple):
    """Time spent: on the clock, and of it on a core."""

    wall: float = 0.0
    cpu: float = 0.0

    def less(self, *parts: "Seconds") -> "Seconds":
        """What remains without the parts; never below zero."""
        wall, cpu = (max(0.0, whole - sum(inner)) for whole, *inner in zip(self, *parts, strict=True))
        return Seconds(wall, cpu)

    def over(self, images: float) -> "Seconds":
        """The time of one image."""
        return Seconds(self.wall / images, self.cpu / images)


Seen = Mapping[str, Seconds]
"""span -> seconds; 0 for spans that were not seen"""


class Spans:
    """An observer that adds up spans over all threads, and keeps the lengths of the queue.

    A span costs under two microseconds. Each thread adds to its own sums, so no thread waits for another.
    """

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self._sums: dict[tuple[int, str], list[float]] = {}

    def span(self, name: Span, images: int) -> AbstractContextManager[object]:
        """Measures one span."""
        return Stopwatch(self, name)

    def queue(self, length: int) -> None:
        """Keeps the number of batches that are ready."""
        self.lengths.append(length)

    def add(self, name: str, wall: float, cpu: float) -> None:
        """Adds one span of this thread."""
        sums = self._sums.setdefault((threading.get_ident(), name), [0.0, 0.0])
        sums[0] += wall
        sums[1] += cpu

    def since(self, before: Seen | None = None) -> Seen:
        """Returns all that was spent, or all since `before` was taken."""
        found: dict[str, Seconds] = defaultdict(Seconds)
        for (_, name), (wall, cpu) in list(self._sums.items()):
            found[name] = Seconds(found[name].wall + wall, found[name].cpu + cpu)
        for name, spent in (before or {}).items():
            found[name] = found[name].less(spent)
        return found


class Stopwatch:
    """Measures the wall and CPU time of a block on its thread; contextmanager would cost half as much again."""

    def __init__(self, spans: Spans, name: str) -> None:
        self.spans, self.name = spans, name

    def __enter__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.thread_time()

    def __exit__(self, *exception: object) -> None:
        self.spans.add(self.name, time.perf_counter() - self.wall, time.thread_time() - self.cpu)


def stages(seen: Seen) -> dict[str, Seconds]:
    """Splits nested spans into the stages that an image passes, in order; those that took no time are left out."""
    found = {
        "plan": seen["plan"],
        "storage": seen["read"].less(seen["check"]),
        "checks": seen["check"],
        "decode": seen["decode"] if seen["chunk"].wall else Seconds(),
        "resize": seen["resize"],
        "bookkeeping": seen["chunk"].less(seen["read"], seen["decode"], seen["resize"]),
        "masks": seen["masks"],
        "colour": seen["colour"],
        "host copy": seen["copy"],
    }
    return {name: spent for name, spent in found.items() if spent.wall > 0}


def open_loader(config: PretrainConfig, device: torch.device, observer: Observer = NOBODY, **data: Any) -> Loader:
    """Opens a run's loader on one rank, with some options of its data changed."""
    changed = with_options(config, **{f"data__{name}": value for name, value in data.items()})
    return open_run_loader(changed, World(0, 1, device), observer)
