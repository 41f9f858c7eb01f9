"""Runs `patchmill pretrain` for the torchrun tests: a little slower, and killed during a save on request.

DIE_IN_SAVE=N: the first rank dies in its second save of torchrun's N-th attempt (from 0).
"""

import os
import signal
import sys
import time

from patchmill.tools import cli
from patchmill.trainer import pretrain
from patchmill.trainer.checkpoints import checkpoint
from patchmill.trainer.engine import step


def slow_update(*args, **kwargs):
    """Leaves a test time to send its signal."""
    time.sleep(0.02)
    return update(*args, **kwargs)


def deadly_sums(folder):
    """Dies between the tensors and their sums."""
    if next(saves) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return sums(folder)


update, sums, saves = step.update, checkpoint._sums, iter(range(1000))
pretrain.update = slow_update  # type: ignore[attr-defined]
if os.environ.get("DIE_IN_SAVE") == os.environ["TORCHELASTIC_RESTART_COUNT"] and os.environ["RANK"] == "0":
    real_write = checkpoint.write

    def write(*args):
        """Only sums that are written count, not those that are checked."""
        checkpoint._sums = deadly_sums
        try:
            return real_write(*args)
        finally:
            checkpoint._sums = sums

    checkpoint.write = write
sys.exit(cli.run("pretrain", sys.argv[1:]))
