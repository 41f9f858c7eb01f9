"""shards -> [patchmill profile loader] -> the loader as training uses it, beside what its stages cost alone.

Consumed as fast as it gives: images per second, time between batches, queue; then other settings, in turn. Real samples
of the dataset all the time, in an epoch's order. The stages alone are measured in profile_stages.py.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from patchmill.pipeline.decode import dali as decode_dali
from patchmill.pipeline.decode.cpu import CpuDecoder
from patchmill.pipeline.decode.dali import DaliDecoder
from patchmill.pipeline.decode.resident import ResidentDecoder
from patchmill.pipeline.loader import Loader
from patchmill.pipeline.read.manifest import open_dataset
from patchmill.pipeline.read.shards import ShardReader
from patchmill.pipeline.read.urls import is_url
from patchmill.tools.profiler.spans import BATCH, COPY, DECODE, PLAN, RESIZE, TASK, Spans, open_loader, watch
from patchmill.tools.profiler.stages import StageCost, measure_alone
from patchmill.tools.profiler.storage import Reading, measure_storage, percentiles
from patchmill.tools.profiler.timing import Measured, Neighbours
from patchmill.trainer.config.pretrain import PretrainConfig
from patchmill.trainer.recipes.pretrain import with_options

NAMES = {CpuDecoder: "cpu", DaliDecoder: "dali", ResidentDecoder: "resident"}
WINDOWS = 8
"""parts of a measured stretch whose rates tell its spread"""
HARDWARE_SHARES = (0.5, 0.65, 0.8)
"""of the images for the GPU's JPEG engine, tried in the sweep"""


@dataclass(frozen=True)
class Together:
    """The loader as training uses it, consumed as fast as it gives."""

    images_per_s: Measured
    images_per_cpu_s: float
    mb_per_s: float
    """of encoded images"""
    interval_p50_ms: float
    """between two batches"""
    interval_p95_ms: float
    interval_p99_ms: float
    queue_mean: float
    """batches that lay ready when the next was asked for"""
    queue_size: int
    threads_busy: float | None
    """share of the reader threads' time that they worked"""
    cores_used: float
    others: float
    """cores that other programs took meanwhile"""


@dataclass(frozen=True)
class Setting:
    """One point of the sweep."""

    name: str
    value: float
    images_per_s: Measured


@dataclass(frozen=True)
class LoaderProfile:
    """All that is known of a loader."""

    decoder: str
    workers: int
    cores: int
    batch: int
    images: int
    image_bytes: float
    """of the mean sample"""
    image_pixels: float
    stages: list[StageCost]
    explained: float | None
    """share of the inline pass's wall time that lay in the stages' own clocks; None where a decoder is one graph"""
    together: Together
    storage: dict[str, Reading]
    """cold and warm; empty where the data are not local shards"""
    fits_memory: bool
    """whether the shards fit the free memory, so that storage is read once and then the page cache"""
    link_seconds: float
    """for one image to cross to the device; 0 on a CPU"""
    sweep: list[Setting]


def measure_loader(config: PretrainConfig, device: torch.device, seconds: float) -> LoaderProfile:
    """Measures a loader for about `seconds`.

    Args:
        config: its train.global_batch is the batch that is measured, on one rank.
    """
    with open_loader(config, device) as loader:
        feeder, decoder = loader.maker.feeder, loader.maker.decoder
        workers, name = decoder.workers, NAMES[type(decoder)]
        images, store = loader.num_samples, getattr(feeder, "store", None)
    shards = isinstance(store, ShardReader) and not is_url(config.data.path)
    storage = measure_storage(open_dataset(config.data.path), workers, 0.1 * seconds) if shards else {}
    alone = measure_alone(config, device, 0.25 * seconds)
    together, in_loader = _together(config, device, 0.25 * seconds, alone.image_bytes)
    stages = [replace(stage, together=in_loader.get(stage.name)) for stage in alone.stages]
    return LoaderProfile(
        decoder=name,
        workers=workers,
        cores=len(os.sched_getaffinity(0)),
        batch=config.train.global_batch,
        images=images,
        image_bytes=alone.image_bytes,
        image_pixels=alone.image_pixels,
        stages=stages,
        explained=alone.explained,
        together=together,
        storage=storage,
        fits_memory=images * alone.image_bytes < _free_bytes(),
        link_seconds=alone.link_seconds,
        sweep=sweep(config, device, workers, 0.3 * seconds),
    )


def _together(
    config: PretrainConfig, device: torch.device, seconds: float, image_bytes: float
) -> tuple[Together, dict[str, float]]:
    """The running loader, and wall seconds of an image at each of its stages there."""
    with open_loader(config, device) as loader:
        spans = watch(loader)
        intervals, queue = consume(loader, seconds, warm_up=2 * config.data.prefetch_batches + 2, spans=spans)
        decoder, rows = loader.maker.decoder, loader.maker.feeder.local_batch
    images = rows * len(intervals.seconds)
    rate = images / sum(intervals.seconds)
    spent = intervals.spent
    in_loader = {name: spent[key].wall / images for name, key in (("plan", PLAN), ("host copy", COPY))}
    in_loader["masks"] = (spent[BATCH].wall - spent[COPY].wall) / images
    busy = None
    if isinstance(decoder, CpuDecoder):
        busy = spent[TASK].wall / (decoder.workers * sum(intervals.seconds))
        in_loader |= {"decode": spent[DECODE].wall / images, "resize": spent[RESIZE].wall / images}
    p50, p95, p99 = percentiles(intervals.seconds)
    together = Together(
        images_per_s=Measured.of(_rates(intervals.seconds, rows)),
        images_per_cpu_s=images / intervals.around.own,
        mb_per_s=rate * image_bytes / 1e6,
        interval_p50_ms=1e3 * p50,
        interval_p95_ms=1e3 * p95,
        interval_p99_ms=1e3 * p99,
        queue_mean=sum(queue) / len(queue),
        queue_size=config.data.prefetch_batches,
        threads_busy=busy,
        cores_used=intervals.around.own / intervals.around.wall,
        others=intervals.around.others,
    )
    return together, in_loader


@dataclass
class Intervals:
    """A stretch of batches taken as fast as they came."""

    seconds: list[float]
    """between one batch and the next"""
    spent: dict[str, Any]
    """in the loader's stages, where they were watched"""
    around: Neighbours


def consume(loader: Loader, seconds: float, warm_up: int, spans: Spans | None = None) -> tuple[Intervals, list[int]]:
    """Takes batches as fast as they come; seconds between them and the queue's length at each."""
    for _ in range(warm_up):
        next(loader)
    assert loader._prefetcher is not None
    waiting = loader._prefetcher._queue
    taken: list[float] = []
    queue: list[int] = []
    before = spans.snapshot() if spans else {}
    with Neighbours() as around:
        last = start = time.perf_counter()
        while last - start < seconds or len(taken) < WINDOWS:
            queue.append(waiting.qsize())
            next(loader)
            now = time.perf_counter()
            taken.append(now - last)
            last = now
    spent = {name: total.minus(before[name]) for name, total in spans.snapshot().items()} if spans else {}
    return Intervals(taken, spent, around), queue


def _rates(intervals: list[float], rows: int) -> list[float]:
    """Images per second in consecutive windows of equal numbers of batches."""
    step = max(1, len(intervals) // WINDOWS)
    parts = [intervals[at : at + step] for at in range(0, len(intervals) - step + 1, step)]
    return [rows * len(part) / sum(part) for part in parts]


def sweep(config: PretrainConfig, device: torch.device, workers: int, seconds: float) -> list[Setting]:
    """Images per second with other numbers of threads, other batches and other shares for the JPEG engine, in turn."""
    cores, batch = len(os.sched_getaffinity(0)), config.train.global_batch
    trials = [("workers", float(count)) for count in sorted({1, max(1, workers // 2), workers, cores, 2 * cores})]
    trials += [("batch", float(size)) for size in (max(1, batch // 2), 2 * batch)]
    if device.type == "cuda" and config.data.decoder != "cpu":
        trials += [("hw_decoder_load", share) for share in HARDWARE_SHARES]
    rates: dict[tuple[str, float], list[float]] = {trial: [] for trial in trials}
    for _ in range(2):
        for name, value in trials:
            rates[name, value] += _trial(config, device, name, value, seconds / len(trials) / 2)
    return [Setting(name, value, Measured.of(found)) for (name, value), found in rates.items() if found]


def _trial(config: PretrainConfig, device: torch.device, name: str, value: float, seconds: float) -> list[float]:
    """Rates with one setting; none where the dataset is too small for the batch."""
    data: dict[str, Any] = {"workers": int(value)} if name == "workers" else {}
    if name == "batch":
        config = with_options(config, train__global_batch=int(value) // config.data.repeats * config.data.repeats)
    with hardware_share(value if name == "hw_decoder_load" else None):
        try:
            loader = open_loader(config, device, **data)
        except ValueError:
            return []
        with loader:
            intervals, _ = consume(loader, seconds, warm_up=config.data.prefetch_batches + 2)
            return _rates(intervals.seconds, loader.maker.feeder.local_batch)


@contextmanager
def hardware_share(share: float | None) -> Iterator[None]:
    """Lets DALI give another share of the images to the JPEG engine for a while."""
    usual = decode_dali.HARDWARE_SHARE
    decode_dali.HARDWARE_SHARE = usual if share is None else share
    try:
        yield
    finally:
        decode_dali.HARDWARE_SHARE = usual


def _free_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
