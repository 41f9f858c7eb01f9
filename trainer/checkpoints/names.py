"""Converts parameter names between the published ones and those of other projects.

The published names of facebookresearch/mae are canonical. timm and detectron2's ViTDet use the same names for the
encoder; only Hugging Face (separate query, key and value) and mmseg need a table. Conversions do no arithmetic: there
and back again gives the same bits.

    published (mae)          Hugging Face ViTMAE (as on the hub)                  mmseg MAE backbone
    patch_embed.proj         vit.embeddings.patch_embeddings.projection           patch_embed.projection
    blocks.0.attn.qkv        vit.encoder.layer.0.attention.attention.{query,...}  layers.0.attn.qkv
    blocks.0.mlp.fc1         vit.encoder.layer.0.intermediate.dense               layers.0.ffn.layers.0.0
    norm                     vit.layernorm                                        norm1
    decoder_blocks.0.norm1   decoder.decoder_layers.0.layernorm_before            -
"""

import re
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from patchmill.trainer.model.resize_weights import Tensors

NamedFormat = Literal["mae", "timm", "hf", "detectron2", "mmseg"]

ENCODER_ONLY = ("timm", "detectron2", "mmseg")

_HF_ENCODER = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
}

_HF_BLOCK = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}

_HF_QKV = ("attention.attention.query", "attention.attention.key", "attention.attention.value")


# transformers 5 uses other names in memory (and save_pretrained of 5.23 a third spelling of the decoder's layers)
_HF5_BLOCK = {"attn.proj": "attention.o_proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}

_HF5_QKV = ("attention.q_proj", "attention.k_proj", "attention.v_proj")

_MMSEG_BLOCK = {"norm1": "ln1", "norm2": "ln2", "mlp.fc1": "ffn.layers.0.0", "mlp.fc2": "ffn.layers.1"}

_MMSEG_ENCODER = {"patch_embed.proj": "patch_embed.projection", "norm": "norm1"}

_BLOCK = re.compile(r"(decoder_)?blocks\.(\d+)\.(.+)\.(weight|bias)")

_HF_LAYER = re.compile(
    r"(?:(decoder)\.decoder_(?:layers|encoder\.layer)|(?:vit\.)?(?:encoder\.layer|layers))\.(\d+)\.(.+)\.(weight|bias)"
)

_MMSEG_LAYER = re.compile(r"(?:backbone\.)?layers\.(\d+)\.(.+)\.(weight|bias)")


def is_decoder(name: str) -> bool:
    """Whether a name belongs to the decoder or a fitted target, which an encoder does not need."""
    return name.startswith(("decoder_", "target.")) or name == "mask_token"


def encoder_only(tensors: Tensors) -> Tensors:
    """Returns only the encoder's tensors."""
    return {name: tensor for name, tensor in tensors.items() if not is_decoder(name)}


def to_format(tensors: Tensors, target: NamedFormat, *, mean_pool: bool = False) -> Tensors:
    """Converts published names to those of a format; for timm, detectron2 and mmseg only the encoder's.

    Args:
        tensors: published names.
        mean_pool: for timm's models with global_pool="avg", which call the last norm `fc_norm`.
    """
    if target in ENCODER_ONLY:
        tensors = encoder_only(tensors)
    if target == "hf":
        return _to_hf(tensors)
    if target == "detectron2":
        return {f"backbone.net.{name}": tensor for name, tensor in tensors.items()}
    if target == "mmseg":
        return {_to_mmseg(name): tensor for name, tensor in tensors.items()}
    if target == "timm" and mean_pool:
        return {re.sub(r"^norm\.", "fc_norm.", name): tensor for name, tensor in tensors.items()}
    return dict(tensors)


def recognise(tensors: Tensors) -> NamedFormat:
    """Recognises the format of names. Raises ValueError that shows some of them."""
    names = {_unwrapped(name) for name in tensors}
    if "backbone.net.patch_embed.proj.weight" in names:
        return "detectron2"
    if names & {"vit.embeddings.patch_embeddings.projection.weight", "embeddings.patch_embeddings.projection.weight"}:
        return "hf"
    if names & {"patch_embed.projection.weight", "backbone.patch_embed.projection.weight"}:
        return "mmseg"
    if "patch_embed.proj.weight" in names:
        # timm's files and the published encoders share their names, except with timm's mean pooling
        return "timm" if "fc_norm.weight" in names and "norm.weight" not in names else "mae"
    raise ValueError(
        f"no patch embedding under a name of facebookresearch/mae, timm, Hugging Face ViTMAE, detectron2 or mmseg; "
        f"its names are {listed(sorted(names)) or 'none at all'}"
    )


def from_format(tensors: Tensors, source: NamedFormat) -> tuple[Tensors, list[str]]:
    """Converts a format's names to published ones; also returns the names that the model does not have."""
    unwrapped = {_unwrapped(name): tensor for name, tensor in tensors.items()}
    if source == "hf":
        return _from_hf(unwrapped)
    rename: Callable[[str], str] = {"mmseg": _from_mmseg, "detectron2": _from_detectron2}.get(source, _from_mae)
    renamed = {rename(name): (name, tensor) for name, tensor in unwrapped.items()}
    if "norm.weight" not in renamed:  # mean-pooled classifiers call the last norm fc_norm
        renamed = {re.sub(r"^fc_norm\.", "norm.", name): entry for name, entry in renamed.items()}
    known = {name: tensor for name, (_, tensor) in renamed.items() if _is_published(name)}
    return known, [old for name, (old, _) in renamed.items() if name not in known]


def listed(names: list[str], at_most: int = 6) -> str:
    """Lists names for a message: the first few, then how many more."""
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more


def _unwrapped(name: str) -> str:
    """Strips the prefixes of DistributedDataParallel and torch.compile."""
    return re.sub(r"^(?:module\.|_orig_mod\.)+", "", name)


def _is_published(name: str) -> bool:
    stem, _, leaf = name.rpartition(".")
    if name in ("cls_token", "pos_embed", "mask_token", "decoder_pos_embed"):
        return True
    if leaf not in ("weight", "bias"):
        return False
    block = _BLOCK.fullmatch(name)
    if block:
        return block[3] in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    return stem in ("patch_embed.proj", "norm", "decoder_embed", "decoder_norm", "decoder_pred")


def _to_hf(tensors: Tensors) -> Tensors:
    converted: Tensors = {}
    for name, tensor in tensors.items():
        block = _BLOCK.fullmatch(name)
        if block:
            decoder, number, part, leaf = block.groups()
            stem = f"decoder.decoder_layers.{number}" if decoder else f"vit.encoder.layer.{number}"
            if part == "attn.qkv":
                for third, rows in zip(_HF_QKV, tensor.chunk(3), strict=True):
                    converted[f"{stem}.{third}.{leaf}"] = rows
            else:
                converted[f"{stem}.{_HF_BLOCK[part]}.{leaf}"] = tensor
        elif is_decoder(name):
            converted[f"decoder.{name}"] = tensor
        else:
            converted[_replace_stem(name, _HF_ENCODER)] = tensor
    return converted


def _from_hf(tensors: Tensors) -> tuple[Tensors, list[str]]:
    parts = {hf: part for table in (_HF_BLOCK, _HF5_BLOCK) for part, hf in table.items()}
    thirds = {hf: third for table in (_HF_QKV, _HF5_QKV) for third, hf in enumerate(table)}
    stems = {hf: name for name, hf in _HF_ENCODER.items()}
    converted: Tensors = {}
    split: dict[str, dict[int, tuple[str, Tensor]]] = {}
    unknown = []
    for name, tensor in tensors.items():
        layer = _HF_LAYER.fullmatch(name)
        if layer:
            decoder, number, part, leaf = layer.groups()
            stem = f"decoder_blocks.{number}" if decoder else f"blocks.{number}"
            if part in thirds:
                split.setdefault(f"{stem}.attn.qkv.{leaf}", {})[thirds[part]] = (name, tensor)
                continue
            published = f"{stem}.{parts.get(part, part)}.{leaf}"
        elif name.startswith("decoder."):
            published = name.removeprefix("decoder.")
        else:
            published = _replace_stem(name if name.startswith("vit.") else f"vit.{name}", stems)
        if _is_published(published):
            converted[published] = tensor
        else:
            unknown.append(name)
    for name, found in split.items():
        if found.keys() == {0, 1, 2} and len({tensor.shape for _, tensor in found.values()}) == 1:
            converted[name] = torch.cat([found[third][1] for third in range(3)])
        else:
            unknown += [foreign for foreign, _ in found.values()]
    return converted, unknown


def _to_mmseg(name: str) -> str:
    block = _BLOCK.fullmatch(name)
    if block:
        _, number, part, leaf = block.groups()
        return f"layers.{number}.{_MMSEG_BLOCK.get(part, part)}.{leaf}"
    return _replace_stem(name, _MMSEG_ENCODER)


def _from_mmseg(name: str) -> str:
    layer = _MMSEG_LAYER.fullmatch(name)
    if layer:
        number, part, leaf = layer.groups()
        parts = {mmseg: published for published, mmseg in _MMSEG_BLOCK.items()}
        return f"blocks.{number}.{parts.get(part, part)}.{leaf}"
    return _replace_stem(name.removeprefix("backbone."), {new: old for old, new in _MMSEG_ENCODER.items()})


def _from_detectron2(name: str) -> str:
    return name.removeprefix("backbone.net.")


def _from_mae(name: str) -> str:
    return name


def _replace_stem(name: str, stems: dict[str, str]) -> str:
    if name in stems:
        return stems[name]
    stem, _, leaf = name.rpartition(".")
    return f"{stems[stem]}.{leaf}" if stem in stems else name
