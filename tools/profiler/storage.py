"""Measures how fast samples are read, from storage (cold) and from the page cache (warm).

Before the cold reads the kernel is asked to drop the shards' pages (posix_fadvise needs no rights). preadv with
RWF_NOWAIT, which answers only from the cache, checks page by page whether it did; the result says so, because the host
of a virtual machine may still hold what the guest dropped.
"""

import os
import time
from io import FileIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchmill.pipeline.read.manifest import Dataset
from patchmill.pipeline.read.threads import Pool

AT_ONCE = 8  # samples of one task, as in the decoders


def measure_storage(dataset: Dataset, workers: int, seconds: float) -> dict[str, dict[str, Any]]:
    """Reads whole samples in random order for about `seconds`: cold (each sample once), then the same warm.

    As many threads read as the loader has. docs/profile.md describes the result.
    """
    ids = np.random.default_rng(0).permutation(len(dataset))
    rows = dataset.samples[ids]
    files = {int(shard): FileIO(dataset.shard_path(int(shard))) for shard in np.unique(rows["shard"])}
    try:
        for file in files.values():
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        cold, used = _read(files, rows, workers, seconds / 2)
        warm, _ = _read(files, rows[:used], workers, seconds / 2)
    finally:
        for file in files.values():
            file.close()
    return {"cold": cold, "warm": warm}


def _read(files: dict[int, FileIO], rows: NDArray, workers: int, seconds: float) -> tuple[dict[str, Any], int]:
    """Reads rows in order until the time is over; returns the result, and how many were read."""
    cached = _cached_share(files, rows[:200])
    latencies: list[float] = []

    def read(part: NDArray) -> int:
        size = 0
        for shard, offset, length in zip(part["shard"], part["offset"], part["size"], strict=True):
            start = time.perf_counter()
            size += len(os.pread(files[int(shard)].fileno(), int(length), int(offset)))
            latencies.append(time.perf_counter() - start)
        return size

    total, done, wave = 0, 0, AT_ONCE * workers * 4
    start = time.perf_counter()
    with Pool(workers, "patchmill-profile") as pool:
        while not done or (done < len(rows) and time.perf_counter() - start < seconds):
            parts = [rows[at : at + AT_ONCE] for at in range(done, min(done + wave, len(rows)), AT_ONCE)]
            total += sum(task.result() for task in [pool.submit(read, part) for part in parts])
            done += sum(map(len, parts))
    wall = time.perf_counter() - start
    p50, p95, p99 = percentiles(latencies)
    found = {
        "images_per_s": done / wall, "mb_per_s": total / wall / 1e6,
        "p50_ms": 1e3 * p50, "p95_ms": 1e3 * p95, "p99_ms": 1e3 * p99, "from_cache": cached,
    }  # fmt: skip
    return found, done


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """Returns the 50th, 95th and 99th percentile; 0 of nothing."""
    p50, p95, p99 = np.percentile(values or [0.0], (50, 95, 99)).tolist()
    return p50, p95, p99


def _cached_share(files: dict[int, FileIO], rows: NDArray) -> float | None:
    """Returns the share of samples whose first page is in the page cache; None where the system does not say."""
    hits = 0
    for row in rows:
        try:
            os.preadv(files[int(row["shard"])].fileno(), [bytearray(1)], int(row["offset"]), os.RWF_NOWAIT)
            hits += 1
        except BlockingIOError:
            continue
        except (OSError, AttributeError):  # a file system without it, or not Linux
            return None
    return hits / len(rows)
