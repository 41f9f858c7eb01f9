"""Writes checkpoints in other formats: the weights under their names, and the config files their readers expect.

    mae         model.pth {"model": ...}, as facebookresearch/mae saves
    timm        model.safetensors and config.json of timm.create_model("local-dir:FOLDER")
    hf          model.safetensors, config.json and preprocessor_config.json of ViTMAEForPreTraining.from_pretrained
    detectron2  model.pth {"model": {"backbone.net...": ...}} for ViTDet's train.init_checkpoint
    mmseg       model.pth {"state_dict": ...} for init_cfg=dict(type="Pretrained", ...) of the MAE backbone
    patchmill   model.safetensors

The Hugging Face file has the layout of transformers 4, which versions 4 and 5 read. Every file carries the model's
config: `patchmill import` restores the same model.
"""

import json
from pathlib import Path
from typing import Any, Literal

from patchmill.trainer.checkpoints.files import NOTE, config_json, write_pth, write_safetensors
from patchmill.trainer.checkpoints.interop import Checkpoint, write_checkpoint
from patchmill.trainer.checkpoints.names import encoder_only, to_format
from patchmill.trainer.config.model import ModelConfig
from patchmill.trainer.model.vit import LAYER_NORM_EPS

FileFormat = Literal["patchmill", "mae", "timm", "hf", "detectron2", "mmseg"]
Pool = Literal["token", "avg"]

_TIMM_SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}


def write_files(folder: Path, target: FileFormat, checkpoint: Checkpoint, *, pool: Pool = "token") -> None:
    """Writes a checkpoint in a format into an existing folder.

    Args:
        checkpoint: without a decoder, or for a format without one, only the encoder is written.
        pool: timm's `global_pool`; with "avg" the last norm is called `fc_norm`.
    Raises:
        ValueError: the format cannot hold this model.
        OSError: the folder is not writable.
    """
    config = checkpoint.config
    if target == "patchmill":
        write_checkpoint(checkpoint, folder / "model.safetensors")
        return
    tensors = to_format(checkpoint.tensors, target, mean_pool=target == "timm" and pool == "avg")
    if target in ("mae", "detectron2"):
        write_pth(tensors, "model", config, folder / "model.pth")
    elif target == "mmseg":
        write_pth(tensors, "state_dict", config, folder / "model.pth")
    else:
        # transformers requires "format" in the header
        write_safetensors(tensors, {"format": "pt", NOTE: config_json(config)}, folder / "model.safetensors")
        if target == "timm":
            _write_json(folder / "config.json", timm_config(config, pool))
        else:
            _write_json(folder / "config.json", hf_config(config, checkpoint.has_decoder))
            _write_json(folder / "preprocessor_config.json", hf_processor(config))


def only_encoder(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint without its decoder."""
    return checkpoint._replace(tensors=encoder_only(checkpoint.tensors))


def hf_config(config: ModelConfig, has_decoder: bool) -> dict[str, Any]:
    """Returns config.json of transformers' ViTMAE. It sets layer_norm_eps because the default there is 1e-12.

    Raises:
        ValueError: images are not square.
    """
    c = config
    if c.grid_hw[0] != c.grid_hw[1]:
        raise ValueError(
            f"transformers' ViTMAE has square images only, the model {c.image_hw[0]} x {c.image_hw[1]}: "
            "give --to.image-size N, or export to timm, which has any"
        )
    return {
        "architectures": ["ViTMAEForPreTraining" if has_decoder else "ViTMAEModel"],
        "model_type": "vit_mae",
        "image_size": c.image_hw[0],
        "patch_size": c.patch_size,
        "num_channels": c.channels,
        "hidden_size": c.embed_dim,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.num_heads,
        "intermediate_size": int(c.embed_dim * c.mlp_ratio),
        "decoder_hidden_size": c.decoder_embed_dim,
        "decoder_num_hidden_layers": c.decoder_depth,
        "decoder_num_attention_heads": c.decoder_num_heads,
        "decoder_intermediate_size": int(c.decoder_embed_dim * c.mlp_ratio),
        "norm_pix_loss": c.norm_pix_loss,
        "hidden_act": "gelu",
        "layer_norm_eps": LAYER_NORM_EPS,
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "torch_dtype": "float32",
    }


def hf_processor(config: ModelConfig) -> dict[str, Any]:
    """Returns preprocessor_config.json: bicubic resize, scaling to 0..1, mean and std."""
    height, width = config.image_hw
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
    }


def timm_config(config: ModelConfig, pool: Pool) -> dict[str, Any]:
    """Returns config.json of a timm model folder; `model_args` holds the whole shape, `architecture` is only a name."""
    c = config
    height, width = c.image_hw
    return {
        "architecture": f"vit_{_TIMM_SIZES.get(c.embed_dim, 'base')}_patch{14 if c.embed_dim == 1280 else 16}_224",
        "num_classes": 0,
        "num_features": c.embed_dim,
        "global_pool": pool,
        "model_args": {
            "img_size": [height, width],
            "patch_size": c.patch_size,
            "in_chans": c.channels,
            "embed_dim": c.embed_dim,
            "depth": c.depth,
            "num_heads": c.num_heads,
            "mlp_ratio": c.mlp_ratio,
            "global_pool": pool,
        },
        "pretrained_cfg": {
            "input_size": [c.channels, height, width],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 0.9,
            "crop_mode": "center",
            "mean": list(c.mean),
            "std": list(c.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _write_json(path: Path, table: dict[str, Any]) -> None:
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
