"""SIGINT, SIGTERM, SIGUSR1 -> [signals] -> loop: being asked to stop, acted upon between two updates.

SLURM announces the end of a job with SIGTERM or, as `--signal=USR1@90` asks, SIGUSR1; torchrun passes on what it is
told to (`--signals-to-handle`, which `patchmill launch` writes). A handler only notes the name.
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
    """A list that a stop signal puts its name into.

    A second Ctrl-C ends the process at once, except under torchrun: there one Ctrl-C comes twice, from the terminal and
    from torchrun, which ends its workers by itself when they take too long.
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
