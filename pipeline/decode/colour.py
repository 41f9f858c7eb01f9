"""Jitters brightness, contrast and saturation as a pure function of the sample.

The paper's Table 1e tries "crop + color jit" (and finds no gain). Factors are uniform in [1 - strength, 1 + strength]
and always applied in this order:

    brightness b: x -> b x        contrast c: x -> c x + (1 - c) mean grey of the image
    saturation s: x -> s x + (1 - s) grey of the pixel

Runs on the images' device after any decoder, with the same result.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchmill.kernels.philox import STREAM_COLOUR, draw_numpy, uniform_numpy

GREY_WEIGHTS = (0.299, 0.587, 0.114)  # ITU-R BT.601 luma, as JPEG and Pillow
IMAGES_AT_ONCE = 32  # bounds the floating-point copy: 19 MB of 224 x 224 RGB


def jitter_factors(
    seed: int, epoch: int, sample_ids_B: NDArray[np.int64], repeats_B: NDArray[np.int64], strength: float
) -> NDArray[np.float32]:
    """Factors of brightness, contrast and saturation; float32 `[B, 3]`."""
    words_B4 = draw_numpy(seed, STREAM_COLOUR, 0, sample_ids_B, epoch, repeats_B)
    return (1 + strength * (2 * uniform_numpy(words_B4[:, :3]) - 1)).astype(np.float32)


def jitter(images_BHWC: Tensor, factors_B3: Tensor) -> Tensor:
    """Applies the factors; uint8 in and out. Saturation changes only images of three channels."""
    out = torch.empty_like(images_BHWC)
    for start in range(0, len(images_BHWC), IMAGES_AT_ONCE):
        rows = slice(start, start + IMAGES_AT_ONCE)
        brightness, contrast, saturation = factors_B3[rows, :, None, None, None].unbind(1)
        x = (images_BHWC[rows].float() * brightness).clamp(0, 255)
        # an integer sum does not depend on how threads divide the work
        total = _grey(x).round().to(torch.int64).sum(dim=(1, 2, 3), keepdim=True)
        mean = (total / (x.shape[1] * x.shape[2])).float()
        x = (contrast * x + (1 - contrast) * mean).clamp(0, 255)
        if x.shape[3] == 3:
            x = (saturation * x + (1 - saturation) * _grey(x)).clamp(0, 255)
        out[rows] = x.round().to(torch.uint8)
    return out


def _grey(x_BHWC: Tensor) -> Tensor:
    """Luma of RGB, the mean of other channels; `[B, H, W, 1]`."""
    if x_BHWC.shape[3] != 3:
        return x_BHWC.mean(dim=3, keepdim=True)
    red, green, blue = x_BHWC.split(1, dim=3)
    return GREY_WEIGHTS[0] * red + GREY_WEIGHTS[1] * green + GREY_WEIGHTS[2] * blue
