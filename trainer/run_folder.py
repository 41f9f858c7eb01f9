"""loop -> [run folder] -> people and tools: what a run says of itself beside its checkpoints.

runs/first/
  config.toml      the resolved config, fit for --config
  status.json      running, finished, stopped or failed; at which step; why; which process
  metrics.jsonl    one object a step
  evaluations.jsonl  kNN and linear probe on the way (eval.every_epochs)
  spectra.jsonl    singular values of class tokens on the way (train.spectrum_every_epochs)
  skipped.jsonl    updates that were left out, with their samples
  quarantine.jsonl bad images
  tensorboard/  pictures/  loss.png  spectra.png  checkpoints/step-XXXXXXXX/
"""

import json
import os
import socket
from pathlib import Path
from typing import Literal, NamedTuple

from patchmill.trainer.config.pretrain import PretrainConfig
from patchmill.trainer.config.toml import to_toml
from patchmill.trainer.metrics import EVALUATIONS, SPECTRA, read_lines

STATUS = "status.json"


State = Literal["running", "finished", "stopped", "failed"]


class Status(NamedTuple):
    """Where a run stands; the marker that schedulers and `patchmill runs` read."""

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
        """Whether the run says that it is running but its process, on this machine, is not there."""
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
    """Makes the folder, writes the config and drops metrics past `start`: a run that resumes there writes them again.

    Raises:
        OSError: it cannot be written; the message says how to go on.
        ValueError: it is a packed dataset.
    """
    if (run / "manifest.json").exists():
        raise ValueError(f"{run} is a dataset, not a run folder: choose another --out")
    try:
        run.mkdir(parents=True, exist_ok=True)
        _replace(run / "config.toml", to_toml(config))
        for name in ("metrics.jsonl", EVALUATIONS, SPECTRA, "skipped.jsonl"):
            if (run / name).exists():
                kept = [line for line in read_lines(run / name) if line["step"] <= start]
                _replace(run / name, "".join(json.dumps(line) + "\n" for line in kept))
    except OSError as error:
        raise OSError(f"cannot write run folder {run}: {error.strerror or error}; choose another --out") from error


def write_status(run: Path, state: State, step: int, total_steps: int, why: str | None = None) -> None:
    """Writes status.json."""
    status = Status(state, step, total_steps, why, socket.gethostname(), os.getpid())
    _replace(run / STATUS, json.dumps(status._asdict()) + "\n")


def read_status(run: Path) -> Status:
    """The status of a run folder. Raises ValueError for a folder that holds none that can be read."""
    try:
        return Status(**json.loads((run / STATUS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{run} is no run folder: its {STATUS} cannot be read ({error})") from error


def _replace(path: Path, text: str) -> None:
    """Writes a small file whole or not at all."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(text, encoding="utf-8")
    beside.rename(path)
