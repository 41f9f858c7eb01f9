"""Loads the reference tensors of the published implementation, and the model that has their weights."""

import json
from pathlib import Path

from safetensors.torch import load_file

from patchmill.trainer.config.model import ModelConfig
from patchmill.trainer.model.mae import MaskedAutoencoder

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = [(name, target) for name in ("mae_tiny_p16", "mae_tiny_p14") for target in ("pix", "norm_pix")]


def load_case(name, target):
    """A golden file's tensors, its settings and the model with its weights."""
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    settings = json.loads((GOLDEN / f"{name}.json").read_text())
    shape = {key: settings[key] for key in ("patch_size", "embed_dim", "depth", "num_heads")}
    decoder = {key: settings[key] for key in ("decoder_embed_dim", "decoder_depth", "decoder_num_heads")}
    model = MaskedAutoencoder(
        ModelConfig(image_size=settings["img_size"], norm_pix_loss=target == "norm_pix", **shape, **decoder)
    )
    model.load_state_dict({k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")})
    return tensors, settings, model


def relative(value, reference):
    """||value - reference|| / ||reference||."""
    return ((value - reference).norm() / reference.norm()).item()
