"""candidates -> [measure] -> medians of alternated repeats, a measured device copy, and where the numbers were taken.

Candidates take turns, so that whatever else the machine does falls on all of them, and the median of each is kept. On a
CUDA device a candidate is captured in a graph and the graph's replays are timed with events: launches from Python would
hide kernels that run for a few microseconds. On a CPU the clock is perf_counter, or, where the machine is shared, the
CPU time of this process: with one thread that is what the wall clock would show on a quiet machine.
"""

import os
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks import machine

Candidate = Callable[[], object]
Clock = Callable[[], float]
CALLS_PER_GRAPH = 10


def median_seconds(
    candidates: dict[str, Candidate], device: str, repeats: int = 21, clock: Clock = time.perf_counter
) -> dict[str, float]:
    """Time one call of each candidate: the median over alternated repeats, in seconds."""
    if device.startswith("cuda"):
        timers = {name: _graph_timer(candidate) for name, candidate in candidates.items()}
    else:
        timers = {name: _cpu_timer(candidate, clock) for name, candidate in candidates.items()}
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, timer in timers.items():
            taken[name].append(timer())
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def _cpu_timer(candidate: Candidate, clock: Clock) -> Callable[[], float]:
    for _ in range(3):
        candidate()

    def timer() -> float:
        start = clock()
        candidate()
        return clock() - start

    return timer


def _graph_timer(candidate: Candidate) -> Callable[[], float]:
    # Warm-up on a side stream, as CUDA graphs ask: it compiles kernels, makes handles and fills caches.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            candidate()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS_PER_GRAPH):
            candidate()
    graph.replay()

    def timer() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / CALLS_PER_GRAPH

    return timer


def copy_bytes_per_second(device: str, clock: Clock = time.perf_counter) -> float:
    """Measure a large copy within the device's memory, counting bytes read and bytes written."""
    size = 2**30 if device.startswith("cuda") else 2**28
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / median_seconds({"copy": lambda: target.copy_(source)}, device, clock=clock)["copy"]


def environment(device: str) -> dict[str, str]:
    """Say where numbers were taken: hardware, versions, commit and date (UTC)."""
    cores = f"{torch.get_num_threads()} of {os.cpu_count()} cores of {machine.processor()}"
    return {
        "hardware": torch.cuda.get_device_name(device) if device.startswith("cuda") else cores,
        "versions": machine.versions("torch", "triton", "numpy"),
        "commit": machine.commit(),
        "date": machine.today(),
    }
