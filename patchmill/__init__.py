"""Patchmill: masked autoencoders pretrained at the speed of the accelerator.

The way of the data is the way of the folders: tools/shard packs images, pipeline/ reads, decodes and masks them,
kernels/ gathers patches and computes the masked loss, trainer/ learns. docs/architecture.md draws it.
"""

__version__ = "0.1.0"
