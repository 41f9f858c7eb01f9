"""Reads checkpoints of any known format and loads encoders from them.

Formats: patchmill, facebookresearch/mae, timm, Hugging Face ViTMAE, detectron2's ViTDet and mmseg's MAE. The file is
read without trusting it (files.py), its format is recognised by its names (names.py), its shape inferred from the
tensors (infer.py), and everything is checked before a model is built.

    encoder = load_encoder("runs/b16")                       # or mae_pretrain_vit_base.pth, or a folder from the hub
    cls_token, patches = encoder(images)                     # uint8 [B, H, W, C]
"""

import re
from pathlib import Path
from typing import NamedTuple

import torch

from patchmill.trainer.checkpoints.files import config_json, read_weights, write_safetensors
from patchmill.trainer.checkpoints.infer import Hints, find_faults, infer_config
from patchmill.trainer.checkpoints.names import NamedFormat, encoder_only, from_format, is_decoder, listed, recognise
from patchmill.trainer.config.model import ModelConfig
from patchmill.trainer.model.build import build_model
from patchmill.trainer.model.encoder import Encoder
from patchmill.trainer.model.resize_weights import Tensors, resize_model

# parts of classifiers, segmenters and detectors that do not change what the encoder computes
_OTHER_PARTS = re.compile(
    r"(?:head|head_dist|fc|fc_norm|classifier|decode_head|auxiliary_head|neck|proposal_generator|roi_heads|"
    r"pixel_mean|pixel_std|backbone\.(?!net\.)\w+)(?:\..*)?"
)

# options of a plain MAE; the decoders of patchmill's other models mean nothing to other programs
_MAE = {"kind": "mae", "encoder_mask_tokens": False, "target": "pixels", "target_width": 0}


class Checkpoint(NamedTuple):
    """A model of any origin as a ModelConfig and tensors under published names."""

    config: ModelConfig
    tensors: Tensors
    """published names, fp32; checked to be a whole model or a whole encoder"""
    names: NamedFormat
    """format of its names in the file; patchmill uses those of mae"""
    file: Path
    notes: list[str]
    """remarks about what was converted or left out"""

    @property
    def has_decoder(self) -> bool:
        """Whether it holds a decoder too: only then can it reconstruct images."""
        return any(map(is_decoder, self.tensors))


def read_checkpoint(path: str | Path, hints: Hints = Hints()) -> Checkpoint:  # noqa: B008 (frozen)
    """Reads a checkpoint of any known format: a file, a folder of exported files, a checkpoint folder or a run folder.

    Args:
        path: the format is recognised by content, not by name.
        hints: options that the file does not state.
    Raises:
        ValueError: something is missing, extra, damaged or contradictory. Nothing in a file is ever run.
    """
    weights = read_weights(path)
    try:
        source = recognise(weights.tensors)
    except ValueError as error:
        raise ValueError(f"{weights.file} has an unknown format: {error}") from error
    tensors, unknown = from_format(weights.tensors, source)
    said, notes = weights.said, list(weights.notes)
    method = {name: said[name] for name, plain in _MAE.items() if said.get(name, plain) != plain}
    if method:  # no other program knows these decoders and targets
        tensors, unknown = encoder_only(tensors), [name for name in unknown if not is_decoder(name)]
        said = said | _MAE
        is_other = " and ".join(f"{name} {value}" for name, value in method.items())
        notes.append(f"not a plain MAE ({is_other}): only the encoder was read")
    left_out = [name for name in unknown if _OTHER_PARTS.fullmatch(name)]
    config = infer_config(tensors, said, hints, weights.file)
    faults = find_faults(tensors | {name: weights.tensors[name] for name in unknown if name not in left_out}, config)
    if faults:
        raise ValueError(
            f"{weights.file} ({source} names) does not hold a whole ViT-MAE of {config.depth} blocks of width "
            f"{config.embed_dim}: {'; '.join(faults)}. {_remedy(faults)}"
        )
    converted = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.dtype != torch.float32})
    tensors = {name: tensor.to(torch.float32) for name, tensor in tensors.items()}
    if converted:
        notes.append(f"converted from {' and '.join(converted)} to float32")
    if left_out:
        notes.append(f"left out, not part of a ViT-MAE: {listed(sorted(left_out))}")
    if "norm_pix_loss" not in said and hints.norm_pix_loss is None and any(map(is_decoder, tensors)):
        notes.append(
            "it does not state its target: assumed normalised pixels; if wrong, give --source.norm-pix-loss False"
        )
    return Checkpoint(config, tensors, source, weights.file, notes)


def resized(
    checkpoint: Checkpoint,
    *,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Checkpoint:
    """Adapts a checkpoint to another image size or number of channels (resize_weights.py)."""
    config, tensors = resize_model(
        checkpoint.config, checkpoint.tensors, image_size=image_size, channels=channels, mean=mean, std=std
    )
    return checkpoint._replace(config=config, tensors=tensors)


def write_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Writes a model.safetensors in patchmill's format. `load_encoder` reads it; with a decoder, `load_model` too."""
    write_safetensors(checkpoint.tensors, {"format": "patchmill", "model": config_json(checkpoint.config)}, path)


def load_encoder(
    path: str | Path,
    *,
    image_size: int | tuple[int, int] | None = None,
    hints: Hints = Hints(),  # noqa: B008
) -> Encoder:
    """Loads the encoder of a checkpoint of any format, in eval mode on the CPU.

    Args:
        path: a file, a folder of exported files, a checkpoint folder or a run folder (newest checkpoint).
        image_size: pixels, if other than in training; positions are interpolated as published.
        hints: options that the file does not state, such as the number of heads of a model of unpublished width.
    Returns:
        a module that maps uint8 [B, H, W, C] images to (class token [B, D], patches [B, L, D]).
    Raises:
        ValueError: as `read_checkpoint`.
    """
    return build_encoder(resized(read_checkpoint(path, hints), image_size=image_size))


def build_encoder(checkpoint: Checkpoint) -> Encoder:
    """Builds the encoder of a checkpoint as a module in eval mode; it uses the tensors without copying them."""
    with torch.device("meta"):
        model = build_model(checkpoint.config)
    encoder = Encoder(model)
    encoder.load_state_dict(encoder_only(checkpoint.tensors), assign=True)
    return encoder.eval()


def _remedy(faults: list[str]) -> str:
    if any(" missing: " in fault for fault in faults):
        return "Fetch the file again if it was truncated, or give one that holds the whole encoder"
    return "Give a plain ViT-MAE checkpoint: extra or different tensors would change what the model computes"
