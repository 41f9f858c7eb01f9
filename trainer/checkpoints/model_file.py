"""Reads a model.safetensors: the model's config from its header, and its weights into a model.

Files may come from anywhere: a header's claims are checked before memory is allocated for them.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from patchmill.trainer.config.model import ModelConfig


def read_model_config(path: Path) -> ModelConfig:
    """Reads the model's config from the header of a model.safetensors. Raises ValueError for a foreign file."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a readable safetensors file: {error}; give a checkpoint that pretrain wrote"
        ) from error
    if header.get("format") != "patchmill" or "model" not in header:
        raise ValueError(
            f"{path} was not written by patchmill (no model config in its header); `patchmill import` converts others"
        )
    return parse_model_config(header["model"], path)


def parse_model_config(text: str, where: Path) -> ModelConfig:
    """Parses the config that a header holds as JSON. Raises ValueError that names `where` and the bad value."""
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


def check_size(config: ModelConfig, path: Path) -> None:
    """Raises ValueError if a header claims a larger model than its file holds. Call it before building the model."""
    c = config
    decoder_depth = 0 if c.kind == "simmim" else c.decoder_depth
    stacks = ((c.embed_dim, c.depth), (c.decoder_embed_dim, decoder_depth))
    values = sum(d * (c.patch_dim + c.num_patches + depth * d * (4 + 2 * c.mlp_ratio)) for d, depth in stacks)
    if not 0 < values <= path.stat().st_size:  # a value takes more than one byte
        raise ValueError(f"the header of {path} claims a larger model than the file holds; take another checkpoint")


def load_weights(path: Path, model: nn.Module) -> None:
    """Loads a model.safetensors in place. Raises ValueError that lists missing, extra and misshapen tensors."""
    tensors, expected = load_file(path), model.state_dict()
    wrong = [f"missing {name}" for name in expected if name not in tensors]
    wrong += [f"extra {name}" for name in tensors if name not in expected]
    wrong += [
        f"{name} is {tuple(tensors[name].shape)}, the model has {tuple(expected[name].shape)}"
        for name in expected
        if name in tensors and tensors[name].shape != expected[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{path} does not fit the model: {'; '.join(wrong[:5])}{more}")
    with torch.no_grad():
        for name, target in expected.items():  # these tensors share memory with the model's parameters
            target.copy_(shard_like(tensors[name], target))


def shard_like(full: Tensor, target: Any) -> Tensor:
    """Moves a whole tensor to the device of the tensor `target` and shards it in the same way."""
    if not hasattr(target, "full_tensor"):
        return full.to(target.device)
    from torch.distributed.tensor import distribute_tensor  # slow to import

    # every rank has read the file: each keeps its own part and sends nothing
    return distribute_tensor(full.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
