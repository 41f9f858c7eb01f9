"""shards -> [profile_stages] -> what an image costs at each stage of the loader, alone on one thread.

Batches of real samples, in an epoch's order, go through the stages one after the other. A decoder that is one graph
(DALI, resident) cannot be walked through: it is measured as a whole.
"""

import time
import zlib
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from patchmill.pipeline.decode.cpu import CHUNK, CpuDecoder
from patchmill.pipeline.decode.resident import ResidentDecoder
from patchmill.pipeline.loader import Loader
from patchmill.pipeline.plan.feed import AnyFeeder, StepPlan
from patchmill.pipeline.read.manifest import ImageFormat
from patchmill.pipeline.read.shards import ShardReader, fault
from patchmill.tools.profiler.spans import BATCH, COPY, DECODE, FETCH, PLAN, RESIZE, TASK, open_loader, watch
from patchmill.tools.profiler.timing import Measured, torch_threads, wait_for
from patchmill.trainer.config.pretrain import PretrainConfig

STAGES = ("plan", "storage", "checks", "decode", "resize", "bookkeeping", "masks", "host copy")
"""in the order in which an image passes them"""
Costs = dict[str, tuple[float, float]]
"""stage -> (wall, CPU) seconds"""


@dataclass(frozen=True)
class StageCost:
    """What one image costs at a stage, in seconds."""

    name: str
    wall: Measured
    """alone, on one thread"""
    cpu: Measured
    """of it on a core; the rest is waiting"""
    together: float | None = None
    """wall seconds in the running loader, where other threads want the cores too; None where they are not told apart"""


@dataclass(frozen=True)
class Alone:
    """The stages of a loader, one after the other."""

    stages: list[StageCost]
    explained: float | None
    link_seconds: float
    image_bytes: float
    image_pixels: float


def measure_alone(config: PretrainConfig, device: torch.device, seconds: float) -> Alone:
    """The stages one after the other, batch by batch. The first batch is the warm-up."""
    rounds: list[Costs] = []
    sizes: list[float] = []
    pixels: list[float] = []
    walls, inside = 0.0, 0.0
    with torch_threads(1), open_loader(config, device) as loader, closing(_batches(loader)) as batches:
        inline = isinstance(loader.maker.decoder, CpuDecoder)
        end = time.perf_counter() + seconds
        while len(rounds) < 4 or time.perf_counter() < end:
            start = time.perf_counter()
            plan, images, costs = next(batches)
            walls += (time.perf_counter() - start) * bool(rounds)
            inside += sum(wall for name, (wall, _) in costs.items() if name != "bookkeeping") * bool(rounds)
            if inline or not sizes:  # beside a graph of its own threads, once must do
                check, size = _checks(loader.maker.feeder, plan)
                sizes.append(size)
                pixels.append(float((plan.heights_B.astype(float) * plan.widths_B).mean()))
            costs["storage"], costs["checks"] = _less(costs["storage"], check), _least(costs["storage"], check)
            rounds.append({name: (wall / len(images), cpu / len(images)) for name, (wall, cpu) in costs.items()})
        link = _link_seconds(images, device)
    del rounds[0]
    stages = []
    for name in STAGES:
        wall_each, cpu_each = zip(*(found[name] for found in rounds), strict=True)
        if max(wall_each) > 0:
            stages.append(StageCost(name, Measured.of(wall_each), Measured.of(cpu_each)))
    return Alone(stages, inside / walls if inline else None, link, sum(sizes) / len(sizes), sum(pixels) / len(pixels))


def _batches(loader: Loader) -> Generator[tuple[StepPlan, Tensor, Costs]]:
    """Batches taken through the stages by this thread, with what each stage took."""
    spans = watch(loader)
    maker, decoder = loader.maker, loader.maker.decoder
    decoded = _inline(decoder) if isinstance(decoder, CpuDecoder) else decoder.batches(0, 0)
    while True:
        before, start, cpu = spans.snapshot(), time.perf_counter(), time.process_time()
        plan, images = next(decoded)
        maker._batch(plan, images)
        wait_for(maker.device)
        wall, used = time.perf_counter() - start, time.process_time() - cpu
        took = {name: total.minus(before[name]) for name, total in spans.snapshot().items()}
        costs = {name: (took[key].wall, took[key].cpu) for name, key in (("plan", PLAN), ("storage", FETCH))}
        if isinstance(decoder, CpuDecoder):
            costs |= {"decode": took[DECODE][1:], "resize": took[RESIZE][1:]}
            costs["bookkeeping"] = _less(took[TASK][1:], took[FETCH][1:], took[DECODE][1:], took[RESIZE][1:])
        else:  # a graph that cannot be walked through: decoding, resizing and flipping as a whole, beside the reading
            beside = took[FETCH].wall * isinstance(decoder, ResidentDecoder), took[FETCH].cpu
            costs["decode"] = _less((wall, used), beside, took[PLAN][1:], took[BATCH][1:])
            costs |= {"resize": (0.0, 0.0), "bookkeeping": (0.0, 0.0)}
        costs |= {"masks": _less(took[BATCH][1:], took[COPY][1:]), "host copy": took[COPY][1:]}
        yield plan, images, costs


def _inline(decoder: CpuDecoder) -> Iterator[tuple[StepPlan, Tensor]]:
    """What the decoder's threads do, by this thread."""
    for plan in decoder.feeder.plans(0, 0):
        images = torch.empty(decoder.shape, dtype=torch.uint8, pin_memory=decoder.pin_memory)
        for lo in range(0, decoder.feeder.local_slots, CHUNK):
            decoder._decode(plan, images, lo)
        yield plan, images


def _less(whole: tuple[float, float], *parts: tuple[float, float]) -> tuple[float, float]:
    wall, cpu = (max(0.0, whole[i] - sum(part[i] for part in parts)) for i in (0, 1))
    return wall, cpu


def _least(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    return min(one[0], other[0]), min(one[1], other[1])


def _checks(feeder: AnyFeeder, plan: StepPlan) -> tuple[tuple[float, float], float]:
    """((wall, CPU) seconds of checking a batch's bytes, mean bytes of a sample)."""
    data = feeder.fetch(plan, 0, feeder.local_slots)
    size = sum(map(len, data)) / len(data)
    if not isinstance(getattr(feeder, "store", None), ShardReader):
        return (0.0, 0.0), size
    told = [(len(sample), zlib.crc32(sample)) for sample in data]
    wall, cpu = time.perf_counter(), time.thread_time()
    for sample, (length, crc) in zip(data, told, strict=True):
        fault(sample, length, crc, ImageFormat.JPEG)
    return (time.perf_counter() - wall, time.thread_time() - cpu), size


def _link_seconds(images: Tensor, device: torch.device) -> float:
    """Seconds for one image to cross to a GPU from page-locked memory, in the copy of a whole batch."""
    if device.type != "cuda":
        return 0.0
    pinned, taken = images.pin_memory(), []
    for _ in range(5):
        wait_for(device)
        start = time.perf_counter()
        pinned.to(device, non_blocking=True)
        wait_for(device)
        taken.append(time.perf_counter() - start)
    return Measured.of(taken).median / len(images)
