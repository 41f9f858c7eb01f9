"""Augments whole batches on their device: RandAugment and random erasing.

RandAugment (Cubuk et al. 2020) is the variant that the published fine-tuning calls `rand-m9-mstd0.5-inc1`: two of
fifteen operations per image, each applied with probability one half, all stronger with a higher level. The operations
are kornia's. Which operation an image gets, how strong, and what is erased is a function of (seed, epoch, sample).

Shapes: B images, n images that share an operation, C H W channels and pixels.
"""

import importlib.util
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchmill.kernels.philox import STREAM_COLOUR, draw_numpy, philox_torch, seed_key, uniform_numpy
from patchmill.trainer.config.evaluate import AugmentConfig

OPS_BLOCK, ERASE_BLOCK, NOISE_BLOCK = 256, 512, 528
"""Philox blocks of the colour stream (block 0 is the loader's colour jitter)"""

GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
TONAL = (
    "autocontrast",
    "equalize",
    "invert",
    "posterize",
    "solarize",
    "solarize_add",
    "colour",
    "contrast",
    "brightness",
    "sharpness",
)
OPERATIONS = GEOMETRIC + TONAL

ERASE_AREA = (0.02, 1 / 3)
ERASE_RATIO = (0.3, 1 / 0.3)
ERASE_TRIES = 10


def check_kornia(config: AugmentConfig, channels: int) -> None:
    """Raises ValueError when RandAugment is on and cannot run."""
    if config.ops and importlib.util.find_spec("kornia") is None:
        raise ValueError("augment.ops needs kornia: pip install 'patchmill[eval]', or --augment.ops 0 for none")
    if config.ops and channels != 3:
        raise ValueError(f"RandAugment needs 3 channels and the model has {channels}: give --augment.ops 0")


def rand_augment(
    images_BCHW: Tensor, sample_ids_B: NDArray, fill: Sequence[float], config: AugmentConfig, *, seed: int, epoch: int
) -> Tensor:
    """Applies `config.ops` operations to each image, fp32 [B, C, H, W] in 0..1 units; returns new images.

    Args:
        sample_ids_B: int64, on the host, to avoid waiting for the device.
        fill: value per channel for pixels from beyond the border.
    """
    images_BCHW = images_BCHW.clone()
    for layer in range(config.ops):
        choice_B, level_B, sign_B = draw_operations(sample_ids_B, config, seed=seed, epoch=epoch, layer=layer)
        for number, name in enumerate(OPERATIONS):
            rows = np.flatnonzero(choice_B == number)
            if not rows.size:
                continue
            rows_n = torch.from_numpy(rows).to(images_BCHW.device)
            level_n, sign_n = (torch.from_numpy(v[rows]).to(images_BCHW) for v in (level_B, sign_B))
            picked_nCHW = images_BCHW[rows_n]
            if name in GEOMETRIC:
                changed_nCHW = _warp(picked_nCHW, name, level_n * sign_n, fill)
            else:
                changed_nCHW = _tone(name, level_n, sign_n)(picked_nCHW)
            images_BCHW[rows_n] = changed_nCHW.clamp(0, 1)
    return images_BCHW


def draw_operations(
    sample_ids_B: NDArray, config: AugmentConfig, *, seed: int, epoch: int, layer: int
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
    """Operation (index into OPERATIONS, -1 for none), level in 0..1 and sign (1 or -1) of each image."""
    words_B4 = draw_numpy(seed, STREAM_COLOUR, OPS_BLOCK + layer, sample_ids_B, epoch)
    choice_B = (words_B4[:, 0].astype(np.int64) * len(OPERATIONS)) >> 32
    choice_B[words_B4[:, 1] >= 1 << 31] = -1
    sign_B = np.where(words_B4[:, 1] & 1, 1.0, -1.0).astype(np.float32)
    first_B, second_B = uniform_numpy(words_B4[:, 2]), uniform_numpy(words_B4[:, 3])
    normal_B = np.sqrt(-2 * np.log(1 - first_B)) * np.cos(2 * np.pi * second_B)  # Box-Muller
    level_B = np.clip(config.magnitude + config.magnitude_std * normal_B, 0, 10) / 10
    return choice_B, level_B.astype(np.float32), sign_B


def _warp(images_nCHW: Tensor, name: str, amount_n: Tensor, fill: Sequence[float]) -> Tensor:
    """Rotates (up to 30 degrees), shears (0.3) or shifts (0.45 of the side) about the centre, bicubic."""
    from kornia.geometry.transform import warp_affine

    height, width = images_nCHW.shape[2:]
    zero, one = torch.zeros_like(amount_n), torch.ones_like(amount_n)
    x_n, y_n = zero, zero
    across, down = (one, zero), (zero, one)
    if name == "rotate":
        angle = amount_n * math.radians(30)
        across, down = (angle.cos(), -angle.sin()), (angle.sin(), angle.cos())
    elif name == "shear_x":
        across = (one, 0.3 * amount_n)
    elif name == "shear_y":
        down = (0.3 * amount_n, one)
    elif name == "translate_x":
        x_n = 0.45 * width * amount_n
    else:
        y_n = 0.45 * height * amount_n
    centre_x, centre_y = (width - 1) / 2, (height - 1) / 2
    x_n = x_n + centre_x - across[0] * centre_x - across[1] * centre_y
    y_n = y_n + centre_y - down[0] * centre_x - down[1] * centre_y
    matrix_n23 = torch.stack([torch.stack([*across, x_n], -1), torch.stack([*down, y_n], -1)], 1)
    return warp_affine(
        images_nCHW,
        matrix_n23,
        (height, width),
        mode="bicubic",
        padding_mode="fill",
        fill_value=torch.tensor(fill, device=images_nCHW.device, dtype=images_nCHW.dtype),
    )


def _tone(name: str, level_n: Tensor, sign_n: Tensor) -> Callable[[Tensor], Tensor]:
    """A tonal operation with one level per image; equal to Pillow's on 8-bit images, to within one grey level."""
    from kornia import enhance

    factor_n = (1 + 0.9 * level_n * sign_n).clamp_min(0.1)
    table: dict[str, Callable[[Tensor], Tensor]] = {
        "autocontrast": enhance.normalize_min_max,
        "equalize": enhance.equalize,
        "invert": enhance.invert,
        "posterize": lambda x: enhance.posterize(x, 4 - (4 * level_n).int()),
        "solarize": lambda x: torch.where(x >= _per_image(1 - level_n), 1 - x, x),
        "solarize_add": lambda x: torch.where(x < 0.5, (x + _per_image(110 / 255 * level_n)).clamp_max(1), x),
        "colour": lambda x: enhance.adjust_saturation_with_gray_subtraction(x, factor_n),
        "contrast": lambda x: enhance.adjust_contrast_with_mean_subtraction(x, factor_n),
        "brightness": lambda x: enhance.adjust_brightness_accumulative(x, factor_n),
        "sharpness": lambda x: enhance.sharpness(x, factor_n),
    }
    return table[name]


def random_erase(images_BCHW: Tensor, sample_ids_B: NDArray, probability: float, *, seed: int, epoch: int) -> Tensor:
    """Replaces a rectangle in some images with standard normal noise, in place (Zhong et al. 2017, mode "pixel").

    Args:
        images_BCHW: normalised, fp32.
        sample_ids_B: int64, on the host.
    """
    boxes_B4 = draw_boxes(sample_ids_B, images_BCHW.shape[2:], probability, seed=seed, epoch=epoch)
    rows = np.flatnonzero(boxes_B4[:, 2])
    if not rows.size:
        return images_BCHW
    device = images_BCHW.device
    rows_n, ids_n = (torch.from_numpy(each).to(device) for each in (rows, sample_ids_B[rows]))
    top, left, height, width = torch.from_numpy(boxes_B4[rows].T.copy()).to(device)[..., None, None, None]
    y_H1 = torch.arange(images_BCHW.shape[2], device=device)[:, None]
    x_W = torch.arange(images_BCHW.shape[3], device=device)
    inside_n1HW = (y_H1 >= top) & (y_H1 < top + height) & (x_W >= left) & (x_W < left + width)
    noise_nCHW = _noise(ids_n, images_BCHW.shape[1:], seed, epoch)
    images_BCHW[rows_n] = torch.where(inside_n1HW, noise_nCHW.to(images_BCHW.dtype), images_BCHW[rows_n])
    return images_BCHW


def draw_boxes(
    sample_ids_B: NDArray, size_hw: Sequence[int], probability: float, *, seed: int, epoch: int
) -> NDArray[np.int64]:
    """Draws the boxes to erase: top, left, height, width; int64 [B, 4], zeros for images that stay whole.

    A box covers 2 % to 33 % of the area, with an aspect ratio of 0.3 to 3.3; the first of ten tries that fits.
    """
    height, width = size_hw
    blocks_T = ERASE_BLOCK + 1 + np.arange(ERASE_TRIES)
    words_BT4 = draw_numpy(seed, STREAM_COLOUR, blocks_T, sample_ids_B[:, None], epoch)
    uniform_BT4 = uniform_numpy(words_BT4)
    area = height * width * (ERASE_AREA[0] + (ERASE_AREA[1] - ERASE_AREA[0]) * uniform_BT4[..., 0])
    low, high = np.log(ERASE_RATIO[0]), np.log(ERASE_RATIO[1])
    ratio = np.exp(low + (high - low) * uniform_BT4[..., 1])
    rows, columns = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    top = np.floor(uniform_BT4[..., 2] * (height - rows + 1))
    left = np.floor(uniform_BT4[..., 3] * (width - columns + 1))
    fits_BT = (rows < height) & (columns < width) & (rows >= 1) & (columns >= 1)
    first_B = fits_BT.argmax(1)
    boxes_B4 = np.stack([top, left, rows, columns], -1)[np.arange(len(first_B)), first_B].astype(np.int64)
    erased_B = uniform_numpy(draw_numpy(seed, STREAM_COLOUR, ERASE_BLOCK, sample_ids_B, epoch)[:, 0]) < probability
    boxes_B4[~(erased_B & fits_BT.any(1))] = 0
    return boxes_B4


def _noise(sample_ids_n: Tensor, shape: Sequence[int], seed: int, epoch: int) -> Tensor:
    """Draws standard normal numbers, fp32 [n, *shape]: Philox words by sample and position, Box-Muller in pairs."""
    count = math.prod(shape)
    position = torch.arange(-(-count // 4), device=sample_ids_n.device)
    block, pass_number = (torch.full_like(position, v) for v in (NOISE_BLOCK | STREAM_COLOUR << 24, epoch))
    words = philox_torch(block, sample_ids_n[:, None], pass_number, position, seed_key(seed))
    uniform = [(word.float() + 0.5) * 2.0**-32 for word in words]
    normal = []
    for radius, angle in ((uniform[0], uniform[1]), (uniform[2], uniform[3])):
        length = (-2 * radius.clamp_max(1 - 2.0**-24).log()).sqrt()
        normal += [length * (2 * math.pi * angle).cos(), length * (2 * math.pi * angle).sin()]
    return torch.stack(normal, -1).flatten(1)[:, :count].reshape(-1, *shape)


def _per_image(values_n: Tensor) -> Tensor:
    return values_n[:, None, None, None]
