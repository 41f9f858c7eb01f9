"""Draws crop windows and flips as pure functions of (seed, epoch, sample index, repeat).

A window also depends on the image's displayed size, and nothing else counts: not the decoder, the batch, the rank or a
restart. A few array operations make all draws of a batch.

Legend: B samples; windows are (top, left, height, width) in pixels of the displayed image (EXIF orientation applied).
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from patchmill.kernels.philox import STREAM_CROP, STREAM_FLIP, draw_numpy, uniform_numpy

Ids = NDArray[np.int64]
Windows = NDArray[np.int32]

TRIES = 10  # of the `torchvision` rule before it takes the centre


def crop_windows(
    seed: int,
    epoch: int,
    sample_ids_B: Ids,
    heights_B: NDArray,
    widths_B: NDArray,
    *,
    rule: str = "torchvision",
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    repeats_B: ArrayLike = 0,
) -> Windows:
    """Random-resized-crop windows.

    A try draws an area uniform in `scale` times the image's area, and an aspect (width / height) log-uniform in
    `ratio`. Rule `torchvision` (the published PyTorch pretraining) takes the first of ten tries that fits, at a uniform
    place, else the centre. Rule `tf` (the paper's TF code and the published linear probe) makes one try and cuts it to
    the image.

    Args:
        sample_ids_B: int64 `[B]`; only the low 32 bits are used.
        heights_B, widths_B: integer `[B]`, displayed size of each image.
        rule: "torchvision" or "tf".
        repeats_B: number of the repeat, for repeated augmentation.

    Returns:
        int32 `[B, 4]`: top, left, height, width.
    """
    height, width = heights_B.astype(np.float64), widths_B.astype(np.float64)
    repeats_B = np.broadcast_to(np.asarray(repeats_B, dtype=np.int64), sample_ids_B.shape)
    words_B4 = draw_numpy(seed, STREAM_CROP, 0, sample_ids_B, epoch, repeats_B)
    size_B2 = _crop_size(words_B4, height, width, scale, ratio)
    if rule == "tf":
        return _place(words_B4, np.clip(size_B2, 1, np.stack([height, width], -1)), height, width)
    if rule != "torchvision":
        raise ValueError(f"crop rule must be one of torchvision, tf, got {rule!r}")
    windows_B4 = _place(words_B4, size_B2, height, width)
    again = np.flatnonzero(~_fits(size_B2, height, width))
    if again.size:
        windows_B4[again] = _later_tries(
            seed, epoch, sample_ids_B[again], height[again], width[again], scale, ratio, repeats_B[again]
        )
    return windows_B4


def framed_windows(
    seed: int,
    epoch: int,
    sample_ids_B: Ids,
    heights_B: NDArray,
    widths_B: NDArray,
    *,
    aspect: float,
    fraction: float,
    centre: bool,
    repeats_B: ArrayLike = 0,
) -> Windows:
    """Windows of a fixed relative size: the largest that fits with the target's aspect, times `fraction`.

    `fraction` 224/256 is the usual "resize the shorter side to 256, crop 224". With `centre` this is "none" in the
    paper's Table 1e (and in evaluation); without, it is "fixed size": the position is uniform.

    Returns:
        int32 `[B, 4]`: top, left, height, width.
    """
    height, width = heights_B.astype(np.float64), widths_B.astype(np.float64)
    crop_height = np.minimum(height, width / aspect) * fraction
    size_B2 = np.maximum(np.rint(np.stack([crop_height, crop_height * aspect], -1)), 1)
    size_B2 = np.minimum(size_B2, np.stack([height, width], -1))
    if centre:
        return _centre(size_B2, height, width)
    return _place(draw_numpy(seed, STREAM_CROP, 0, sample_ids_B, epoch, repeats_B), size_B2, height, width)


def flips(seed: int, epoch: int, sample_ids_B: Ids, repeats_B: ArrayLike = 0) -> NDArray[np.bool_]:
    """Whether each sample is mirrored left to right; bool `[B]`, each true with probability one half."""
    return draw_numpy(seed, STREAM_FLIP, 0, sample_ids_B, epoch, repeats_B)[..., 0] >= np.uint32(1 << 31)


def _later_tries(
    seed: int,
    epoch: int,
    sample_ids_B: Ids,
    height: NDArray,
    width: NDArray,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    repeats_B: NDArray,
) -> Windows:
    """Windows of samples whose first try does not fit: the first of tries 2 to 10 that fits, else the centre."""
    blocks = np.arange(1, TRIES)
    words_BT4 = draw_numpy(seed, STREAM_CROP, blocks, sample_ids_B[:, None], epoch, repeats_B[:, None])
    size_BT2 = _crop_size(words_BT4, height[:, None], width[:, None], scale, ratio)
    fits_BT = _fits(size_BT2, height[:, None], width[:, None])
    rows, first = np.arange(len(sample_ids_B)), fits_BT.argmax(axis=1)
    windows_B4 = _place(words_BT4[rows, first], size_BT2[rows, first], height, width)
    missed = ~fits_BT.any(axis=1)
    windows_B4[missed] = _centre(_clamped_size(height, width, ratio), height, width)[missed]
    return windows_B4


def _crop_size(words: NDArray, height: NDArray, width: NDArray, scale: tuple, ratio: tuple) -> NDArray[np.float64]:
    """(height, width) of a try, rounded half to even as Python does; float64 `[..., 2]`. May exceed the image."""
    area = height * width * (scale[0] + (scale[1] - scale[0]) * uniform_numpy(words[..., 0]))
    low, high = np.log(ratio[0]), np.log(ratio[1])
    aspect = np.exp(low + (high - low) * uniform_numpy(words[..., 1]))
    return np.rint(np.stack([np.sqrt(area / aspect), np.sqrt(area * aspect)], axis=-1))


def _fits(size: NDArray, height: NDArray, width: NDArray) -> NDArray[np.bool_]:
    return (size >= 1).all(-1) & (size[..., 0] <= height) & (size[..., 1] <= width)


def _clamped_size(height: NDArray, width: NDArray, ratio: tuple[float, float]) -> NDArray[np.float64]:
    """The whole image, cut to the nearest allowed aspect: torchvision's result when no try fits."""
    crop_height = np.minimum(height, np.rint(width / ratio[0]))
    crop_width = np.minimum(width, np.rint(height * ratio[1]))
    return np.maximum(np.stack([crop_height, crop_width], -1), 1)


def _place(words: NDArray, size: NDArray, height: NDArray, width: NDArray) -> Windows:
    """Places windows of `size` uniformly with words 2 and 3. Sizes that do not fit give garbage, not an error."""
    room = np.maximum(np.stack([height, width], -1) - size + 1, 1).astype(np.int64)
    corner = (words[..., 2:].astype(np.int64) * room) >> 32
    return np.concatenate([corner, size], axis=-1).astype(np.int32)


def _centre(size: NDArray, height: NDArray, width: NDArray) -> Windows:
    corner = np.stack([height, width], -1) - size
    return np.concatenate([corner // 2, size], axis=-1).astype(np.int32)
