"""Measures how long training waits for batches: the share that the device stood idle, and the host's time in `next`.

On a GPU the two differ. The host runs ahead of the device and then blocks in `next` while the device is still busy, so
the host's time is far more than what training loses. A batch that reaches the host early may still not be ready on the
device, so it can be less too.
"""

import functools
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch


class Mark(Protocol):
    """A point on the device's timeline, as torch.cuda.Event: recorded, and reached later."""

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end_event: Any) -> float: ...


class Waited(NamedTuple):
    """Seconds waited for batches so far."""

    device: float = 0.0
    """that the device had nothing else to do"""
    host: float = 0.0
    """that the host spent in `next`"""


class Waits:
    """Adds up the waits for batches.

    Between the two marks around `next` the training stream holds only its wait for the batch. It reaches the first when
    the previous step has ended (or at once, if it had), and the second when the batch is ready: the difference is idle
    time of the device. The first mark must precede the host's wait, during which the device may run dry.

    Args:
        device: of the training stream.
        mark: records a mark on the training stream. Default: a timing event on a CUDA device; elsewhere no marks, and
            both figures are the host's.
        clock: the host's, in seconds.
    """

    def __init__(
        self,
        device: torch.device,
        mark: Callable[[], Mark] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._mark = functools.partial(record_event, device) if mark is None and device.type == "cuda" else mark
        self._clock = clock
        self._marks: deque[tuple[Mark, Mark]] = deque()
        self._device_seconds = 0.0
        self.host_seconds = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Measures the block in which the host fetches a batch and makes the current stream wait for it."""
        start, before = self._clock(), self._mark and self._mark()
        yield
        if self._mark and before:
            self._marks.append((before, self._mark()))
        self.host_seconds += self._clock() - start
        while self._marks and self._marks[0][1].query():  # as many remain as the host is ahead of the device
            self._add_first()

    def total(self) -> Waited:
        """Returns all seconds so far; waits until the device has reached the last batch that was handed out."""
        if self._mark is None:
            return Waited(self.host_seconds, self.host_seconds)
        if self._marks:
            self._marks[-1][1].synchronize()
        while self._marks:
            self._add_first()
        return Waited(self._device_seconds, self.host_seconds)

    def _add_first(self) -> None:
        before, after = self._marks.popleft()
        self._device_seconds += before.elapsed_time(after) * 1e-3


def record_event(device: torch.device) -> torch.cuda.Event:
    """Records a timing event on the device's current stream."""
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event
