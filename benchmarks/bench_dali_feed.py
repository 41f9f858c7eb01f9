"""What feeding DALI costs on the host: `python -m benchmarks.bench_dali_feed IMAGES [--batches N]`.

IMAGES is a folder or .zip of JPEGs. Runs the loader with DALI's CPU backend and reports three things: CPU microseconds
a sample that the feeding thread spends in DALI's `feed_input` (most of it holding the interpreter's lock), how late a
thread wakes that sleeps for a millisecond meanwhile, and images/s. The checksum of all batches shows whether two
versions decode the same bits.
"""

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from nvidia.dali.pipeline import Pipeline

from benchmarks.bench_dali_gpu import prepare
from patchmill.pipeline.config import DataConfig, MaskConfig
from patchmill.pipeline.loader import build_loader

NAP = 1e-3


def timed_feed(feed: Callable[..., None], taken: list[tuple[float, float]]) -> Callable[..., None]:
    """Wraps `Pipeline._feed_input`: (CPU seconds, seconds) of each call."""

    def timed(*arguments: Any, **named: Any) -> None:
        start, cpu = time.perf_counter(), time.thread_time()
        feed(*arguments, **named)
        taken.append((time.thread_time() - cpu, time.perf_counter() - start))

    return timed


def measure(data: Path, batch: int, batches: int, workers: int) -> dict[str, float]:
    """Loads some batches while another thread sleeps and wakes."""
    taken, late, stop, crc = list[tuple[float, float]](), list[float](), threading.Event(), 0

    def nap() -> None:
        while not stop.is_set():
            start = time.perf_counter()
            time.sleep(NAP)
            late.append(time.perf_counter() - start - NAP)

    config = DataConfig(path=str(data), decoder="dali", workers=workers)
    with (
        mock.patch.object(Pipeline, "_feed_input", timed_feed(Pipeline._feed_input, taken)),
        build_loader(
            config, image_size=224, patch_size=16, channels=3, mask=MaskConfig(), seed=0, global_batch=batch
        ) as loader,
    ):
        crc = zlib.crc32(next(loader).images.numpy(), crc)
        thread = threading.Thread(target=nap)
        taken.clear()
        thread.start()
        start = time.perf_counter()
        for _ in range(batches):
            crc = zlib.crc32(next(loader).images.numpy(), crc)
        wall = time.perf_counter() - start
        stop.set()
        thread.join()
    # a batch has four inputs: samples, start, shape, flips
    feeds = [[sum(part) for part in zip(*taken[at : at + 4], strict=True)] for at in range(0, len(taken) - 3, 4)]
    cpus, walls = zip(*feeds, strict=True)
    return {
        "feed_cpu_us_a_sample": 1e6 * statistics.median(cpus) / batch,
        "feed_us_a_sample": 1e6 * statistics.median(walls) / batch,
        "feed_cpu_ms_a_batch_most": 1e3 * max(cpus),
        "late_ms_p99": 1e3 * sorted(late)[int(0.99 * len(late))],
        "late_ms_most": 1e3 * max(late),
        "images_per_s": batches * batch / wall,
        "crc32": crc,
    }


def main(argv: list[str]) -> None:
    """Prints one line for each round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data, facts = prepare(options.images, Path(folder), options.batch * 4)
        print(facts)
        for _ in range(options.rounds):
            found = measure(data, options.batch, options.batches, options.workers)
            print(", ".join(f"{name} {value:.2f}" for name, value in found.items()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
