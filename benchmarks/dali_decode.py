"""Measures DALI's decoder and resize alone, from JPEGs in memory: no files, no checks, no masks.

The graph of pipeline/decode/dali.py in small, with the switches that it may be given: how much the hardware decoder
takes, window or whole image, chroma upsampling as libjpeg does it.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from patchmill.pipeline.plan.feed import Feeder

SIDE = 224
BATCHES_IN_MEMORY = 8
QUEUE_DEPTH = 2


@dataclass(frozen=True)
class Setting:
    """One way to decode."""

    batch: int = 256
    threads: int = 16
    load: float = 0.65
    """share of the images for the hardware decoder"""
    window: bool = True
    """decode the crop window alone; else the whole image, then cut"""
    fancy: bool = False
    """interpolate chroma as libjpeg does"""


class Work:
    """Encoded images and windows of the loader's first steps, ready for DALI."""

    def __init__(self, feeder: Feeder) -> None:
        self.samples, self.starts, self.shapes = [], [], []
        for step in range(BATCHES_IN_MEMORY):
            plan = feeder.plan(0, step % feeder.steps_per_epoch)
            self.samples += [np.frombuffer(data, np.uint8) for data in feeder.fetch(plan, 0, feeder.local_slots)]
            self.starts += list(plan.windows_B4[:, :2])
            self.shapes += list(plan.windows_B4[:, 2:])

    def batches(self, size: int) -> Iterator[tuple[list[NDArray], NDArray, NDArray]]:
        """Batches in turn, for ever."""
        start = 0
        while True:
            rows = [i % len(self.samples) for i in range(start, start + size)]
            yield (
                [self.samples[i] for i in rows],
                np.stack([self.starts[i] for i in rows]),
                np.stack([self.shapes[i] for i in rows]),
            )
            start += size


def images_per_second(work: Work, setting: Setting, seconds: float, on_gpu: bool) -> float:
    """Decoded and resized images a second, after a warm-up."""
    pipeline = build(work, setting, on_gpu)
    for _ in range(QUEUE_DEPTH + 2):
        pipeline.run()
    _wait(on_gpu)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        pipeline.run()
        count += setting.batch
    _wait(on_gpu)
    return count / (time.perf_counter() - start)


def first_batch(work: Work, setting: Setting, on_gpu: bool) -> torch.Tensor:
    """The first batch as uint8 [B, H, W, 3] in main memory."""
    (images,) = build(work, setting, on_gpu).run()
    return torch.from_numpy(np.array((images.as_cpu() if on_gpu else images).as_tensor()))


def build(work: Work, setting: Setting, on_gpu: bool) -> Any:
    """The pipeline of a setting."""
    dali, fn, types = (import_module(name) for name in ("nvidia.dali", "nvidia.dali.fn", "nvidia.dali.types"))
    kind: dict[str, Any] = {"device": "mixed", "hw_decoder_load": setting.load} if on_gpu else {"device": "cpu"}
    kind |= {"output_type": types.RGB, "jpeg_fancy_upsampling": setting.fancy}
    batches = work.batches(setting.batch)

    @dali.pipeline_def(
        batch_size=setting.batch,
        num_threads=setting.threads,
        device_id=0 if on_gpu else None,
        prefetch_queue_depth=QUEUE_DEPTH,
    )
    def graph() -> Any:
        encoded, start, shape = fn.external_source(lambda: next(batches), batch=True, num_outputs=3)
        if setting.window:
            images = fn.decoders.image_slice(encoded, start=start, shape=shape, axis_names="HW", **kind)
        else:
            images = fn.slice(fn.decoders.image(encoded, **kind), start=start, shape=shape, axis_names="HW")
        return fn.resize(images, size=(SIDE, SIDE), interp_type=types.INTERP_CUBIC, antialias=True)

    pipeline = graph()
    pipeline.build()
    return pipeline


def _wait(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()
