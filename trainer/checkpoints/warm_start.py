"""anyone's weights -> [warm_start] -> model: pretraining that begins from a file instead of from the seed.

The encoder must have the model's shape; image size and channels are adapted (resize.py). The decoder is taken too where
the file has one of the same shape that predicts the same target; else it begins from the seed, as a new run's does.
"""

import torch
from torch import Tensor

from patchmill.trainer.checkpoints.checkpoint import shard_like
from patchmill.trainer.checkpoints.interop import Checkpoint, read_checkpoint, resized
from patchmill.trainer.checkpoints.names import encoder_only
from patchmill.trainer.config.model import ModelConfig
from patchmill.trainer.model.vit import VisionTransformer

ENCODER = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
TARGET = ("kind", "encoder_mask_tokens", "target", "norm_pix_loss", "mean", "std", "channels")
DECODER = (*TARGET, "decoder_embed_dim", "decoder_depth", "decoder_num_heads")


def begin_from(model: VisionTransformer, path: str) -> str:
    """Loads the weights of a checkpoint of any format into a model, in place; every rank reads the file.

    Args:
        path: a run folder, or a file or folder that `patchmill import` reads.
    Returns:
        what was taken, in words.
    Raises:
        ValueError: a file that cannot be read, or an encoder of another shape.
    """
    found, config = read_checkpoint(path), model.config
    changed = _changed(found.config, config, ENCODER)
    if changed:
        raise ValueError(f"init {path} is another encoder ({changed}); give the options of its shape, or another file")
    differs = _changed(found.config, config, DECODER)
    fitted = resized(
        found, image_size=config.image_size, channels=config.channels, mean=config.mean, std=config.std
    ).tensors
    own = model.state_dict()
    taken = fitted if found.has_decoder and not differs and fitted.keys() == own.keys() else encoder_only(fitted)
    _copy(taken, own)
    return f"{found.file}: {_parts(found, taken is fitted, differs)}"


def _copy(tensors: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in tensors.items():  # a state dict's tensors are the model's own
            own[name].copy_(shard_like(value, own[name]))


def _parts(found: Checkpoint, whole: bool, differs: str) -> str:
    if whole:
        return "encoder and decoder"
    if not found.has_decoder:
        return "encoder; it has no decoder"
    return f"encoder; its decoder is another ({differs or 'other tensors'})"


def _changed(there: ModelConfig, here: ModelConfig, names: tuple[str, ...]) -> str:
    pairs = [(name, getattr(there, name), getattr(here, name)) for name in names]
    return ", ".join(f"{name} {was} there, {now} here" for name, was, now in pairs if was != now)
