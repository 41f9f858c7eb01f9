"""the real loop -> [patchmill profile train] -> where its time goes: data wait, update, the rest; slow steps and ranks.

The loop of `patchmill pretrain` runs in a folder that is thrown away; profile_watch.py stands around it with a watch.
"""

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from patchmill.pipeline.decode.cpu import CpuDecoder
from patchmill.tools.profiler.bottleneck import (
    CORES,
    DEVICE,
    FRONT,
    STEP,
    THREADS,
    Model,
    Stage,
    Verdict,
    judge,
    straggler,
)
from patchmill.tools.profiler.spans import BATCH, COPY, DECODE, FETCH, PLAN, RESIZE, TASK, Total
from patchmill.tools.profiler.storage import percentiles
from patchmill.tools.profiler.timing import Measured
from patchmill.tools.profiler.watch import Enough, RankTime, TimedMetrics, Watcher
from patchmill.trainer.config.pretrain import PretrainConfig
from patchmill.trainer.engine.world import joined_world
from patchmill.trainer.flops import train_flops_per_image
from patchmill.trainer.loop import Loop
from patchmill.trainer.pretrain import build_trainee, open_loader
from patchmill.trainer.recipes.pretrain import with_options

STEPS = 10**9
"""of the run whose beginning is watched: it never comes to its end"""
SLOW = 2.0
"""times the median step: a step that counts as slow"""


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
        rank = straggler([each.own_seconds for each in self.ranks], noise)
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


def measure_train(config: PretrainConfig, device: torch.device, seconds: float) -> TrainProfile:
    """Runs the training loop for about `seconds`; on several ranks each calls it.

    Args:
        config: its train.global_batch is that of all ranks together.
    """
    config = with_options(
        config, train__total_steps=STEPS, train__total_images=None, train__save_every_steps=STEPS,
        train__picture_every_epochs=None, train__spectrum_every_epochs=None, eval__every_epochs=None,
        device=device.type,
    )  # fmt: skip
    with (
        TemporaryDirectory(prefix="patchmill-profile-") as folder,
        joined_world(config.device, config.train.rank_timeout_seconds) as world,
        open_loader(config, world) as loader,
    ):
        config = replace(config, out=folder)
        watcher = Watcher(loader, world, seconds)
        eager = not (config.train.compile or config.train.cuda_graph)
        loop = Loop(config, world, watcher.wrap(build_trainee(config, world), eager=eager), loader, STEPS)
        metrics = TimedMetrics(
            Path(folder), world, global_batch=config.train.global_batch, tensorboard=config.train.tensorboard,
            flops_per_image=train_flops_per_image(config.model, config.mask), wandb=None,
        )  # fmt: skip
        metrics.watcher = watcher
        try:
            with suppress(Enough):
                loop.run(0, metrics, [], watcher.progress)
        finally:
            metrics.close()
        return _profile(watcher, config)


def _profile(watcher: Watcher, config: PretrainConfig) -> TrainProfile:
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
