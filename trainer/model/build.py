"""Builds the model that a config describes.

All models share the encoder of vit.py and the interface of mae.py: forward(uint8 images, plan) -> MAEOutput.
"""

from patchmill.trainer.config.model import ModelConfig
from patchmill.trainer.model.crossmae import CrossMAE
from patchmill.trainer.model.mae import MaskedAutoencoder
from patchmill.trainer.model.mask_tokens import MaskTokenAutoencoder, SimMIM
from patchmill.trainer.model.vit import VisionTransformer


def build_model(config: ModelConfig) -> VisionTransformer:
    """Builds a model with random weights from torch's generator."""
    if config.kind == "simmim":
        return SimMIM(config)
    if config.kind == "crossmae":
        return CrossMAE(config)
    return MaskTokenAutoencoder(config) if config.encoder_mask_tokens else MaskedAutoencoder(config)
