"""fit <-> [state.safetensors] -> exact resume: what has been learnt so far, in one file that is whole or absent.

Only what learns is kept (for a probe the head), with the optimizer's state, the moving average and, in the header, the
step, the history and the options. What is frozen is read from the checkpoint again.
"""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from patchmill.trainer.evaluate.classifier import Classifier

STATE = "state.safetensors"
FINISHED = "classifier.safetensors"


class Learning(NamedTuple):
    """What changes while a classifier learns."""

    model: Classifier
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor]
    """moving average of the learning parameters by name; empty when none is kept"""


def save_state(run: Path, learning: Learning, about: dict[str, Any]) -> None:
    """Writes the state beside and renames it. `about` is JSON: step, history, options.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    tensors = {f"model.{name}": value for name, value in _learnt(learning.model).items()}
    tensors |= {f"average.{name}": value for name, value in learning.average.items()}
    for name, parameter in _trained(learning.model):
        for key, value in learning.optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = value
    _write(run / STATE, tensors, {"format": "patchmill-evaluation", "about": json.dumps(about)})


def load_state(run: Path, learning: Learning, options: dict[str, Any]) -> dict[str, Any] | None:
    """Puts the saved state into place and returns its `about`; None when there is none.

    Raises:
        ValueError: the state is damaged, or was made with other options; the message names them.
    """
    path = run / STATE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["about"])
        tensors = load_file(path)
        changed = [
            f"{name} was {about['options'].get(name)}, is {options.get(name)}"
            for name in sorted({*about["options"], *options})
            if about["options"].get(name) != options.get(name)
        ]
        if changed:
            raise ValueError(
                f"{run} holds a run of other options ({'; '.join(changed)}); give these again, or another --out"
            )
        for name, value in _learnt(learning.model).items():
            value.copy_(tensors[f"model.{name}"])
        for name, value in learning.average.items():
            value.copy_(tensors[f"average.{name}"])
        for name, parameter in _trained(learning.model):
            parts = {each.split(".")[1] for each in tensors if each.startswith("optimizer.")}
            learning.optimizer.state[parameter] = {
                key: tensors[f"optimizer.{key}.{name}"].to(parameter.device) for key in sorted(parts)
            }
    except (SafetensorError, KeyError, RuntimeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be used ({error}); remove it to start anew, or give another --out") from error
    return about


def save_classifier(run: Path, model: Classifier, average: dict[str, Tensor], about: dict[str, Any]) -> Path:
    """Writes classifier.safetensors in the published names: the average where one is kept. `about` goes to the header.

    Raises:
        OSError: as `save_state`.
    """
    tensors = {name: average.get(name, value) for name, value in model.state_dict().items()}
    _write(run / FINISHED, tensors, {"format": "patchmill-classifier", "about": json.dumps(about)})
    return run / FINISHED


def read_classifier(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a classifier.safetensors, or of the run folder that holds one.

    Raises:
        ValueError: it is not there, not whole or something else.
    """
    file = path / FINISHED if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"no classifier {file}: give the folder of a finished `patchmill finetune` or `probe` run")
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file: {error}; give another") from error
    if header.get("format") != "patchmill-classifier":
        raise ValueError(f"{file} is no classifier of ours; give the folder of a `patchmill finetune` or `probe` run")
    return tensors, json.loads(header["about"])


def _trained(model: Classifier) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _learnt(model: Classifier) -> dict[str, Tensor]:
    """Learning parameters, and the buffers that follow them (BatchNorm's statistics)."""
    named = {name: parameter.detach() for name, parameter in _trained(model)}
    return named | {name: value for name, value in model.state_dict().items() if name.startswith("head.0.")}


def _write(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    beside = path.with_name(f".{path.name}.tmp")
    try:
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, beside, metadata=header)
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        beside.rename(path)
    except (SafetensorError, OSError) as error:
        beside.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error}; free space or choose another --out") from error
