"""Runs jobs in this process, in several, or on a Ray cluster.

A packing engine packs the tasks it is given in any order and calls `report(images, source bytes, bad images)` as it
goes; `report` returning False stops it. The content of the shards never depends on the engine.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from itertools import islice
from multiprocessing.connection import wait as wait_for
from typing import Any, TypeVar

from patchmill.tools.packing.destination import Store
from patchmill.tools.packing.pack_shard import Progress, Stopped, pack_shard
from patchmill.tools.packing.plan import ShardTask

Job = TypeVar("Job")
Result = TypeVar("Result")


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_processes(function: Callable[[Job], Result], jobs: Sequence[Job], workers: int) -> Iterator[Result]:
    """Yields the results in order; in this process when there is one job or one worker.

    Args:
        function: at the top level of a module, for new processes to find it.
        workers: processes; 0 is one per processor.
    """
    workers = min(workers or processors(), len(jobs))
    if workers <= 1:
        yield from map(function, jobs)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(function, jobs)


def pack_here(tasks: Iterable[ShardTask], store: Store, report: Progress) -> None:
    """Packs one shard after the other in this process."""
    for task in tasks:
        pack_shard(task, store, report)


def pack_in_processes(tasks: Iterable[ShardTask], store: Store, report: Progress, workers: int) -> None:
    """Packs with `workers` processes. An error in one stops all of them and is raised here."""
    context = multiprocessing.get_context("spawn")  # fork would copy the parent's threads' locks
    counters = context.Array(ctypes.c_uint64, 3)
    stop = context.Event()
    seen = [0, 0, 0]

    def pass_on() -> None:
        with counters.get_lock():
            now = [counters[i] for i in range(3)]
        images, size, bad = (a - b for a, b in zip(now, seen, strict=True))
        seen[:] = now
        if not report(images, size, bad):
            raise Stopped

    with ProcessPoolExecutor(workers, context, _start_worker, (counters, stop)) as pool:
        try:
            with interrupts_ignored():
                for _ in range(workers):
                    pool.submit(os.getpid)  # each starts a worker, as none is idle yet
            for done in _at_most(2 * workers, (partial(pool.submit, _pack_in_worker, task, store) for task in tasks)):
                for future in done:
                    future.result()
                pass_on()
        except BrokenProcessPool:
            raise ValueError(
                "a worker process was killed, probably out of memory: give fewer --workers or a smaller --max-pixels; "
                "the same command resumes"
            ) from None
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
    pass_on()


def pack_on_ray(tasks: Iterable[ShardTask], store: Store, report: Progress) -> None:
    """Packs on a Ray cluster: the one at RAY_ADDRESS, or a local one that ends with the call.

    Every machine of the cluster must reach sources and output under the same paths.
    """
    try:
        import ray
    except ImportError:
        raise ValueError("--engine ray needs another package: pip install 'patchmill[ray]'") from None
    ours = not ray.is_initialized()
    if ours:
        ray.init(log_to_driver=False, include_dashboard=False, runtime_env={"env_vars": _python_path()})
    try:
        pack = ray.remote(num_cpus=1, max_retries=3)(_pack_and_count)
        slots, jobs = 2 * int(ray.cluster_resources().get("CPU", 1)), iter(tasks)
        running: list[Any] = []
        while True:
            running += [pack.remote(task, store) for task in islice(jobs, slots - len(running))]
            if not running:
                break
            done, running = ray.wait(running, num_returns=1)
            if not report(*ray.get(done[0])):
                raise Stopped
    finally:
        if ours:
            ray.shutdown()


def _pack_and_count(task: ShardTask, store: Store) -> tuple[int, int, int]:
    """Packs one shard; returns (images, source bytes, bad images)."""
    totals = [0, 0, 0]

    def report(*done: int) -> bool:
        for i, count in enumerate(done):
            totals[i] += count
        return True

    pack_shard(task, store, report)
    return totals[0], totals[1], totals[2]


def _python_path() -> dict[str, str]:
    """The import path of this process, for Ray's workers: in a checkout the package is not installed."""
    return {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def _at_most(limit: int, jobs: Iterator[Callable[[], Future]]) -> Iterator[set[Future]]:
    """Keeps at most `limit` jobs submitted; yields those that finished, ten times a second even if none did."""
    running = {job() for job in islice(jobs, limit)}
    while running:
        done, running = wait(running, timeout=0.1, return_when=FIRST_COMPLETED)
        running |= {job() for job in islice(jobs, len(done))}
        yield done


_shared: dict[str, Any] = {}  # a worker's counters and stop event; they can only be passed when the process is created


@contextmanager
def interrupts_ignored() -> Iterator[None]:
    """Processes started within ignore Ctrl-C from the start; the parent stops them."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set signal handlers
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _start_worker(counters: Any, stop: Any) -> None:
    """Sets up a worker that ends with its parent."""
    _shared.update(counters=counters, stop=stop)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait_for([sentinel])
    os._exit(1)


def _pack_in_worker(task: ShardTask, store: Store) -> None:
    counters, stop = _shared["counters"], _shared["stop"]

    def report(*done: int) -> bool:
        with counters.get_lock():
            for i, count in enumerate(done):
                counters[i] += count
        return not stop.is_set()

    pack_shard(task, store, report)
