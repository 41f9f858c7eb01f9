"""Saves and restores a fit that is under way, and writes the finished classifier.

The state holds only what learns (for a probe, the head), the optimizer's state and the moving average. Its header holds
the step, the history and the options. Frozen weights are read from the checkpoint again.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from patchmill.pipeline.atomic import whole_file
from patchmill.trainer.config.evaluate import FinetuneConfig, ProbeConfig
from patchmill.trainer.evaluate.classifier import Classifier

STATE = "state.safetensors"
FINISHED = "classifier.safetensors"

FREE_OPTIONS = {
    *("out", "device", "resume", "test", "subject.checkpoint", "fit.test_every_epochs", "fit.save_every_steps"),
    *(f"data.{name}" for name in ("path", "decoder", "workers", "prefetch_batches", "quarantine_path")),
    *(f"data.{name}" for name in ("timeout_seconds", "cache_dir", "cache_limit_gib")),
    # earlier versions saved these, and neither probe nor finetune ever obeyed them
    *(f"data.{name}" for name in ("repeats", "samples_per_epoch", "shuffle_buffer", "allow_pipe")),
}
"""options that a run may change when it goes on: paths, devices, and what only reports"""


class Learning(NamedTuple):
    """What changes while a classifier learns."""

    model: Classifier
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor]
    """moving average of the learning parameters by name; empty when none is kept"""


def fixed_options(config: ProbeConfig | FinetuneConfig) -> dict[str, Any]:
    """The options that shape the weights (all but FREE_OPTIONS), flat and ready for JSON."""

    def flat(value: Any, name: str) -> dict[str, Any]:
        if name in FREE_OPTIONS:
            return {}
        if isinstance(value, dict):
            return {k: v for key, each in value.items() for k, v in flat(each, f"{name}.{key}".lstrip(".")).items()}
        return {name: value}

    return json.loads(json.dumps(flat(dataclasses.asdict(config), "")))


def changed_options(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names of the options that differ between a saved run and this one, sorted; FREE_OPTIONS may differ."""
    return [name for name in sorted({*was, *now} - FREE_OPTIONS) if was.get(name) != now.get(name)]


def save_state(run: Path, learning: Learning, about: dict[str, Any]) -> None:
    """Writes the state atomically. `about` is JSON: step, history, options.

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
    """Restores the saved state in place and returns its `about`; None when there is none.

    Raises:
        ValueError: the state is damaged, or was saved with other options; the message names them.
    """
    path = run / STATE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["about"])
        tensors = load_file(path)
        was = about["options"]
        changed = [f"{name} was {was.get(name)}, is {options.get(name)}" for name in changed_options(was, options)]
        if changed:
            raise ValueError(
                f"{run} holds a run with other options ({'; '.join(changed)}); give the same ones, or another --out"
            )
        _restore(learning, tensors)
    except (SafetensorError, KeyError, RuntimeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be used ({error}); remove it to start again, or give another --out") from error
    return about


def save_classifier(run: Path, model: Classifier, average: dict[str, Tensor], about: dict[str, Any]) -> Path:
    """Writes classifier.safetensors under the published names: the average where one is kept. `about` is its header.

    Raises:
        OSError: as `save_state`.
    """
    tensors = {name: average.get(name, value) for name, value in model.state_dict().items()}
    _write(run / FINISHED, tensors, {"format": "patchmill-classifier", "about": json.dumps(about)})
    return run / FINISHED


def read_classifier(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a classifier.safetensors, or of the run folder that holds one.

    Raises:
        ValueError: the file is missing, damaged or something else.
    """
    file = path / FINISHED if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"no classifier {file}: give the folder of a finished `patchmill finetune` or `probe` run")
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file: {error}; give another") from error
    if header.get("format") != "patchmill-classifier":
        raise ValueError(
            f"{file} is not a Patchmill classifier; give the folder of a `patchmill finetune` or `probe` run"
        )
    return tensors, json.loads(header["about"])


def _trained(model: Classifier) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _learnt(model: Classifier) -> dict[str, Tensor]:
    """Learning parameters, and the buffers that follow them (BatchNorm's statistics)."""
    named = {name: parameter.detach() for name, parameter in _trained(model)}
    return named | {name: value for name, value in model.state_dict().items() if name.startswith("head.0.")}


def _restore(learning: Learning, tensors: dict[str, Tensor]) -> None:
    for name, value in _learnt(learning.model).items():
        value.copy_(tensors[f"model.{name}"])
    for name, value in learning.average.items():
        value.copy_(tensors[f"average.{name}"])
    keys = sorted({name.split(".")[1] for name in tensors if name.startswith("optimizer.")})
    for name, parameter in _trained(learning.model):
        learning.optimizer.state[parameter] = {
            key: tensors[f"optimizer.{key}.{name}"].to(parameter.device) for key in keys
        }


def _write(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    try:
        with whole_file(path) as unfinished:
            save_file({name: t.detach().contiguous() for name, t in tensors.items()}, unfinished, metadata=header)
    except (SafetensorError, OSError) as error:
        raise OSError(f"cannot write {path}: {error}; free space or choose another --out") from error
