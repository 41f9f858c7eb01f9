"""Writes and reads the files by which a run describes itself.

runs/first/
  config.toml        the resolved config, ready for --config
  status.json        running, finished, stopped or failed; at which step; why; which process
  metrics.jsonl      one object per step
  evaluations.jsonl  kNN and linear probe during training (eval.every_epochs)
  spectra.jsonl      singular values of class tokens during training (train.spectrum_every_epochs)
  skipped.jsonl      skipped updates: what was not finite first, and their samples
  quarantine.jsonl   bad images
  tensorboard/  pictures/  loss.png  spectra.png  checkpoints/step-XXXXXXXX/
"""

import json
import os
import socket
from pathlib import Path
from typing import Literal, NamedTuple

from patchmill.pipeline.atomic import write_whole
from patchmill.trainer.config.pretrain import PretrainConfig
from patchmill.trainer.config.toml import to_toml
from patchmill.trainer.metrics import EVALUATIONS, SPECTRA, read_lines

STATUS = "status.json"

State = Literal["running", "finished", "stopped", "failed"]


class Status(NamedTuple):
    """The state of a run, which schedulers and `patchmill runs` read."""

    state: State
    step: int
    total_steps: int
    why: str | None
    """the signal that stopped it, or the error that ended it"""
    host: str
    pid: int
    """of the first rank"""

    @property
    def is_gone(self) -> bool:
        """Whether the run claims to be running on this machine but its process no longer exists."""
        if self.state != "running" or self.host != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False


def open_run(run: Path, config: PretrainConfig, start: int) -> None:
    """Creates the folder, writes the config and drops lines after step `start`, which the resumed run writes again.

    Raises:
        OSError: the folder cannot be written.
        ValueError: the folder is a packed dataset.
    """
    if (run / "manifest.json").exists():
        raise ValueError(f"{run} is a dataset, not a run folder: choose another --out")
    try:
        run.mkdir(parents=True, exist_ok=True)
        write_whole(run / "config.toml", to_toml(config))
        for name in ("metrics.jsonl", EVALUATIONS, SPECTRA, "skipped.jsonl"):
            if (run / name).exists():
                kept = [line for line in read_lines(run / name) if line["step"] <= start]
                write_whole(run / name, "".join(json.dumps(line) + "\n" for line in kept))
    except OSError as error:
        raise OSError(f"cannot write run folder {run}: {error.strerror or error}; choose another --out") from error


def write_status(run: Path, state: State, step: int, total_steps: int, why: str | None = None) -> None:
    """Writes status.json."""
    status = Status(state, step, total_steps, why, socket.gethostname(), os.getpid())
    write_whole(run / STATUS, json.dumps(status._asdict()) + "\n")


def read_status(run: Path) -> Status:
    """Reads the status of a run folder. Raises ValueError if it has none or it is unreadable."""
    try:
        return Status(**json.loads((run / STATUS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{run} is not a run folder: cannot read its {STATUS} ({error})") from error
