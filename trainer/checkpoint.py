"""run <-> [checkpoint folder] -> exact resume: tensors as safetensors, the rest as JSON, no pickle anywhere.

    checkpoints/step-00001200/
      model.safetensors      published parameter names; the model's config in the header
      optimizer.safetensors  exp_avg.<name>, exp_avg_sq.<name>, step.<name>
      state.json             step, epoch, the loader's state, versions
      SHA256SUMS             of the three, written last

A folder is written beside and renamed when it is whole, so that it is either absent or complete; sums are checked
before anything is read.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from patchmill.trainer.config import ModelConfig
from patchmill.trainer.mae import MaskedAutoencoder

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
SUMS = "SHA256SUMS"


class Damage(NamedTuple):
    """A checkpoint that cannot be used, and why."""

    path: Path
    reason: str


def save(
    run: Path, step: int, model: MaskedAutoencoder, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> Path:
    """Writes checkpoints/step-XXXXXXXX of a run, atomically. `state` is JSON; `step` counts updates done.

    Raises:
        OSError: the disk is full or the folder cannot be written; nothing half-written is left.
    """
    final = run / "checkpoints" / f"step-{step:08d}"
    beside = final.with_name(f".{final.name}.tmp")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        header = {"format": "patchmill", "model": json.dumps(dataclasses.asdict(model.config))}
        save_file(_contiguous(model.state_dict()), beside / FILES[0], metadata=header)
        save_file(_contiguous(_optimizer_tensors(model, optimizer)), beside / FILES[1])
        (beside / FILES[2]).write_text(json.dumps({"step": step, "torch": torch.__version__, **state}, indent=1) + "\n")
        sums = "".join(f"{_sha256(beside / name)}  {name}\n" for name in FILES)
        (beside / SUMS).write_text(sums)
        for path in (*(beside / name for name in (*FILES, SUMS)), beside):
            _sync(path)
        if final.exists():
            shutil.rmtree(final)
        beside.rename(final)
        _sync(final.parent)
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        if isinstance(error, SafetensorError):
            raise OSError(f"cannot write checkpoint {final}: {error}; free space or choose another --out") from error
        if isinstance(error, OSError):
            raise OSError(
                f"cannot write checkpoint {final}: {error.strerror or error}; free space or choose another --out"
            ) from error
        raise
    return final


def prune(run: Path, keep_last: int) -> None:
    """Deletes all but the newest `keep_last` checkpoints of a run."""
    for path in all_checkpoints(run)[:-keep_last]:
        shutil.rmtree(path)


def all_checkpoints(run: Path) -> list[Path]:
    """A run's checkpoint folders, oldest first."""
    return sorted((run / "checkpoints").glob("step-" + "[0-9]" * 8))


def newest_valid(run: Path) -> tuple[Path | None, list[Damage]]:
    """The newest checkpoint whose sums hold, and the newer ones that were passed over."""
    damaged: list[Damage] = []
    for path in reversed(all_checkpoints(run)):
        reason = find_damage(path)
        if reason is None:
            return path, damaged
        damaged.append(Damage(path, reason))
    return None, damaged


def find_damage(path: Path) -> str | None:
    """Why a checkpoint folder cannot be trusted, or None when every file has the sum it was written with."""
    try:
        lines = (path / SUMS).read_text(encoding="utf-8").splitlines()
        sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        for name in FILES:
            if name not in sums:
                return f"{SUMS} does not list {name}"
            if _sha256(path / name) != sums[name]:
                return f"{name} is not what was written (sha256 differs)"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except UnicodeDecodeError:
        return f"{SUMS} is not what was written"
    return None


def restore(path: Path, model: MaskedAutoencoder, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Loads weights and moments in place and returns the saved state. The folder must have passed `find_damage`.

    Raises:
        ValueError: the checkpoint is of another model.
    """
    saved = read_model_config(path / FILES[0])
    if saved != model.config:
        changed = [f.name for f in dataclasses.fields(saved) if getattr(saved, f.name) != getattr(model.config, f.name)]
        detail = ", ".join(f"{n} {getattr(saved, n)} there, {getattr(model.config, n)} here" for n in changed)
        raise ValueError(f"checkpoint {path} is of another model ({detail}); use its options, or another --out")
    load_weights(path / FILES[0], model)
    tensors = load_file(path / FILES[1], device=str(next(model.parameters()).device))
    for name, parameter in _trained(model, optimizer):
        optimizer.state[parameter] = {key: tensors[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
    return json.loads((path / FILES[2]).read_text(encoding="utf-8"))


def load_model(path: str | Path) -> tuple[MaskedAutoencoder, Path]:
    """A model in eval mode from a run folder (its newest valid checkpoint), a checkpoint folder or a .safetensors file.

    Raises:
        ValueError: no checkpoint there, or a damaged or foreign one; the message says which and what to do.
    """
    path = find_model_file(path)
    model = MaskedAutoencoder(read_model_config(path))
    load_weights(path, model)
    return model.eval(), path


def find_model_file(path: str | Path) -> Path:
    """The model.safetensors of a run folder (its newest valid checkpoint) or of a checkpoint folder; a file is itself.

    Raises:
        ValueError: no checkpoint there, or a damaged one.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(
            f"no checkpoint {path}: no such file or folder; give a run folder or checkpoints/step-XXXXXXXX"
        )
    if (path / "checkpoints").is_dir():
        newest, damaged = newest_valid(path)
        if newest is None:
            why = f"; {damaged[0].path.name}: {damaged[0].reason}" if damaged else ""
            raise ValueError(f"run {path} has no valid checkpoint{why}; let it train on until it saves one")
        path = newest
    if path.is_dir():
        reason = find_damage(path)
        if reason is not None:
            raise ValueError(f"checkpoint {path} cannot be used: {reason}; take another one of the run")
        path = path / FILES[0]
    return path


def read_model_config(path: Path) -> ModelConfig:
    """The model's config from the header of a model.safetensors. Raises ValueError for a foreign file."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no safetensors file: {error}; give a checkpoint that pretrain wrote") from error
    if header.get("format") != "patchmill" or "model" not in header:
        raise ValueError(
            f"{path} was not written by patchmill (no model config in its header); `patchmill import` converts others"
        )
    return parse_model_config(header["model"], path)


def parse_model_config(text: str, where: Path) -> ModelConfig:
    """The config that a header holds as JSON. Raises ValueError naming `where` and what cannot be."""
    try:
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in json.loads(text).items()}
        for field in dataclasses.fields(ModelConfig):
            value, kind = fields.get(field.name, field.default), type(field.default)
            allowed = {int: (int, tuple) if field.name == "image_size" else int, float: (int, float)}.get(kind, kind)
            if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
                raise ValueError(f"{field.name} is {value!r}")
        return ModelConfig(**fields)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"the model config in the header of {where} cannot be used: {error}") from error


def load_weights(path: Path, model: nn.Module) -> None:
    """Loads a model.safetensors in place. Raises ValueError that lists what is missing, extra or of another shape."""
    tensors, wanted = load_file(path), model.state_dict()
    wrong = [f"missing {name}" for name in wanted if name not in tensors]
    wrong += [f"extra {name}" for name in tensors if name not in wanted]
    wrong += [
        f"{name} is {tuple(tensors[name].shape)}, the model has {tuple(wanted[name].shape)}"
        for name in wanted
        if name in tensors and tensors[name].shape != wanted[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{path} does not fit the model: {'; '.join(wrong[:5])}{more}")
    model.load_state_dict(tensors)


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[str, nn.Parameter]]:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [(name, p) for name, p in model.named_parameters() if id(p) in held]


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{key}.{name}": value
        for name, parameter in _trained(model, optimizer)
        for key, value in optimizer.state[parameter].items()
    }


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
