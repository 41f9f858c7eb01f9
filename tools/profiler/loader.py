"""Measures the loader as training uses it, the cost of its stages alone, and other settings.

Batches are consumed as fast as they come: images per second, time between batches, length of the queue. All samples are
real and come in an epoch's order.
"""

import os
import time
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from patchmill.pipeline.decode.cpu import CpuDecoder
from patchmill.pipeline.decode.dali import DaliDecoder
from patchmill.pipeline.decode.resident import ResidentDecoder
from patchmill.pipeline.loader import Loader
from patchmill.pipeline.read.manifest import open_dataset
from patchmill.pipeline.read.shards import ShardReader
from patchmill.pipeline.read.urls import is_url
from patchmill.tools.profiler.loader_bound import HOLDERS
from patchmill.tools.profiler.spans import Seconds, Seen, Spans, open_loader, stages
from patchmill.tools.profiler.storage import measure_storage, percentiles
from patchmill.tools.profiler.timing import Neighbours, measured, steps_in_turns, torch_threads, wait_for
from patchmill.trainer.config.pretrain import PretrainConfig
from patchmill.trainer.recipes.pretrain import with_options

NAMES = {CpuDecoder: "cpu", DaliDecoder: "dali", ResidentDecoder: "resident"}
LEAST_ROUNDS = 8
"""batches, at least, of the stages alone"""
SIZED = 256
"""images, at least, whose mean size is reported"""
WINDOWS = 8
"""parts of a measured stretch whose rates tell its spread"""
HARDWARE_SHARES = (0.5, 0.65, 0.8)
"""of the images for the GPU's JPEG engine, tried in the sweep"""


def measure_loader(config: PretrainConfig, device: torch.device, seconds: float) -> dict[str, Any]:
    """Measures a loader for about `seconds`; docs/profile.md describes the result.

    Args:
        config: its train.global_batch is the batch that is measured, on one rank.
    """
    with open_loader(config, device) as loader:
        workers, name = loader.maker.decoder.workers, NAMES[type(loader.maker.decoder)]
        images, store = loader.num_samples, getattr(loader.maker.feeder, "store", None)
    shards = isinstance(store, ShardReader) and not is_url(config.data.path)
    storage = measure_storage(open_dataset(config.data.path), workers, 0.1 * seconds) if shards else {}
    found = _alone(config, device, 0.25 * seconds)
    together, in_loader = _together(config, device, 0.25 * seconds, found["image_bytes"])
    for stage in found["stages"]:
        stage["together"] = in_loader.get(stage["name"])
    return found | {
        "decoder": name, "workers": workers, "cores": len(os.sched_getaffinity(0)), "batch": config.train.global_batch,
        "images": images, "together": together, "storage": storage,
        "fits_memory": images * found["image_bytes"] < os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "sweep": _sweep(config, device, workers, 0.3 * seconds),
    }  # fmt: skip


def _alone(config: PretrainConfig, device: torch.device, seconds: float) -> dict[str, Any]:
    """Measures the stages batch by batch, one thread at a time. The first batch is the warm-up.

    Batches pass the loader's own stages one after the other. DALI and the resident decoder work on whole batches: their
    decoding is what remains of a batch's time.

    Returns:
        The report's stages, explained, image_bytes, image_pixels and link_seconds.
    """
    spans, rounds = Spans(), list[dict[str, Seconds]]()
    total, inside = 0.0, 0.0
    with torch_threads(1), open_loader(config, device, spans) as loader:
        decoder, rows = loader.maker.decoder, loader.maker.feeder.local_batch
        if inline := isinstance(decoder, CpuDecoder):
            decoder.workers, decoder.batches_ahead = 1, 0  # nothing is decoded while the next stage works
        with closing(loader.maker.batches(0, 0)) as batches:  # type: ignore[type-var]
            end = time.perf_counter() + seconds
            while len(rounds) <= LEAST_ROUNDS or time.perf_counter() < end:
                before, start, cpu = spans.since(), time.perf_counter(), time.process_time()
                batch, _ = next(batches)
                wait_for(device)
                whole = Seconds(time.perf_counter() - start, time.process_time() - cpu)
                costs = stages(spans.since(before))
                if inline and rounds:
                    total += whole.wall
                    inside += sum(cost.wall for name, cost in costs.items() if name != "bookkeeping")
                elif not inline:  # other threads read meanwhile, which takes their cores' time and not the clock's
                    others = (Seconds(0.0 if name in ("storage", "checks") else cost.wall, cost.cpu)
                              for name, cost in costs.items())  # fmt: skip
                    costs["decode"] = whole.less(*others)
                rounds.append({name: cost.over(rows) for name, cost in costs.items()})
            link = _link_seconds(batch.images, device)
        size, pixels = _sizes(loader)  # last: it would warm the caches
    found = []
    for name in HOLDERS:
        walls, cpus = zip(*(costs.get(name, Seconds()) for costs in rounds[1:]), strict=True)
        if any(walls):
            found.append({"name": name, "wall": measured(walls), "cpu": measured(cpus)})
    return {
        "stages": found, "explained": inside / total if inline else None,
        "image_bytes": size, "image_pixels": pixels, "link_seconds": link,
    }  # fmt: skip


def _sizes(loader: Loader) -> tuple[float, float]:
    """Returns (mean bytes, mean pixels) of the epoch's first samples."""
    feeder = loader.maker.feeder
    sizes, pixels = list[int](), list[int]()
    with closing(feeder.plans(0, 0)) as plans:  # type: ignore[type-var]
        for plan in islice(plans, -(-SIZED // feeder.local_slots)):
            sizes += map(len, feeder.fetch(plan, 0, feeder.local_slots))
            pixels += (plan.heights_B.astype(int) * plan.widths_B).tolist()
    return sum(sizes) / len(sizes), sum(pixels) / len(pixels)


def _link_seconds(images: Tensor, device: torch.device) -> float:
    """Returns the seconds for one image to reach a GPU from page-locked memory, in the copy of a whole batch."""
    if device.type != "cuda":
        return 0.0
    pinned = images.cpu().pin_memory()
    taken, _ = steps_in_turns({"": lambda: pinned.to(device, non_blocking=True)}, device, 0.0)[""]
    return taken["median"] / len(images)


def _together(
    config: PretrainConfig, device: torch.device, seconds: float, image_bytes: float
) -> tuple[dict[str, Any], dict[str, float]]:
    """Returns the running loader, and wall seconds of an image at each of its stages."""
    spans = Spans()
    with open_loader(config, device, spans) as loader:
        taken = consume(loader, seconds, spans)
        threads = loader.maker.decoder.workers
    wall, around = sum(taken.seconds), taken.around
    images = config.train.global_batch * len(taken.seconds)
    p50, p95, p99 = percentiles(taken.seconds)
    together = {
        "images_per_s": measured(taken.rates(config.train.global_batch)), "images_per_cpu_s": images / around.own,
        "mb_per_s": images / wall * image_bytes / 1e6,
        "interval_p50_ms": 1e3 * p50, "interval_p95_ms": 1e3 * p95, "interval_p99_ms": 1e3 * p99,
        "queue_mean": sum(spans.lengths) / len(spans.lengths), "queue_size": config.data.prefetch_batches,
        "threads_busy": taken.seen["chunk"].wall / threads / wall if taken.seen["chunk"].wall else None,
        "cores_used": around.own / around.wall, "others": around.others,
    }  # fmt: skip
    return together, {name: spent.wall / images for name, spent in stages(taken.seen).items()}


@dataclass
class Stretch:
    """Batches that were taken as fast as they came."""

    seconds: list[float]
    """between one batch and the next"""
    seen: Seen
    """spent in the loader's stages, where an observer was given"""
    around: Neighbours

    def rates(self, rows: int) -> list[float]:
        """Images per second in consecutive windows of equal numbers of batches."""
        step = max(1, len(self.seconds) // WINDOWS)
        windows = [self.seconds[at : at + step] for at in range(0, len(self.seconds) - step + 1, step)]
        return [rows * len(window) / sum(window) for window in windows]


def consume(loader: Loader, seconds: float, spans: Spans | None = None) -> Stretch:
    """Takes batches as fast as they come, once the queue was emptied twice."""
    for _ in range(2 * loader.config.prefetch_batches + 2):
        next(loader)
    spans = spans or Spans()
    spans.lengths.clear()
    taken, before = list[float](), spans.since()
    with Neighbours() as around:
        last = start = time.perf_counter()
        while last - start < seconds or len(taken) < WINDOWS:
            next(loader)
            now = time.perf_counter()
            taken.append(now - last)
            last = now
    return Stretch(taken, spans.since(before), around)


def _sweep(config: PretrainConfig, device: torch.device, workers: int, seconds: float) -> list[dict[str, Any]]:
    """Measures other numbers of threads, other batches and other shares for the JPEG engine, in turn."""
    cores, batch = len(os.sched_getaffinity(0)), config.train.global_batch
    trials = [("workers", float(count)) for count in sorted({1, max(1, workers // 2), workers, cores, 2 * cores})]
    trials += [("batch", float(size)) for size in (max(1, batch // 2), 2 * batch)]
    if device.type == "cuda" and config.data.decoder != "cpu":
        trials += [("hw_decoder_load", share) for share in HARDWARE_SHARES]
    rates: dict[tuple[str, float], list[float]] = {trial: [] for trial in trials}
    for _ in range(2):
        for name, value in trials:
            rates[name, value] += _trial(config, device, name, value, seconds / len(trials) / 2)
    return [
        {"name": name, "value": value, "images_per_s": measured(found)}
        for (name, value), found in rates.items()
        if found
    ]


def _trial(config: PretrainConfig, device: torch.device, name: str, value: float, seconds: float) -> list[float]:
    """Returns rates with one setting; none where the dataset is too small for the batch."""
    if name == "batch":
        config = with_options(config, train__global_batch=int(value) // config.data.repeats * config.data.repeats)
    elif name == "workers":
        config = with_options(config, data__workers=int(value))
    try:
        loader = open_loader(config, device)
    except ValueError:
        return []
    with loader:
        if name == "hw_decoder_load" and isinstance(loader.maker.decoder, DaliDecoder):
            loader.maker.decoder.hardware_share = value
        return consume(loader, seconds).rates(config.train.global_batch)
