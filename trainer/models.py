"""config -> [models] -> model: which class a config means.

All share the encoder of vit.py and the contract of mae.py: forward(uint8 images, plan) -> MAEOutput.
"""

from patchmill.trainer.config import ModelConfig
from patchmill.trainer.mae import MaskedAutoencoder
from patchmill.trainer.vit import VisionTransformer


def build_model(config: ModelConfig) -> VisionTransformer:
    """The model of a config, with random weights from torch's generator."""
    return MaskedAutoencoder(config)
