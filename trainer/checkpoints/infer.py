"""Infers a model's config from its tensors, and finds what is wrong with the tensors.

The tensors decide; a config that comes with them must agree. The number of heads leaves no trace in the weights; it
comes from the config, from `Hints`, or from the published sizes (He et al. 2021; timm's tiny and small).
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchmill.trainer.checkpoints.names import encoder_only, is_decoder, listed
from patchmill.trainer.config.model import ModelConfig
from patchmill.trainer.model.build import build_model
from patchmill.trainer.model.resize_weights import Tensors

HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
DECODER_HEADS = {512: 16}


@dataclass(frozen=True)
class Hints:
    """Options that a checkpoint may not state; unset ones come from the file."""

    num_heads: int | None = None
    """encoder attention heads"""
    decoder_num_heads: int | None = None
    """decoder attention heads"""
    image_size: int | tuple[int, int] | None = None
    """pixels that the checkpoint was trained for (not a new size): one number, or height and width"""
    norm_pix_loss: bool | None = None
    """whether the decoder predicts normalised pixels"""
    mean: tuple[float, ...] | None = None
    """per channel, in 0..1 units"""
    std: tuple[float, ...] | None = None
    """per channel, in 0..1 units"""


def infer_config(tensors: Tensors, said: dict[str, Any], hints: Hints, where: Path) -> ModelConfig:
    """Infers the config of a model from its tensors (published names).

    Args:
        tensors: not yet checked; anything may be missing or misshapen.
        said: ModelConfig fields from the file or a config next to it.
        where: file to name in messages.
    Raises:
        ValueError: a field contradicts the tensors or cannot be known; the message names the option that settles it.
    """
    shape = _read_shape(tensors, where)
    num_patches = shape.pop("num_patches")
    differ = [name for name in shape if name in said and name != "mlp_ratio" and said[name] != shape[name]]
    if differ:
        detail = ", ".join(f"{name} {said[name]!r} in the config, {shape[name]} in the tensors" for name in differ)
        raise ValueError(f"{where}: config and tensors disagree ({detail}); they belong to different models")
    given = {name: value for name, value in dataclasses.asdict(hints).items() if value is not None}
    fields = {"num_heads": HEADS.get(shape["embed_dim"]), **said, **shape, **given}
    if "decoder_embed_dim" in shape and "decoder_num_heads" not in fields:
        fields["decoder_num_heads"] = DECODER_HEADS.get(shape["decoder_embed_dim"])
    for name in ("num_heads", "decoder_num_heads"):
        if name in fields and fields[name] is None:
            raise ValueError(f"{where} does not state how many heads its attention has: give {_option(name)} N")
    if "image_size" not in fields:
        fields["image_size"] = _square(num_patches, shape["patch_size"], where)
    if shape["channels"] != 3 and not {"mean", "std"} <= fields.keys():
        raise ValueError(
            f"{where} has {shape['channels']} channels: give {_option('mean')} and {_option('std')}, "
            "with one value per channel"
        )
    try:
        config = ModelConfig(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    if config.num_patches != num_patches:
        raise ValueError(
            f"{where} has positions for {num_patches} patches; images of {config.image_hw[0]} x {config.image_hw[1]} "
            f"pixels have {config.num_patches} of {config.patch_size} pixels: give {_option('image_size')}, "
            "the size it was trained for"
        )
    return config


def find_faults(tensors: Tensors, config: ModelConfig) -> list[str]:
    """Lists in words what keeps tensors (published names) from being a whole model or a whole encoder."""
    expected = expected_tensors(config, with_decoder=any(map(is_decoder, tensors)))
    missing = [name for name in expected if name not in tensors]
    extra = [name for name in tensors if name not in expected]
    shared = [name for name in expected if name in tensors]
    misshapen = [
        f"{name} is {tuple(tensors[name].shape)}, not {tuple(expected[name].shape)}"
        for name in shared
        if tensors[name].shape != expected[name].shape
    ]
    mistyped = [f"{name} is {tensors[name].dtype}" for name in shared if not is_plain_float(tensors[name])]
    found = {"missing": missing, "extra": extra, "of another shape": misshapen, "not floating point": mistyped}
    return [f"{len(names)} {what}: {listed(names)}" for what, names in found.items() if names]


def is_plain_float(tensor: Tensor) -> bool:
    """Whether a tensor is dense and floating point, as a model's parameters must be."""
    return tensor.layout is torch.strided and tensor.is_floating_point()


def expected_tensors(config: ModelConfig, *, with_decoder: bool) -> Tensors:
    """Returns a model's tensors on the meta device: names and shapes without memory."""
    with torch.device("meta"):
        state = build_model(config).state_dict()
    return state if with_decoder else encoder_only(state)


def _read_shape(tensors: Tensors, where: Path) -> dict[str, Any]:
    """Reads the ModelConfig fields that the tensors determine, and num_patches."""
    kernel = _tensor(tensors, "patch_embed.proj.weight", 4, where)
    positions = _tensor(tensors, "pos_embed", 3, where)
    dim, channels, height, width = kernel.shape
    if height != width:
        raise ValueError(f"{where} has patches of {height} x {width} pixels; only square patches can be read")
    hidden = _tensor(tensors, "blocks.0.mlp.fc1.weight", 2, where).shape[0]
    shape: dict[str, Any] = {
        "embed_dim": dim,
        "channels": channels,
        "patch_size": height,
        "depth": _count_blocks(tensors, "blocks."),
        "mlp_ratio": hidden / max(dim, 1),
        "num_patches": positions.shape[1] - 1,
    }
    if any(map(is_decoder, tensors)):
        shape["decoder_embed_dim"] = _tensor(tensors, "decoder_embed.weight", 2, where).shape[0]
        shape["decoder_depth"] = _count_blocks(tensors, "decoder_blocks.")
    return shape


def _tensor(tensors: Tensors, name: str, dims: int, where: Path) -> Tensor:
    if name not in tensors:
        raise ValueError(f"{where} is missing {name}, which every ViT-MAE has; {_REMEDY}")
    if tensors[name].dim() != dims or 0 in tensors[name].shape:
        raise ValueError(
            f"{where}: {name} has the shape {tuple(tensors[name].shape)}, expected {dims} dimensions; {_REMEDY}"
        )
    return tensors[name]


_REMEDY = "give a checkpoint of facebookresearch/mae, timm, Hugging Face ViTMAE, detectron2 or mmseg"


def _count_blocks(tensors: Tensors, prefix: str) -> int:
    """Counts the blocks. A gap in their numbers shows up later as missing and extra names."""
    return len({name.split(".")[1] for name in tensors if name.startswith(prefix)})


def _square(num_patches: int, patch_size: int, where: Path) -> int:
    side = math.isqrt(max(num_patches, 0))
    if side * side != num_patches:
        raise ValueError(
            f"{where} has positions for {num_patches} patches, which is not a square: give {_option('image_size')} "
            "HEIGHT WIDTH, the size it was trained for"
        )
    return side * patch_size


def _option(name: str) -> str:
    """The command-line option of a hint in `patchmill import` and `export`."""
    return f"--source.{name.replace('_', '-')}"
