"""Starts pretraining from the weights of a checkpoint of any format.

The encoder must have the model's shape; image size and channels are adapted (resize_weights.py). The decoder is loaded
too if it has the same shape and predicts the same target; otherwise it starts from the seed.
"""

import torch
from torch import Tensor

from patchmill.trainer.checkpoints.interop import Checkpoint, read_checkpoint, resized
from patchmill.trainer.checkpoints.model_file import shard_like
from patchmill.trainer.checkpoints.names import encoder_only
from patchmill.trainer.config.model import list_changes
from patchmill.trainer.model.vit import VisionTransformer

ENCODER = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
TARGET = ("kind", "encoder_mask_tokens", "target", "norm_pix_loss", "mean", "std", "channels")
DECODER = (*TARGET, "decoder_embed_dim", "decoder_depth", "decoder_num_heads")


def begin_from(model: VisionTransformer, path: str) -> str:
    """Loads the weights of a checkpoint of any format into a model in place. Every rank reads the file.

    Args:
        path: a run folder, or a file or folder that `patchmill import` reads.
    Returns:
        what was loaded, in words.
    Raises:
        ValueError: the file cannot be read, or its encoder has another shape.
    """
    found, config = read_checkpoint(path), model.config
    changed = list_changes(found.config, config, ENCODER)
    if changed:
        raise ValueError(
            f"init {path} holds an encoder of another shape ({changed}); "
            "set the model options to its shape, or give another file"
        )
    differs = list_changes(found.config, config, DECODER)
    fitted = resized(
        found, image_size=config.image_size, channels=config.channels, mean=config.mean, std=config.std
    ).tensors
    own = model.state_dict()
    taken = fitted if found.has_decoder and not differs and fitted.keys() == own.keys() else encoder_only(fitted)
    _copy(taken, own)
    return f"{found.file}: {_parts(found, taken is fitted, differs)}"


def _copy(tensors: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in tensors.items():  # these tensors share memory with the model's parameters
            own[name].copy_(shard_like(value, own[name]))


def _parts(found: Checkpoint, whole: bool, differs: str) -> str:
    if whole:
        return "encoder and decoder"
    if not found.has_decoder:
        return "encoder; the file has no decoder"
    return f"encoder; its decoder differs ({differs or 'other tensors'})"
