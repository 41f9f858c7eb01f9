"""Notes SIGINT, SIGTERM and SIGUSR1 for the training loop, which then stops between two updates.

SLURM announces the end of a job with SIGTERM, or with SIGUSR1 under `--signal=USR1@90`. torchrun forwards the signals
listed in `--signals-to-handle`, which `patchmill launch` writes. The handler only records the signal's name.
"""

import os
import signal
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def stop_on_signals() -> Iterator[list[str]]:
    """Yields a list to which every stop signal adds its name.

    A second Ctrl-C ends the process immediately, except under torchrun. There one Ctrl-C arrives twice, from the
    terminal and from torchrun, which kills workers that take too long anyway.
    """
    names: list[str] = []
    before = {}

    def note(number: int, frame: types.FrameType | None) -> None:
        if signal.SIGINT.name in names and number == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise KeyboardInterrupt
        names.append(signal.Signals(number).name)

    if threading.current_thread() is threading.main_thread():
        before = {each: signal.signal(each, note) for each in STOP_SIGNALS}
    try:
        yield names
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
