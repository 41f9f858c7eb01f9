"""stages -> [prefetch] -> training step: a thread that runs ahead, and a queue that holds it back.

The consumer never hangs: an exception in a stage reaches it as that exception, a dead thread or too long a wait as an
error.
"""

import queue
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from typing import Any, Self

JOIN_SECONDS = 5  # how long `close` waits for tasks that have begun


class Pool:
    """A fixed number of daemon threads that run tasks in the order of their submission."""

    def __init__(self, workers: int, name: str) -> None:
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=_work, args=(self._tasks,), name=f"{name}-{i}", daemon=True) for i in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable, *args: Any) -> Future:
        """Lets a thread run `function(*args)`; the future's `result` gives what it returns or raises what it raises."""
        future: Future = Future()
        self._tasks.put((future, function, args))
        return future

    def close(self) -> None:
        """Drops the tasks that have not begun, and waits for the others, though not for ever."""
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
        except BaseException as error:  # `result` raises it where the batch is put together
            future.set_exception(error)


POLL_SECONDS = 0.2  # how soon a full queue notices that it is to stop, and an empty one that its thread is dead


class Prefetcher:
    """Runs an iterator in a thread of its own, up to `depth` items ahead.

    The thread holds no reference to this object: dropping it, like `close`, ends the thread.
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
        """The next item; raises what a stage raised, or TimeoutError."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            try:
                item = self._queue.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if not self._thread.is_alive():
                    raise RuntimeError("the loader's thread has ended without a batch") from None
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"no batch within {timeout_seconds:g} s: the storage hangs, or is slower than that; "
                        "raise data.timeout_seconds if it may be"
                    ) from None
                continue
            if isinstance(item, BaseException):
                raise item
            return item

    def __len__(self) -> int:
        """Items that are ready."""
        return self._queue.qsize()

    def close(self) -> None:
        """Ends the thread and waits for it."""
        self._finalizer()


def _produce(items: Iterator[Any], out: queue.Queue, stop: threading.Event) -> None:
    try:
        for item in items:
            if not _put(item, out, stop):
                break
    except BaseException as error:  # the consumer raises it: nothing may end this thread in silence
        _put(error, out, stop)
    finally:
        if isinstance(items, Generator):
            items.close()  # ends the stages' own threads


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
    while not out.empty():  # a batch is tens of megabytes: not to be kept by a forgotten queue
        out.get_nowait()
    if thread is not threading.current_thread():
        thread.join(timeout=10)
