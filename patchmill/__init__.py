"""Patchmill: masked autoencoders pretrained at the speed of the accelerator.

Data flows through the folders in this order: tools/ packs images into shards, pipeline/ reads, decodes and masks them,
kernels/ gathers patches and computes the masked loss, trainer/ learns. docs/architecture.md draws it.

The public names load on first use: `import patchmill` imports neither torch nor any other package.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchmill.pipeline.config import DataConfig as DataConfig
    from patchmill.pipeline.config import MaskConfig as MaskConfig
    from patchmill.pipeline.loader import build_loader as build_loader
    from patchmill.pipeline.plan.masks import MaskPlan as MaskPlan
    from patchmill.trainer.checkpoints.interop import load_encoder as load_encoder
    from patchmill.trainer.config.model import ModelConfig as ModelConfig
    from patchmill.trainer.model.build import build_model as build_model
    from patchmill.trainer.model.mae import MaskedAutoencoder as MaskedAutoencoder
    from patchmill.trainer.model.uniformity import uniformity_loss as uniformity_loss

__version__ = "0.1.0"

_HOMES = {
    "DataConfig": "pipeline.config",
    "MaskConfig": "pipeline.config",
    "MaskPlan": "pipeline.plan.masks",
    "MaskedAutoencoder": "trainer.model.mae",
    "ModelConfig": "trainer.config.model",
    "build_loader": "pipeline.loader",
    "build_model": "trainer.model.build",
    "load_encoder": "trainer.checkpoints.interop",
    "uniformity_loss": "trainer.model.uniformity",
}
__all__ = [*sorted(_HOMES), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'patchmill' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"patchmill.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
