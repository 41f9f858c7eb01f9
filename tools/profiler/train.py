"""Runs the real training loop for a while and tells where its time goes: data wait, update, metrics; slow steps, ranks.

`pretrain` itself runs in a folder that is thrown away; an observer times it. It ends after the same step on all ranks,
from within its progress call. On a GPU the host runs ahead, so CUDA events time the updates and the waits for data.
"""

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

import torch

from patchmill.pipeline.observe import Span
from patchmill.pipeline.waits import record_event
from patchmill.tools.profiler import bottleneck
from patchmill.tools.profiler.bottleneck import CORES, DEVICE, FRONT, STEP, THREADS, Model, Stage, Verdict, straggler
from patchmill.tools.profiler.loader_bound import HOLDERS
from patchmill.tools.profiler.spans import Spans, stages
from patchmill.tools.profiler.storage import percentiles
from patchmill.tools.profiler.timing import Neighbours, measured, wait_for
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


def train_model(train: dict[str, Any]) -> Model:
    """Models the loop: the resource that was busiest binds (utilisation law: busy share = rate x seconds held)."""
    return Model([Stage(name, holds) for name, holds in train["holds"].items()], train["servers"])


def judge_train(train: dict[str, Any], noise: str | None) -> Verdict:
    """Names what binds the loop: a rank that the others wait for, else the resource that was busiest."""
    verdict = bottleneck.judge(train_model(train), noise, train["images_per_s"] / train["world_size"])
    own_seconds = [each["own_seconds"] for each in train["ranks"]]
    rank = straggler(own_seconds, noise)
    if rank is None:
        return verdict
    slow = train["ranks"][rank]
    others = statistics.mean(own_seconds[:rank] + own_seconds[rank + 1 :])
    why = "waiting for its data" if slow["wait"] > slow["forward"] else "in its forward pass"
    sentence = (
        f"rank {rank} straggles: it takes {1e3 * slow['own_seconds']:,.1f} ms a step before it meets the others, most "
        f"of it {why}; they take {1e3 * others:,.1f} ms and wait for it. On that rank: {verdict.sentence}"
    )
    return replace(verdict, stage=f"rank {rank}", sentence=sentence)


def measure_train(config: PretrainConfig, device: torch.device, seconds: float) -> dict[str, Any]:
    """Runs the training loop for about `seconds`; on several ranks each calls it. docs/profile.md describes the result.

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

    def span(self, name: Span, images: int) -> AbstractContextManager[object]:
        """Measures one span: waits and updates by the device too, and metrics without the updates they wait for."""
        if name in self.events and self.world.device.type == "cuda":
            return self._on_device(name)
        if name == "metrics":
            wait_for(self.world.device)
        return super().span(name, images)

    @contextmanager
    def _on_device(self, name: Span) -> Iterator[None]:
        """Measures a span between two events of the device as well."""
        first = record_event(self.world.device)
        with super().span(name, 0):
            yield
        self.events[name].append((first, record_event(self.world.device)))

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
            for events in self.events.values():
                events.clear()
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
        self.ranks = [
            {"rank": rank, "wait": wait, "forward": forward, "own_seconds": wait + forward}
            for rank, (wait, forward) in enumerate(gathered)
        ]


def _profile(watcher: Watcher, config: PretrainConfig) -> dict[str, Any]:
    steps, waits, seen = watcher.steps, watcher.taken["wait"], watcher.seen
    size = watcher.world.size
    rows = config.train.global_batch // size
    wall, wait = sum(steps), sum(waits)
    updating, meters = sum(watcher.taken["update"]), sum(watcher.taken["metrics"])
    cores = len(os.sched_getaffinity(0))
    workers = float(config.data.workers or cores)
    busy = seen["chunk"].wall / workers or wait
    busy = max(busy, sum(seen[name].wall for name in ("plan", "masks", "colour", "copy")))
    return {
        "batch": rows, "world_size": size, "steps": len(steps), "images_per_s": len(steps) * rows * size / wall,
        "step_seconds": measured(steps), "p99_ms": 1e3 * percentiles(steps)[2], "every_step": steps,
        "every_wait": waits, "data_wait": wait / wall,
        "host_wait": watcher.host_wait / wall, "overlap": max(0.0, 1 - wait / busy) if busy else 1.0,
        "update_share": updating / wall, "meters_share": meters / wall,
        "explained": min(1.0, (wait + updating + meters) / wall),
        "queue_mean": statistics.mean(watcher.lengths), "queue_size": config.data.prefetch_batches,
        "slow_steps": _slow_steps(steps, waits), "others": watcher.around.others, "ranks": watcher.ranks,
        "holds": _holds(watcher, updating, wall, len(steps) * rows),
        "servers": {THREADS: workers, CORES: float(cores), FRONT: 1.0, DEVICE: 1.0},
    }  # fmt: skip


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
