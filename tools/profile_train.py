"""the real loop -> [patchmill profile train] -> where its time goes: data wait, update, the rest; slow steps and ranks.

`patchmill pretrain` itself runs in a folder that is thrown away, and three names that it calls are wrapped meanwhile:
what opens the loader, what updates, and what writes metrics. It ends after so many steps, on all ranks the same, before
it would save. On a GPU the host runs ahead of the device, so that an update's seconds are those between device events.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from patchmill.pipeline.decode_cpu import CpuDecoder
from patchmill.pipeline.loader import Loader, build_loader
from patchmill.tools.profile_spans import BATCH, COPY, DECODE, FETCH, PLAN, RESIZE, TASK, Spans, Total, watch
from patchmill.tools.profile_storage import percentiles
from patchmill.tools.timing import Measured, Neighbours
from patchmill.tools.verdict import CORES, DEVICE, FRONT, STEP, THREADS, Model, Stage, Verdict, judge, straggler
from patchmill.trainer import pretrain
from patchmill.trainer.config import PretrainConfig
from patchmill.trainer.loop import Progress
from patchmill.trainer.metrics import Metrics
from patchmill.trainer.recipes import with_options
from patchmill.trainer.step import update
from patchmill.trainer.world import World

WARM_UP_STEPS = 5
LEAST_STEPS = 10
SLOW = 2.0
"""times the median step: a step that counts as slow"""


@dataclass(frozen=True)
class RankTime:
    """One rank's mean seconds a step before it meets the others."""

    rank: int
    wait: float
    """for data"""
    forward: float
    own_seconds: float
    """both: what the other ranks would wait for"""


@dataclass(frozen=True)
class TrainProfile:
    """A stretch of the training loop on the first rank, and what the ranks took."""

    batch: int
    """of one rank"""
    world_size: int
    steps: int
    images_per_s: float
    """of all ranks"""
    step_seconds: Measured
    p99_ms: float
    every_step: list[float]
    """seconds of each step, in order"""
    every_wait: list[float]
    """of these, waiting for data"""
    data_wait: float
    """share of the wall time"""
    overlap: float
    """share of the loader's work that was done while the device worked"""
    update_share: float
    meters_share: float
    """metrics: keeping, bringing over and writing them"""
    explained: float
    """share of the wall time that is data wait, update or metrics"""
    queue_mean: float
    """batches that lay ready when the next was asked for"""
    queue_size: int
    slow_steps: str
    """how many, the worst and why; empty for none"""
    others: float
    """cores that other programs took meanwhile"""
    ranks: list[RankTime]
    holds: dict[str, dict[str, float]]
    """stage -> resource -> seconds an image, in the running loop"""
    servers: dict[str, float]

    def judge(self, noise: str | None) -> Verdict:
        """What binds the loop: a rank that the others wait for, else the resource that was busiest."""
        verdict = judge(self.model(), noise, self.images_per_s / self.world_size)
        rank = straggler([each.own_seconds for each in self.ranks])
        if rank is None:
            return verdict
        slow = self.ranks[rank]
        others = [each.own_seconds for each in self.ranks if each.rank != rank]
        why = "waiting for its data" if slow.wait > slow.forward else "in its forward pass"
        sentence = (
            f"rank {rank} straggles: {1e3 * slow.own_seconds:,.1f} ms of its own a step, most of it {why}, where the "
            f"others take {1e3 * sum(others) / len(others):,.1f} ms and wait for it. On that rank: {verdict.sentence}"
        )
        return replace(verdict, stage=f"rank {rank}", sentence=sentence)

    def model(self) -> Model:
        """For the verdict: the resource that was busiest binds (utilisation law: busy share = rate x seconds held)."""
        return Model([Stage(name, holds) for name, holds in self.holds.items()], self.servers)


class _Enough(Exception):
    """Ends the loop from within its progress call."""


class _Watcher:
    """Stands around the loop and writes down what passes."""

    def __init__(self, seconds: float, device: torch.device) -> None:
        self.seconds, self.device = seconds, device
        self.world = World(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")), device)
        self.loader: Loader | None = None
        self.spans = Spans()
        self.steps: list[float] = []
        self.waits: list[float] = []
        self.updates: list[float] = []
        self.forwards: list[float] = []
        self.queue: list[int] = []
        self.events: list[tuple[Any, Any]] = []
        self.meters = 0.0
        self.target = 0
        self.count = 0
        self.last, self.waited, self.entered = 0.0, 0.0, 0.0

    def open_loader(self, *args: Any, **options: Any) -> Loader:
        """build_loader, watched."""
        self.loader = build_loader(*args, **options)
        self.spans = watch(self.loader)
        return self.loader

    def update(self, model: nn.Module, *args: Any, **options: Any) -> Any:
        """step.update, timed; the forward pass apart, since ranks meet only after it."""
        if not self.count:
            self._watch_forward(model)
        assert self.loader is not None
        if self.loader._prefetcher is not None:
            self.queue.append(self.loader._prefetcher._queue.qsize())
        self.count += 1
        start, first = time.perf_counter(), self._event()
        values = update(model, *args, **options)
        self.events.append((first, self._event()))
        self.updates.append(time.perf_counter() - start)
        return values

    def progress(self, _: Progress) -> None:
        """After each step."""
        assert self.loader is not None
        now = time.perf_counter()
        if self.count > WARM_UP_STEPS:
            self.steps.append(now - self.last)
            self.waits.append(self.loader.wait_seconds - self.waited)
        elif self.count == WARM_UP_STEPS:
            wanted = max(LEAST_STEPS, int(self.seconds / max(now - self.last, 1e-6)))
            self.target = self.world.agree(wanted)
            self.begin()
        if self.target and len(self.steps) >= self.target:
            self.finish()
            raise _Enough
        self.last, self.waited = time.perf_counter(), self.loader.wait_seconds

    def begin(self) -> None:
        """The warm-up is over."""
        self._synchronise()
        self.updates, self.forwards, self.queue, self.events, self.meters = [], [], [], [], 0.0
        self.before = self.spans.snapshot()
        self.around = Neighbours().__enter__()

    def finish(self) -> None:
        """Enough steps are done."""
        self._synchronise()
        self.around.__exit__()
        self.spent = {name: total.minus(self.before[name]) for name, total in self.spans.snapshot().items()}
        if self.device.type == "cuda":
            self.updates = [first.elapsed_time(last) / 1e3 for first, last in self.events]
        own = torch.tensor([sum(self.waits), sum(self.forwards)]) / len(self.steps)
        own_seconds = [row.tolist() for row in self.world.gather(own)]
        self.ranks = [RankTime(rank, each[0], each[1], sum(each)) for rank, each in enumerate(own_seconds)]

    def timed_meters(self) -> type[Metrics]:
        """Metrics, timed."""
        watcher = self

        class TimedMetrics(Metrics):
            def add(self, *args: Any, **options: Any) -> None:
                start = time.perf_counter()
                super().add(*args, **options)
                watcher.meters += time.perf_counter() - start

            def flush(self, *args: Any, **options: Any) -> None:
                watcher._synchronise()  # what the device still has to do is the update's time, not the meters'
                start = time.perf_counter()
                super().flush(*args, **options)
                watcher.meters += time.perf_counter() - start

        return TimedMetrics

    def _watch_forward(self, model: nn.Module) -> None:
        def enter(*_: object) -> None:
            self.entered = time.perf_counter()

        def leave(*_: object) -> None:
            self.forwards.append(time.perf_counter() - self.entered)

        model.register_forward_pre_hook(enter)
        model.register_forward_hook(leave)

    def _event(self) -> Any:
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure_train(config: PretrainConfig, device: torch.device, seconds: float) -> TrainProfile:
    """Runs the training loop for about `seconds`; on several ranks each calls it.

    Args:
        config: its train.global_batch is that of all ranks together.
    """
    config = with_options(
        config, train__total_steps=10**9, train__total_images=None, train__save_every_steps=10**9,
        train__picture_every_epochs=None, eval__every_epochs=None, resume="never",
    )  # fmt: skip
    watcher = _Watcher(seconds, device)
    with TemporaryDirectory(prefix="patchmill-profile-") as folder, _wrapped(watcher), suppress(_Enough):
        pretrain.pretrain(replace(config, out=folder), watcher.progress)
    return _profile(watcher, config)


@contextmanager
def _wrapped(watcher: _Watcher) -> Iterator[None]:
    """Lets the loop call the watcher for a while."""
    wrapped: dict[str, Callable] = {
        "build_loader": watcher.open_loader,
        "update": watcher.update,
        "Metrics": watcher.timed_meters(),
    }
    usual = {name: getattr(pretrain, name) for name in wrapped}
    try:
        for name, function in wrapped.items():
            setattr(pretrain, name, function)
        yield
    finally:
        for name, function in usual.items():
            setattr(pretrain, name, function)


def _profile(watcher: _Watcher, config: PretrainConfig) -> TrainProfile:
    assert watcher.loader is not None
    wall, steps = sum(watcher.steps), len(watcher.steps)
    rows, size = watcher.loader.maker.feeder.local_batch, watcher.world.size
    wait, updating = sum(watcher.waits), sum(watcher.updates)
    decoder = watcher.loader.maker.decoder
    workers = float(decoder.workers)
    busy = watcher.spent[TASK].wall / workers if isinstance(decoder, CpuDecoder) else wait
    busy = max(busy, watcher.spent[PLAN].wall + watcher.spent[BATCH].wall)
    parts = wait + updating + watcher.meters
    return TrainProfile(
        batch=rows,
        world_size=size,
        steps=steps,
        images_per_s=steps * rows * size / wall,
        step_seconds=Measured.of(watcher.steps),
        p99_ms=1e3 * percentiles(watcher.steps)[2],
        every_step=watcher.steps,
        every_wait=watcher.waits,
        data_wait=wait / wall,
        overlap=max(0.0, 1 - wait / busy) if busy else 1.0,
        update_share=updating / wall,
        meters_share=watcher.meters / wall,
        explained=min(1.0, parts / wall),
        queue_mean=sum(watcher.queue) / len(watcher.queue),
        queue_size=config.data.prefetch_batches,
        slow_steps=_slow_steps(watcher.steps, watcher.waits),
        others=watcher.around.others,
        ranks=watcher.ranks,
        holds=_holds(watcher.spent, updating, watcher.around.own, steps * rows, isinstance(decoder, CpuDecoder), wall),
        servers={THREADS: workers, CORES: float(len(os.sched_getaffinity(0))), FRONT: 1.0, DEVICE: 1.0},
    )


def _holds(
    spent: dict[str, Total], updating: float, own_cpu: float, images: int, cpu_decoder: bool, wall: float
) -> dict[str, dict[str, float]]:
    """Seconds an image at each stage of the running loop."""
    host = spent[PLAN].cpu + spent[BATCH].cpu
    copy = spent[COPY]
    seconds = {
        "plan": {FRONT: spent[PLAN].wall, CORES: spent[PLAN].cpu},
        "storage": {THREADS: spent[FETCH].wall, CORES: spent[FETCH].cpu},
        "masks": {FRONT: spent[BATCH].wall - copy.wall, CORES: spent[BATCH].cpu - copy.cpu},
        "host copy": {FRONT: copy.wall, CORES: copy.cpu},
    }
    if cpu_decoder:
        host += spent[TASK].cpu
        inside = [spent[name] for name in (FETCH, DECODE, RESIZE)]
        seconds |= {
            "decode": {THREADS: spent[DECODE].wall, CORES: spent[DECODE].cpu},
            "resize": {THREADS: spent[RESIZE].wall, CORES: spent[RESIZE].cpu},
            "bookkeeping": {
                THREADS: spent[TASK].wall - sum(each.wall for each in inside),
                CORES: spent[TASK].cpu - sum(each.cpu for each in inside),
            },
        }
    else:  # what the device or DALI's threads do cannot be seen from here: what is not the step's is theirs
        host += spent[FETCH].cpu
        seconds["decode"] = {FRONT: max(0.0, wall - updating)}
    seconds[STEP] = {DEVICE: updating, CORES: max(0.0, own_cpu - host)}
    return {name: {resource: held / images for resource, held in each.items()} for name, each in seconds.items()}


def _slow_steps(steps: list[float], waits: list[float]) -> str:
    middle = Measured.of(steps).median
    slow = [number for number, seconds in enumerate(steps) if seconds > SLOW * middle]
    if not slow:
        return ""
    worst = max(slow, key=lambda number: steps[number])
    return (
        f"{len(slow)} of {len(steps)} took more than {SLOW:g} times the median; the worst, number {worst}, "
        f"{1e3 * steps[worst]:,.0f} ms, {waits[worst] / steps[worst]:.0%} of it waiting for data"
    )
