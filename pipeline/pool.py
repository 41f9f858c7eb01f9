"""decode_cpu, decode_dali -> [pool] -> threads that read and decode.

The standard library's pool joins its threads when the interpreter ends, so that one read that hangs in the kernel (a
dead file server) would keep a process that has already reported the error from ending. These threads do not.
"""

import queue
import threading
import time
from collections.abc import Callable
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
