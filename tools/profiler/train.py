"""Runs the real training loop for a while and tells where its time goes: data wait, update, metrics; slow steps, ranks.

`pretrain` itself runs in a folder that is thrown away; an observer times it. It ends after the same step on all ranks,
from within its progress call. On a GPU the host runs ahead, so CUDA events time the updates and the waits for data.
"""

import os
import statistics
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory

import torch

from patchmill.pipeline.observe import Span
from patchmill.pipeline.waits import record_event
from patchmill.tools.profiler import bottleneck
from patchmill.tools.profiler.bottleneck import CORES, DEVICE, FRONT, STEP, THREADS, Model, Stage, Verdict, straggler
from patchmill.tools.profiler.loader_bound import HOLDERS
from patchmill.tools.profiler.spans import Spans, Stopwatch, stages
from patchmill.tools.profiler.storage import percentiles
from patchmill.tools.profiler.timing import Measured, Neighbours, wait_for
from patchmill.trainer.config.pretrain import PretrainConfig
from patchmill.trainer.engine.world import World
from patchmill.trainer.loop import Progress
from patchmill.trainer.pretrain import pretrain
from patchmill.trainer.recipes.pretrain import with_options

STEPS = 10**9
"""of the run, which never comes to its end"""
WARM_UP_STEPS, LEAST_STEPS = 3, 8
SLOW = 2.0
"""times the median step: a step that counts as slow"""


@dataclass(frozen=True)
class RankTime:
    """One rank's seconds a step before it meets the others (medians)."""

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
    """of these, the device waiting for data"""
    data_wait: float
    """share of the wall time"""
    host_wait: float
    """share of the wall time that the host spent in the loader's `next`; equal to data_wait on a CPU"""
    overlap: float
    """share of the loader's work that was done while the device worked"""
    update_share: float
    meters_share: float
    """metrics: fetching and writing them"""
    explained: float
    """share of the wall time that is data wait, update or metrics"""
    queue_mean: float
    """batches that were ready when the next was asked for"""
    queue_size: int
    slow_steps: str
    """how many, the worst and why; empty for none"""
    others: float
    """cores that other programs took meanwhile"""
    ranks: list[RankTime]
    holds: dict[str, dict[str, float]]
    """stage -> resource -> seconds an image, in the running loop"""
    servers: dict[str, float]

    def model(self) -> Model:
        """Models the loop: the resource that was busiest binds (utilisation law: busy share = rate x seconds held)."""
        return Model([Stage(name, holds) for name, holds in self.holds.items()], self.servers)

    def judge(self, noise: str | None) -> Verdict:
        """Names what binds the loop: a rank that the others wait for, else the resource that was busiest."""
        verdict = bottleneck.judge(self.model(), noise, self.images_per_s / self.world_size)
        rank = straggler([each.own_seconds for each in self.ranks], noise)
        if rank is None:
            return verdict
        slow = self.ranks[rank]
        others = statistics.mean(each.own_seconds for each in self.ranks if each.rank != rank)
        why = "waiting for its data" if slow.wait > slow.forward else "in its forward pass"
        sentence = (
            f"rank {rank} straggles: it takes {1e3 * slow.own_seconds:,.1f} ms a step before it meets the others, most "
            f"of it {why}; they take {1e3 * others:,.1f} ms and wait for it. On that rank: {verdict.sentence}"
        )
        return replace(verdict, stage=f"rank {rank}", sentence=sentence)


def measure_train(config: PretrainConfig, device: torch.device, seconds: float) -> TrainProfile:
    """Runs the training loop for about `seconds`; on several ranks each calls it.

    Args:
        config: its train.global_batch is that of all ranks together.
    """
    world = World(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")), device)
    watcher = Watcher(world, seconds)
    with TemporaryDirectory(prefix="patchmill-profile-") as folder, suppress(Enough):
        config = with_options(
            config, train__total_steps=STEPS, train__total_images=None, train__save_every_steps=STEPS,
            train__picture_every_epochs=None, train__spectrum_every_epochs=None, train__wandb=None,
            eval__every_epochs=None, device=device.type, out=folder, resume="never", init="",
        )  # fmt: skip
        pretrain(config, watcher.progress, watcher)
        raise KeyboardInterrupt  # a signal ended the run early
    return _profile(watcher, config)


class Enough(Exception):
    """Ends the loop from within its progress call."""


class Watcher(Spans):
    """Observes a training loop.

    Attributes:
        steps: seconds of each measured step.
        taken: seconds of each span of the loop's thread, by name.
        ranks, seen, around, host_wait: at the end: the ranks' own times, all spans, what else was running, and the
            host's seconds in `next`.
    """

    def __init__(self, world: World, seconds: float) -> None:
        super().__init__()
        self.world, self.seconds = world, seconds
        self.steps: list[float] = []
        self.taken: dict[str, list[float]] = {name: [] for name in ("wait", "update", "forward", "metrics")}
        self.events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {"wait": [], "update": []}
        self.done, self.target, self.last = 0, 0, 0.0

    def span(self, name: Span, images: int) -> Stopwatch:
        """Measures one span: waits and updates by the device too, and metrics without the updates they wait for."""
        if name in self.events and self.world.device.type == "cuda":
            return Events(self, name)
        if name == "metrics":
            wait_for(self.world.device)
        return super().span(name, images)

    def add(self, name: str, wall: float, cpu: float) -> None:
        """Keeps the loop's spans one by one."""
        super().add(name, wall, cpu)
        if name in self.taken:
            self.taken[name].append(wall)

    def progress(self, _: Progress) -> None:
        """Counts a step; the first ones are the warm-up."""
        now = time.perf_counter()
        self.done += 1
        if self.done > WARM_UP_STEPS:
            self.steps.append(now - self.last)
        elif self.done == WARM_UP_STEPS:
            # the first rank decides, so that all ranks end after the same step
            self.target = self.world.agree(max(LEAST_STEPS, int(self.seconds / max(now - self.last, 1e-6))))
            wait_for(self.world.device)
            for each in self.taken.values():
                each.clear()
            self.lengths.clear()
            for each in self.events.values():
                each.clear()
            self.before, self.around = self.since(), Neighbours().__enter__()
        if self.target and len(self.steps) >= self.target:
            self._finish()
            raise Enough
        self.last = time.perf_counter()

    def _finish(self) -> None:
        wait_for(self.world.device)
        self.around.__exit__()
        self.seen = self.since(self.before)
        self.host_wait = sum(self.taken["wait"])
        for name, events in self.events.items():
            if events:
                self.taken[name] = [first.elapsed_time(last) / 1e3 for first, last in events]
        medians = [statistics.median(self.taken[name] or [0.0]) for name in ("wait", "forward")]
        gathered = [row.tolist() for row in self.world.gather(torch.tensor(medians))]
        self.ranks = [RankTime(rank, wait, forward, wait + forward) for rank, (wait, forward) in enumerate(gathered)]


class Events(Stopwatch):
    """Measures a span between two events of the device as well."""

    spans: Watcher

    def __enter__(self) -> "Events":
        self.first = record_event(self.spans.world.device)
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self.spans.events[self.name].append((self.first, record_event(self.spans.world.device)))


def _profile(watcher: Watcher, config: PretrainConfig) -> TrainProfile:
    steps, waits, seen = watcher.steps, watcher.taken["wait"], watcher.seen
    size = watcher.world.size
    rows = config.train.global_batch // size
    wall, wait = sum(steps), sum(waits)
    updating, meters = sum(watcher.taken["update"]), sum(watcher.taken["metrics"])
    cores = len(os.sched_getaffinity(0))
    workers = float(config.data.workers or cores)
    busy = seen["chunk"].wall / workers if "chunk" in seen else wait
    busy = max(busy, sum(seen[name].wall for name in ("plan", "masks", "colour", "copy")))
    return TrainProfile(
        batch=rows, world_size=size, steps=len(steps), images_per_s=len(steps) * rows * size / wall,
        step_seconds=Measured.of(steps), p99_ms=1e3 * percentiles(steps)[2], every_step=steps, every_wait=waits,
        data_wait=wait / wall, host_wait=watcher.host_wait / wall,
        overlap=max(0.0, 1 - wait / busy) if busy else 1.0,
        update_share=updating / wall, meters_share=meters / wall, explained=min(1.0, (wait + updating + meters) / wall),
        queue_mean=statistics.mean(watcher.lengths), queue_size=config.data.prefetch_batches,
        slow_steps=_slow_steps(steps, waits), others=watcher.around.others, ranks=watcher.ranks,
        holds=_holds(watcher, updating, wall, len(steps) * rows),
        servers={THREADS: workers, CORES: float(cores), FRONT: 1.0, DEVICE: 1.0},
    )  # fmt: skip


def _holds(watcher: Watcher, updating: float, wall: float, images: int) -> dict[str, dict[str, float]]:
    """Returns the seconds for which an image holds a thread (or the device) and a core at each stage."""
    found = stages(watcher.seen)
    host = sum(spent.cpu for spent in found.values())
    holds = {name: {HOLDERS[name][0]: spent.wall, CORES: spent.cpu} for name, spent in found.items()}
    if "decode" not in found:  # of DALI and the resident decoder all is theirs that is not the step's
        holds["decode"] = {FRONT: max(0.0, wall - updating)}
    holds[STEP] = {DEVICE: updating, CORES: max(0.0, watcher.around.own - host)}
    return {name: {resource: held / images for resource, held in each.items()} for name, each in holds.items()}


def _slow_steps(steps: list[float], waits: list[float]) -> str:
    middle = statistics.median(steps)
    slow = [number for number, seconds in enumerate(steps) if seconds > SLOW * middle]
    if not slow:
        return ""
    worst = max(slow, key=lambda number: steps[number])
    return (
        f"{len(slow)} of {len(steps)} took more than {SLOW:g} times the median; the worst, number {worst}, "
        f"{1e3 * steps[worst]:,.0f} ms, {waits[worst] / steps[worst]:.0%} of it waiting for data"
    )
