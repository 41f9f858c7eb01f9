"""Writes and restores checkpoint folders for exact resume: tensors as safetensors, the rest as JSON, no pickle.

    checkpoints/step-00001200/
      model.safetensors      published parameter names; the model's config in the header
      optimizer.safetensors  exp_avg.<name>, exp_avg_sq.<name>, step.<name>, guard.<name>
      state.json             step, the loader's state (epoch, step, fingerprint of the data), torch's version
      SHA256SUMS             checksums of the three files, written last

A folder is written under a temporary name and renamed when complete: under its own name it is complete or absent.
Readers verify the checksums first.
"""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from patchmill.pipeline.atomic import whole_folder
from patchmill.trainer.checkpoints.model_file import check_size, load_weights, read_model_config, shard_like
from patchmill.trainer.checkpoints.staging import Staging
from patchmill.trainer.config.model import list_changes
from patchmill.trainer.engine.step import Guard, whole
from patchmill.trainer.model.build import build_model
from patchmill.trainer.model.vit import VisionTransformer

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
SUMS = "SHA256SUMS"
OPTIMIZER_KEYS = ("step", "exp_avg", "exp_avg_sq")


class Damage(NamedTuple):
    """A damaged checkpoint and the reason why it cannot be used."""

    path: Path
    reason: str


class Snapshot(NamedTuple):
    """The contents of a checkpoint, with whole tensors even if parameters are sharded."""

    header: dict[str, str]
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    copied: torch.cuda.Event | None = None
    """a GPU may still be copying the tensors until this event"""


def take_snapshot(
    model: VisionTransformer,
    optimizer: torch.optim.Optimizer,
    guard: Guard,
    state: dict[str, Any],
    *,
    staging: Staging | None = None,
    keep: bool = True,
) -> Snapshot:
    """Collects the contents of a checkpoint. Every rank must call it: it gathers shards.

    Args:
        state: plain values that JSON can hold.
        staging: copy tensors into its buffers, which lets training continue while they are written. They hold the
            snapshot before this one until now.
        keep: False on ranks that do not write.
    """

    def all_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        kept = {}
        for name, tensor in tensors.items():
            full = whole(tensor.detach())
            if keep:
                kept[name] = full.contiguous() if staging is None else staging.copy(name, full)
        return kept

    header = {"format": "patchmill", "model": json.dumps(dataclasses.asdict(model.config))}
    moments = _optimizer_tensors(model, optimizer) | {f"guard.{name}": value for name, value in guard.state.items()}
    # apex counts steps per parameter group, torch per parameter, together with the moments
    steps = [group.get("step") for group in optimizer.param_groups]
    state = {"torch": torch.__version__, "group_steps": steps, **state}
    weights, moments = all_of(model.state_dict()), all_of(moments)
    copied = None
    if staging is not None and guard.state["loss_scale"].is_cuda:
        copied = torch.cuda.Event()
        copied.record()
    return Snapshot(header, weights, moments, state, copied)


def write(run: Path, step: int, snapshot: Snapshot) -> Path:
    """Writes checkpoints/step-XXXXXXXX of a run atomically; `step` counts updates done.

    Raises:
        OSError: the disk is full or the folder is not writable; nothing half-written remains.
    """
    final = folder(run, step)
    if snapshot.copied is not None:
        snapshot.copied.synchronize()
    try:
        with whole_folder(final, replace=True) as unfinished:
            save_file(snapshot.model, unfinished / FILES[0], metadata=snapshot.header)
            save_file(snapshot.optimizer, unfinished / FILES[1])
            (unfinished / FILES[2]).write_text(json.dumps({"step": step, **snapshot.state}, indent=1) + "\n")
            (unfinished / SUMS).write_text(_sums(unfinished))
    except (SafetensorError, OSError) as error:
        why = getattr(error, "strerror", None) or error
        raise OSError(f"cannot write checkpoint {final}: {why}; free space or choose another --out") from error
    return final


def prune(run: Path, keep_last: int, keep_every_steps: int | None = None) -> None:
    """Keeps the newest `keep_last` checkpoints and every `keep_every_steps`-th; deletes the others and partial ones."""
    for path in (run / "checkpoints").glob(".step-*.tmp"):
        shutil.rmtree(path)
    for path in all_checkpoints(run)[:-keep_last]:
        if keep_every_steps is None or step_of(path) % keep_every_steps:
            shutil.rmtree(path)


def folder(run: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` updates."""
    return run / "checkpoints" / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint folder."""
    return int(path.name.removeprefix("step-"))


def all_checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step-" + "[0-9]" * 8))


def newest_valid(run: Path) -> tuple[Path | None, list[Damage]]:
    """Finds the newest undamaged checkpoint; also returns the damaged newer ones."""
    damaged: list[Damage] = []
    for path in reversed(all_checkpoints(run)):
        reason = find_damage(path)
        if reason is None:
            return path, damaged
        damaged.append(Damage(path, reason))
    return None, damaged


def find_damage(path: Path) -> str | None:
    """Returns why a checkpoint folder is damaged, or None if every file matches its checksum."""
    for name in (*FILES, SUMS):
        if not (path / name).is_file():
            return f"{name} is missing"
    written, found = (path / SUMS).read_bytes(), _sums(path).encode()
    if written == found:
        return None
    lines = written.decode(errors="replace").splitlines()
    listed = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for line in found.decode().splitlines():
        digest, name = line.split("  ")
        if name not in listed:
            return f"{SUMS} does not list {name}"
        if listed[name] != digest:
            return f"{name} is not what was written (sha256 differs)"
    return f"{SUMS} is not what was written"


def restore(path: Path, model: VisionTransformer, optimizer: torch.optim.Optimizer, guard: Guard) -> dict[str, Any]:
    """Loads weights, moments and guard in place and returns the saved state. Check `find_damage` first.

    Raises:
        ValueError: the checkpoint holds another model or was not written by this program.
    """
    saved = read_model_config(path / FILES[0])
    if saved != model.config:
        detail = list_changes(saved, model.config)
        raise ValueError(f"checkpoint {path} holds another model ({detail}); use its options, or another --out")
    state = _read_state(path / FILES[2])
    load_weights(path / FILES[0], model)
    try:
        tensors = load_file(path / FILES[1])
    except SafetensorError as error:
        raise ValueError(
            f"{path / FILES[1]} is not a readable safetensors file: {error}; take another checkpoint"
        ) from error
    held = {name.partition(".")[0] for name in tensors}
    for name, parameter in _trained(model, optimizer):
        for key in (key for key in OPTIMIZER_KEYS if key in held):
            value = _fitting(tensors, f"{key}.{name}", () if key == "step" else parameter.shape, path)
            optimizer.state[parameter][key] = (
                value.to(parameter.device) if key == "step" else shard_like(value, parameter)
            )
    for name, value in guard.state.items():
        value.copy_(_fitting(tensors, f"guard.{name}", (), path))
    for group, steps in zip(optimizer.param_groups, state["group_steps"], strict=True):
        if steps is not None:
            group["step"] = steps
    return state


def _read_state(path: Path) -> dict[str, Any]:
    """Reads state.json. Raises ValueError if it does not look like what `write` wrote."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        steps, loader = state["group_steps"], state["loader"]
        good = isinstance(steps, list) and len(steps) == 2 and all(n is None or isinstance(n, int) for n in steps)
        numbers = [state["step"], loader["epoch"], loader["step"]]
        if (
            not good
            or not all(type(n) is int and n >= 0 for n in numbers)
            or not isinstance(loader["fingerprint"], dict)
        ):
            raise ValueError("a value has the wrong type")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} does not hold the state of a run ({error}); take another checkpoint") from error
    return state


def _fitting(tensors: dict[str, Tensor], name: str, shape: tuple[int, ...], path: Path) -> Tensor:
    """Returns the fp32 tensor of that name and shape. Raises ValueError if there is none."""
    value = tensors.get(name)
    if value is None or value.shape != shape or value.dtype != torch.float32:
        what = "missing" if value is None else f"{value.dtype} {tuple(value.shape)}"
        raise ValueError(f"{path / FILES[1]}: {name} is {what}, not fp32 {tuple(shape)}; take another checkpoint")
    return value


def load_model(path: str | Path) -> tuple[VisionTransformer, Path]:
    """Loads a model, in eval mode, from a run folder (newest valid checkpoint), checkpoint folder or .safetensors file.

    Returns:
        the model and the file it came from.
    Raises:
        ValueError: there is no checkpoint, or it is damaged or foreign.
    """
    path = find_model_file(path)
    config = read_model_config(path)
    check_size(config, path)
    model = build_model(config)
    load_weights(path, model)
    return model.eval(), path


def find_model_file(path: str | Path) -> Path:
    """Finds the model.safetensors of a run folder (newest valid checkpoint) or checkpoint folder; a file is returned.

    Raises:
        ValueError: there is no checkpoint, or it is damaged.
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
            raise ValueError(f"checkpoint {path} cannot be used: {reason}; take another checkpoint of the run")
        path = path / FILES[0]
    return path


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[str, nn.Parameter]]:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [(name, p) for name, p in model.named_parameters() if id(p) in held]


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{key}.{name}": value
        for name, parameter in _trained(model, optimizer)
        for key, value in optimizer.state[parameter].items()
    }


def _sums(folder: Path) -> str:
    return "".join(f"{_sha256(folder / name)}  {name}\n" for name in FILES)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
