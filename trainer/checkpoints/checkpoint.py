"""run <-> [checkpoint folder] -> exact resume: tensors as safetensors, the rest as JSON, no pickle anywhere.

    checkpoints/step-00001200/
      model.safetensors      published parameter names; the model's config in the header
      optimizer.safetensors  exp_avg.<name>, exp_avg_sq.<name>, step.<name>, guard.<name>
      state.json             step, the loader's state (epoch, step, what the data were), torch's version
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

from patchmill.trainer.config.model import ModelConfig
from patchmill.trainer.engine.step import Guard, whole
from patchmill.trainer.model.build import build_model
from patchmill.trainer.model.vit import VisionTransformer

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
SUMS = "SHA256SUMS"
OPTIMIZER_KEYS = ("step", "exp_avg", "exp_avg_sq")


class Damage(NamedTuple):
    """A checkpoint that cannot be used, and why."""

    path: Path
    reason: str


class Snapshot(NamedTuple):
    """All that a checkpoint holds, whole tensors even where parameters are sharded."""

    header: dict[str, str]
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def take_snapshot(
    model: VisionTransformer,
    optimizer: torch.optim.Optimizer,
    guard: Guard,
    state: dict[str, Any],
    *,
    copy: bool = False,
    keep: bool = True,
) -> Snapshot:
    """Collects what a checkpoint holds. Every rank must call it: shards are gathered here.

    Args:
        state: plain values, fit for JSON.
        copy: own copies in main memory, so that training may go on while they are written.
        keep: False on the ranks that do not write.
    """

    def all_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        kept = {}
        for name, tensor in tensors.items():
            full = whole(tensor.detach())
            if keep:
                kept[name] = full.to("cpu", copy=True) if copy else full.contiguous()
        return kept

    header = {"format": "patchmill", "model": json.dumps(dataclasses.asdict(model.config))}
    moments = _optimizer_tensors(model, optimizer) | {f"guard.{name}": value for name, value in guard.state.items()}
    # apex counts steps in its groups, torch beside each parameter's moments
    steps = [group.get("step") for group in optimizer.param_groups]
    state = {"torch": torch.__version__, "group_steps": steps, **state}
    return Snapshot(header, all_of(model.state_dict()), all_of(moments), state)


def write(run: Path, step: int, snapshot: Snapshot) -> Path:
    """Writes checkpoints/step-XXXXXXXX of a run, atomically; `step` counts updates done.

    Raises:
        OSError: the disk is full or the folder cannot be written; nothing half-written is left.
    """
    final = folder(run, step)
    beside = final.with_name(f".{final.name}.tmp")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        save_file(snapshot.model, beside / FILES[0], metadata=snapshot.header)
        save_file(snapshot.optimizer, beside / FILES[1])
        (beside / FILES[2]).write_text(json.dumps({"step": step, **snapshot.state}, indent=1) + "\n")
        (beside / SUMS).write_text(_sums(beside))
        for path in (*(beside / name for name in (*FILES, SUMS)), beside):
            _sync(path)
        if final.exists():
            shutil.rmtree(final)
        beside.rename(final)
        _sync(final.parent)
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        if isinstance(error, SafetensorError | OSError):
            why = getattr(error, "strerror", None) or error
            raise OSError(f"cannot write checkpoint {final}: {why}; free space or choose another --out") from error
        raise
    return final


def prune(run: Path, keep_last: int, keep_every_steps: int | None = None) -> None:
    """Deletes all but the newest `keep_last` checkpoints, those of every `keep_every_steps`-th step, and what a kill
    left of one that was being written."""
    for path in (run / "checkpoints").glob(".step-*.tmp"):
        shutil.rmtree(path)
    for path in all_checkpoints(run)[:-keep_last]:
        if keep_every_steps is None or step_of(path) % keep_every_steps:
            shutil.rmtree(path)


def folder(run: Path, step: int) -> Path:
    """Where the checkpoint after `step` updates lies."""
    return run / "checkpoints" / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(path.name.removeprefix("step-"))


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
    """Loads weights, moments and guard in place and returns the saved state. `find_damage` must have passed it.

    Raises:
        ValueError: the checkpoint is of another model, or was not written by this program.
    """
    saved = read_model_config(path / FILES[0])
    if saved != model.config:
        changed = [f.name for f in dataclasses.fields(saved) if getattr(saved, f.name) != getattr(model.config, f.name)]
        detail = ", ".join(f"{n} {getattr(saved, n)} there, {getattr(model.config, n)} here" for n in changed)
        raise ValueError(f"checkpoint {path} is of another model ({detail}); use its options, or another --out")
    state = _read_state(path / FILES[2])
    load_weights(path / FILES[0], model)
    try:
        tensors = load_file(path / FILES[1])
    except SafetensorError as error:
        raise ValueError(f"{path / FILES[1]} is no safetensors file: {error}; take another checkpoint") from error
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
    """state.json, of the shape that `write` gives it. Raises ValueError for anything else."""
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
            raise ValueError("a value of another type than was written")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no state of a run ({error}); take another checkpoint") from error
    return state


def _fitting(tensors: dict[str, Tensor], name: str, shape: tuple[int, ...], path: Path) -> Tensor:
    """The fp32 tensor of that name and shape. Raises ValueError when there is none."""
    value = tensors.get(name)
    if value is None or value.shape != shape or value.dtype != torch.float32:
        what = "missing" if value is None else f"{value.dtype} {tuple(value.shape)}"
        raise ValueError(f"{path / FILES[1]}: {name} is {what}, not fp32 {tuple(shape)}; take another checkpoint")
    return value


def shard_like(full: Tensor, target: Any) -> Tensor:
    """A whole tensor on the device of `target` (a tensor), sharded as it is."""
    if not hasattr(target, "full_tensor"):
        return full.to(target.device)
    from torch.distributed.tensor import distribute_tensor  # takes a second to import

    # every rank has read the file: each takes its own part of it, and nothing is sent
    return distribute_tensor(full.to(target.device), target.device_mesh, target.placements, src_data_rank=None)


def load_model(path: str | Path) -> tuple[VisionTransformer, Path]:
    """A model in eval mode from a run folder (its newest valid checkpoint), a checkpoint folder or a .safetensors file.

    Raises:
        ValueError: no checkpoint there, or a damaged or foreign one; the message says which and what to do.
    """
    path = find_model_file(path)
    config = read_model_config(path)
    _check_size(config, path)
    model = build_model(config)
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


def _check_size(config: ModelConfig, path: Path) -> None:
    """Refuses a header that claims a larger model than the file holds, before memory is taken for it."""
    c = config
    decoder_depth = 0 if c.kind == "simmim" else c.decoder_depth
    stacks = ((c.embed_dim, c.depth), (c.decoder_embed_dim, decoder_depth))
    values = sum(d * (c.patch_dim + c.num_patches + depth * d * (4 + 2 * c.mlp_ratio)) for d, depth in stacks)
    if not 0 < values <= path.stat().st_size:  # a value takes more than a byte
        raise ValueError(f"the header of {path} claims a larger model than the file holds; take another checkpoint")


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
    with torch.no_grad():
        for name, target in wanted.items():  # a state dict's tensors are the model's own
            target.copy_(shard_like(tensors[name], target))


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


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
