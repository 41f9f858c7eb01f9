"""Times candidates in turns: medians and spreads, measured ceilings, and what other programs took meanwhile.

Candidates take turns, which spreads whatever else the machine does over all of them, and the median of each counts. On
a CUDA device a candidate is captured in a graph, the L2 cache is flushed, and one replay is timed with events: the
flush runs while the host launches the replay, and the candidate finds its inputs in memory. The time includes one
launch of a graph, about 2 microseconds. On a CPU the clock is perf_counter, or, on a shared machine, the CPU time of
this process: with one thread that is what the wall clock would show on a quiet machine.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import torch

from patchmill.tools.profiler import machine

Candidate = Callable[[], object]
Clock = Callable[[], float]
Measured = dict[str, float]
"""median, low and high (quartiles), repeats: one quantity, measured repeatedly"""
FLUSH_BYTES = 2**28
"""read before every repeat: several times the L2 cache of any GPU"""
ROUND_SECONDS = 0.05
"""shortest measurement of a step"""
BUSY = 0.1
"""share of the cores: if other programs take more, the machine is noisy"""


def measured(values: Sequence[float]) -> Measured:
    """Summarises repeated measurements, at least one: their median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "low": max(low, min(values)), "high": min(high, max(values)), "repeats": len(values)}


def spread(measured: Measured) -> float:
    """Returns half of the interquartile range over the median."""
    return (measured["high"] - measured["low"]) / 2 / measured["median"] if measured["median"] else 0.0


def timed_in_turns(
    candidates: dict[str, Candidate], device: str, repeats: int = 21, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """Returns the seconds of one call of each candidate, `repeats` times in turn."""
    if device.startswith("cuda"):
        flush = _l2_flush(device)
        timers = {name: _graph_timer(candidate, flush) for name, candidate in candidates.items()}
    else:
        timers = {name: _cpu_timer(candidate, clock) for name, candidate in candidates.items()}
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, timer in timers.items():
            taken[name].append(timer())
    return taken


def median_seconds(
    candidates: dict[str, Candidate], device: str, repeats: int = 21, clock: Clock = time.perf_counter
) -> dict[str, float]:
    """Returns the median seconds of one call of each candidate, taking turns."""
    taken = timed_in_turns(candidates, device, repeats, clock)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def steps_in_turns(
    steps: dict[str, Callable[[], object]], device: torch.device, seconds: float
) -> dict[str, tuple[Measured, float]]:
    """Times steps in turn for about `seconds`, at least three times each; several short steps are timed together.

    Returns:
        Wall seconds of one step, and mean CPU seconds of this process, by name.
    """
    together: dict[str, int] = {}
    for name, step in steps.items():
        step()
        step()
        together[name] = max(1, round(ROUND_SECONDS / _seconds(step, 1, device)[0]))
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    while min(map(len, taken.values())) < 3 or time.perf_counter() < end:
        for name, step in steps.items():
            taken[name].append(_seconds(step, together[name], device))
    return {
        name: (measured([wall for wall, _ in each]), statistics.fmean(cpu for _, cpu in each))
        for name, each in taken.items()
    }


def _seconds(step: Callable[[], object], count: int, device: torch.device) -> tuple[float, float]:
    """Returns (wall, CPU) seconds of one of `count` steps."""
    wait_for(device)
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        step()
    wait_for(device)
    return (time.perf_counter() - start) / count, (time.process_time() - cpu) / count


def wait_for(device: torch.device) -> None:
    """Waits until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Sets the number of threads of torch's operators for a while."""
    usual = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


def _cpu_timer(candidate: Candidate, clock: Clock) -> Callable[[], float]:
    for _ in range(3):
        candidate()

    def timer() -> float:
        start = clock()
        candidate()
        return clock() - start

    return timer


def _l2_flush(device: str) -> Candidate:
    """Evicts L2 by reading: lines that a write left dirty would be written back during the candidate."""
    scratch, total = torch.zeros(FLUSH_BYTES // 4, device=device), torch.zeros((), device=device)
    return lambda: torch.sum(scratch, dim=0, out=total)


def _graph_timer(candidate: Candidate, flush: Candidate) -> Callable[[], float]:
    # CUDA graphs require a warm-up on a side stream: it compiles kernels, makes handles and fills caches.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            candidate()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        candidate()
    graph.replay()
    flush()

    def timer() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    return timer


def copy_bytes_per_second(device: str, clock: Clock = time.perf_counter, repeats: int = 21) -> float:
    """Measures a large copy within the device's memory, counting bytes read and bytes written."""
    size = 2**30 if device.startswith("cuda") else 2**28
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / median_seconds({"copy": lambda: target.copy_(source)}, device, repeats, clock)["copy"]


def matmul_flops_per_second(device: str, dtype: torch.dtype, repeats: int = 5) -> float:
    """Measures a large matrix product: the ceiling of arithmetic where no data sheet gives one (a CPU)."""
    side = 8192 if device.startswith("cuda") else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2.0 * side**3 / median_seconds({"matmul": lambda: torch.mm(a, b, out=out)}, device, repeats)["matmul"]


class Neighbours:
    """Measures the cores that other programs take meanwhile, from /proc/stat.

    Attributes:
        others: cores that other programs took on average; 0 where the system does not say.
        wall, own: seconds that passed, and CPU seconds of this process.
    """

    def __enter__(self) -> Self:
        self._wall, self._own, self._all = time.perf_counter(), time.process_time(), _busy_seconds()
        return self

    def __exit__(self, *exception: object) -> None:
        self.wall, self.own = time.perf_counter() - self._wall, time.process_time() - self._own
        self.others = max(0.0, (_busy_seconds() - self._all - self.own) / self.wall)

    @property
    def noise(self) -> str | None:
        """Says what disturbed the measurement; None on a quiet machine."""
        cores = os.cpu_count() or 1
        return f"other programs took {self.others:.1f} of {cores} cores" if self.others > BUSY * cores else None


def _busy_seconds() -> float:
    """Returns the CPU seconds of all programs since the machine started, and of its neighbours on the same host."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, stat.read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def environment(device: str) -> dict[str, str]:
    """Says where numbers were taken: hardware, versions, commit and date (UTC)."""
    cores = f"{torch.get_num_threads()} of {os.cpu_count()} cores of {machine.processor()}"
    return {
        "hardware": torch.cuda.get_device_name(device) if device.startswith("cuda") else cores,
        "versions": machine.versions("torch", "triton", "numpy"),
        "commit": machine.commit(),
        "date": machine.today(),
    }
