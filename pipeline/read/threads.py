"""Runs tasks in a pool of threads, and an iterator in a thread that works ahead of its consumer.

The consumer never hangs: an exception in a thread is raised where its result is fetched, and a dead thread or too long
a wait is an error.
"""

import queue
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from typing import Any, Self

JOIN_SECONDS = 5  # how long Pool.close waits for running tasks
POLL_SECONDS = 0.2  # how soon a thread at a full queue notices that it must stop, and a consumer that its thread died


class Pool:
    """A fixed number of daemon threads that start tasks in the order of submission.

    Not concurrent.futures: the interpreter waits for its threads at exit, and a read that hangs would block it.
    """

    def __init__(self, workers: int, name: str) -> None:
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=_work, args=(self._tasks,), name=f"{name}-{i}", daemon=True) for i in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable, *args: Any) -> Future:
        """Runs `function(*args)` in a thread; the future's `result` returns or raises what the function does."""
        future: Future = Future()
        self._tasks.put((future, function, args))
        return future

    def close(self) -> None:
        """Drops the tasks that have not started and waits for the others, at most JOIN_SECONDS."""
        while not self._tasks.empty():
            self._tasks.get()[0].cancel()
        for _ in self._threads:
            self._tasks.put(None)
        deadline = time.monotonic() + JOIN_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _work(tasks: queue.SimpleQueue) -> None:
    while (task := tasks.get()) is not None:
        future, function, args = task
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(function(*args))
        except BaseException as error:  # `result` raises it in the consumer's thread
            future.set_exception(error)


class Prefetcher:
    """Runs an iterator in its own thread, up to `depth` items ahead.

    The thread holds no reference to this object: dropping the last reference ends the thread, as `close` does.
    """

    def __init__(self, items: Iterator[Any], depth: int) -> None:
        self._queue: queue.Queue = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=_produce, args=(items, self._queue, self._stop), name="patchmill-prefetch", daemon=True
        )
        self._finalizer = weakref.finalize(self, _end, self._thread, self._queue, self._stop)
        self._thread.start()

    def get(self, timeout_seconds: float) -> Any:
        """Returns the next item. Raises what the iterator raised, or TimeoutError."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            try:
                item = self._queue.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if not self._thread.is_alive():
                    raise RuntimeError("the loader's thread ended without a batch") from None
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"no batch within {timeout_seconds:g} s: the storage hangs or is too slow; "
                        "raise data.timeout_seconds if it needs longer"
                    ) from None
                continue
            if isinstance(item, BaseException):
                raise item
            return item

    def __len__(self) -> int:
        """Number of items that are ready."""
        return self._queue.qsize()

    def close(self) -> None:
        """Ends the thread and waits for it."""
        self._finalizer()


def _produce(items: Iterator[Any], out: queue.Queue, stop: threading.Event) -> None:
    try:
        for item in items:
            if not _put(item, out, stop):
                break
    except BaseException as error:  # the consumer raises it: this thread must not end silently
        _put(error, out, stop)
    finally:
        if isinstance(items, Generator):
            items.close()  # stops the threads of the stages


def _put(item: Any, out: queue.Queue, stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            out.put(item, timeout=POLL_SECONDS)
            return True
        except queue.Full:
            continue
    return False


def _end(thread: threading.Thread, out: queue.Queue, stop: threading.Event) -> None:
    stop.set()
    while not out.empty():  # a batch is tens of megabytes: free them now
        out.get_nowait()
    if thread is not threading.current_thread():
        thread.join(timeout=10)
