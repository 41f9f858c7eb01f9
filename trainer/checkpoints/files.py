"""Reads weights files of any origin: tensors, and the model options that the file or its config states.

It trusts nothing. safetensors cannot hold code. A .pth or .bin file is a pickle; torch's weights-only reader builds
tensors and plain values and refuses everything else before anything runs. The one class it lets through is
argparse.Namespace, which the published training checkpoints hold.
"""

import argparse
import dataclasses
import json
import pickle
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from patchmill.trainer.checkpoints.checkpoint import find_model_file
from patchmill.trainer.checkpoints.model_file import parse_model_config
from patchmill.trainer.checkpoints.names import listed
from patchmill.trainer.config.model import ModelConfig
from patchmill.trainer.model.resize_weights import Tensors
from patchmill.trainer.model.vit import LAYER_NORM_EPS

WEIGHT_FILES = ("model.safetensors", "model.pth", "pytorch_model.bin")
"""names to look for in a folder, in order of preference"""
CONTAINERS = ("model", "state_dict")
"""keys under which .pth files keep their tensors; without them the whole file counts"""
NOTE = "patchmill"
"""where patchmill's exports carry the model's config: a key of .pth files, a field of safetensors metadata"""

# what torch's reader raises on damaged files, besides UnpicklingError (on a truncated zip: OSError)
_BROKEN_PICKLE = (
    RuntimeError,
    EOFError,
    OSError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    AssertionError,
    MemoryError,
)
_HF_FIELDS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "hidden_size": "embed_dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "decoder_hidden_size": "decoder_embed_dim",
    "decoder_num_hidden_layers": "decoder_depth",
    "decoder_num_attention_heads": "decoder_num_heads",
    "num_channels": "channels",
    "norm_pix_loss": "norm_pix_loss",
}
_TIMM_FIELDS = {"img_size": "image_size", "num_heads": "num_heads"}


class Weights(NamedTuple):
    """The contents of a checkpoint of any format."""

    file: Path
    tensors: Tensors
    """under the names in the file"""
    said: dict[str, Any]
    """fields of ModelConfig that the file, or a config file next to it, states"""
    notes: list[str]
    """remarks for the user"""


def read_weights(path: str | Path) -> Weights:
    """Reads a weights file, a folder of exported files, a checkpoint folder or a run folder.

    Raises:
        ValueError: the file is missing, damaged, or holds more than tensors; none of it was run.
    """
    file = _weights_file(Path(path))
    with open(file, "rb") as opened:
        start = opened.read(2)
    if start == b"PK" or start[:1] == b"\x80":  # torch.save's zip, or the bare pickle of torch before 1.6
        tensors, said, exact = _read_pickle(file)
    else:
        tensors, said, exact = _read_safetensors(file)
    if exact:
        return Weights(file, tensors, said, [])
    beside, notes = _read_configs_beside(file)
    return Weights(file, tensors, {**said, **beside}, notes)


def config_json(config: ModelConfig) -> str:
    """Returns the config as the JSON that headers and .pth files carry; `parse_model_config` reads it."""
    return json.dumps(dataclasses.asdict(config))


def write_pth(tensors: Tensors, container: str, config: ModelConfig, path: Path) -> None:
    """Saves `{container: tensors}` with torch.save, as the published code does, and adds the config as a string."""
    torch.save({container: _owning(tensors), NOTE: config_json(config)}, path)


def write_safetensors(tensors: Tensors, header: dict[str, str], path: Path) -> None:
    """Writes tensors and a header. Raises OSError if the file cannot be written."""
    try:
        save_file(_owning(tensors), path, metadata=header)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}; free space or choose another --out") from error


def _owning(tensors: Tensors) -> Tensors:
    """Copies tensors that are views: torch.save would write their whole storage, safetensors refuses them."""
    owning: Tensors = {}
    seen = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        owning[name] = tensor
    return owning


def _weights_file(path: Path) -> Path:
    if path.is_dir() and not (path / "optimizer.safetensors").exists() and not (path / "checkpoints").exists():
        found = [path / name for name in WEIGHT_FILES if (path / name).is_file()]
        if not found:
            raise ValueError(f"{path} holds none of {', '.join(WEIGHT_FILES)}; give the weights file itself")
        return found[0]
    return find_model_file(path)


def _read_safetensors(file: Path) -> tuple[Tensors, dict[str, Any], bool]:
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(
            f"{file} is neither a whole safetensors file ({error}) nor one of torch.save; "
            "if it was downloaded or copied, fetch it again"
        ) from error
    note = header.get("model") if header.get("format") == "patchmill" else header.get(NOTE)
    return tensors, _fields(parse_model_config(note, file)) if note else {}, bool(note)


def _read_pickle(file: Path) -> tuple[Tensors, dict[str, Any], bool]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"(?:GLOBAL|class|function) ([\w.]+)", str(error))
        if refused:
            raise ValueError(
                f"{file} holds more than tensors ({refused[1]}); nothing of it was run. Only tensors and plain values "
                'can be read: ask its author for safetensors, or for torch.save({"model": model.state_dict()}, path)'
            ) from error
        raise ValueError(_damaged(file, error)) from error
    except _BROKEN_PICKLE as error:
        raise ValueError(_damaged(file, error)) from error
    table = loaded if isinstance(loaded, dict) else {}
    inner = next((table[name] for name in CONTAINERS if isinstance(table.get(name), dict)), table)
    tensors = {name: value for name, value in inner.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        holds = f"the keys {listed([str(key) for key in table])}" if table else f"a {type(loaded).__name__}"
        raise ValueError(f"{file} holds no named tensors but {holds}; give a file with a model's state dict")
    note = table.get(NOTE)
    if isinstance(note, str):
        return tensors, _fields(parse_model_config(note, file)), True
    args = vars(table["args"]) if isinstance(table.get("args"), argparse.Namespace) else {}
    return tensors, {"norm_pix_loss": args["norm_pix_loss"]} if type(args.get("norm_pix_loss")) is bool else {}, False


def _damaged(file: Path, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"{file} is truncated or damaged ({reason[:100]}); nothing of it was run. "
        "If it was downloaded or copied, fetch it again"
    )


def _fields(config: ModelConfig) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def _read_configs_beside(file: Path) -> tuple[dict[str, Any], list[str]]:
    """Reads ModelConfig fields from config.json (transformers or timm) and preprocessor_config.json by the file."""
    said: dict[str, Any] = {}
    notes = []
    table = _read_json(file.with_name("config.json"))
    if table.get("model_type") == "vit_mae":
        said |= {ours: _plain(table[theirs]) for theirs, ours in _HF_FIELDS.items() if theirs in table}
        eps = table.get("layer_norm_eps")
        if eps != LAYER_NORM_EPS:
            notes.append(f"config.json gives layer_norm_eps {eps}; {LAYER_NORM_EPS} is used, as published")
    elif "architecture" in table:
        model_args, pretrained = (_table(table.get(name)) for name in ("model_args", "pretrained_cfg"))
        said |= {ours: _plain(model_args[theirs]) for theirs, ours in _TIMM_FIELDS.items() if theirs in model_args}
        said |= {name: _plain(pretrained[name]) for name in ("mean", "std") if name in pretrained}
    processor = _read_json(file.with_name("preprocessor_config.json"))
    said |= {name: _plain(processor[f"image_{name}"]) for name in ("mean", "std") if f"image_{name}" in processor}
    return said, notes


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return _table(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}); fetch it again, or remove it and give its values as options"
        ) from error


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
