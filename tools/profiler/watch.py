"""the training loop -> [profile_watch] -> seconds of every step: its data wait, update, forward pass and metrics.

The loop's own loader, update and metrics are wrapped; it ends after so many steps, on all ranks the same, from within
its progress call. On a GPU the host runs ahead of the device: an update's seconds are those between device events.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from patchmill.pipeline.batch import Batch
from patchmill.pipeline.loader import Loader
from patchmill.tools.profiler.spans import watch
from patchmill.tools.profiler.timing import Neighbours, wait_for
from patchmill.trainer.engine.step import StepValues
from patchmill.trainer.engine.world import World
from patchmill.trainer.loop import Progress, Trainee
from patchmill.trainer.metrics import Metrics

WARM_UP_STEPS = 3
LEAST_STEPS = 8


@dataclass(frozen=True)
class RankTime:
    """One rank's seconds a step before it meets the others (medians)."""

    rank: int
    wait: float
    """for data"""
    forward: float
    own_seconds: float
    """both: what the other ranks would wait for"""


class Enough(Exception):
    """Ends the loop from within its progress call."""


class Watcher:
    """Stands around a loop and writes down what passes.

    Attributes:
        steps, waits, updates, forwards: seconds of each measured step, and of its parts.
        queue: batches that lay ready at each.
        meters: seconds in the calls of metrics, in all.
        ranks, spent, around: when it is over: the ranks' own times, the loader's stages, and what else was running.
    """

    def __init__(self, loader: Loader, world: World, seconds: float) -> None:
        self.loader, self.world, self.seconds = loader, world, seconds
        self.spans = watch(loader)
        self.steps: list[float] = []
        self.waits: list[float] = []
        self.updates: list[float] = []
        self.forwards: list[float] = []
        self.queue: list[int] = []
        self.meters = 0.0
        self.done, self.target = 0, 0
        self._events: list[tuple[Any, Any]] = []
        self._last, self._waited, self._entered = 0.0, 0.0, 0.0

    def wrap(self, trainee: Trainee, *, eager: bool) -> Trainee:
        """The trainee with a timed update; the forward pass is timed apart, since ranks meet only after it.

        Not that of a compiled or captured model: a clock inside would break its graph.
        """

        def enter(*_: object) -> None:
            self._entered = time.perf_counter()

        def leave(*_: object) -> None:
            self.forwards.append(time.perf_counter() - self._entered)

        if eager:
            trainee.model.register_forward_pre_hook(enter)
            trainee.model.register_forward_hook(leave)
        return trainee._replace(update=self._timed(trainee.update))

    def progress(self, _: Progress) -> None:
        """After each step."""
        now = time.perf_counter()
        self.done += 1
        if self.done > WARM_UP_STEPS:
            self.steps.append(now - self._last)
            self.waits.append(self.loader.wait_seconds - self._waited)
        elif self.done == WARM_UP_STEPS:
            # the ranks take the first one's word, so that all end after the same step
            self.target = self.world.agree(max(LEAST_STEPS, int(self.seconds / max(now - self._last, 1e-6))))
            self._begin()
        if self.target and len(self.steps) >= self.target:
            self._finish()
            raise Enough
        self._last, self._waited = time.perf_counter(), self.loader.wait_seconds

    def _timed(self, update: Callable[[Batch], StepValues]) -> Callable[[Batch], StepValues]:
        def timed(batch: Batch) -> StepValues:
            assert self.loader._prefetcher is not None
            self.queue.append(self.loader._prefetcher._queue.qsize())
            start, first = time.perf_counter(), self._event()
            values = update(batch)
            self._events.append((first, self._event()))
            self.updates.append(time.perf_counter() - start)
            return values

        return timed

    def _begin(self) -> None:
        """The warm-up is over."""
        wait_for(self.world.device)
        self.updates, self.forwards, self.queue, self._events, self.meters = [], [], [], [], 0.0
        self._before = self.spans.snapshot()
        self.around = Neighbours().__enter__()

    def _finish(self) -> None:
        """Enough steps are done."""
        wait_for(self.world.device)
        self.around.__exit__()
        self.spent = {name: total.minus(self._before[name]) for name, total in self.spans.snapshot().items()}
        if self.world.device.type == "cuda":
            self.updates = [first.elapsed_time(last) / 1e3 for first, last in self._events]
        own = torch.tensor([statistics.median(self.waits), statistics.median(self.forwards or [0.0])])
        own_seconds = [row.tolist() for row in self.world.gather(own)]
        self.ranks = [RankTime(rank, each[0], each[1], sum(each)) for rank, each in enumerate(own_seconds)]

    def _event(self) -> Any:
        if self.world.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class TimedMetrics(Metrics):
    """Metrics that tell a watcher how long they took."""

    watcher: Watcher

    def add(self, *args: Any, **options: Any) -> None:
        """As Metrics.add."""
        start = time.perf_counter()
        super().add(*args, **options)
        self.watcher.meters += time.perf_counter() - start

    def flush(self, *args: Any, **options: Any) -> None:
        """As Metrics.flush; what the device still has to do is the update's time, not this."""
        wait_for(self.world.device)
        start = time.perf_counter()
        super().flush(*args, **options)
        self.watcher.meters += time.perf_counter() - start
