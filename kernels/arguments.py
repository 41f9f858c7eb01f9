"""Checks the tensors that operators are given, without waiting for the device.

The values of ids are not checked (that would wait for the device): they must lie in [0, L).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(
    name: str, tensor: Tensor, *, ndim: int, dtypes: Sequence[torch.dtype], device: torch.device | None = None
) -> None:
    """Check kind, dtype, number of dimensions, memory layout and (when given) device of an argument.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another number of dimensions, not contiguous, or on another device.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be one of {', '.join(str(d) for d in dtypes)}, got {tensor.dtype}")
    if tensor.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {tuple(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}: call .contiguous()")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the other arguments on {device}: move it there")


def check_images(images_BHWC: Tensor, patch_size: int, mean_C: Sequence[float], std_C: Sequence[float]) -> None:
    """Check uint8 NHWC images against the patch size and the per-channel statistics (tuples in 0..1 units)."""
    check_tensor("images", images_BHWC, ndim=4, dtypes=(torch.uint8,))
    _, height, width, channels = images_BHWC.shape
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"images of {height} x {width} pixels do not divide into patches of {patch_size}")
    if len(mean_C) != channels or len(std_C) != channels:
        raise ValueError(
            f"images have {channels} channels (the last dimension), but mean has {len(mean_C)} values, std {len(std_C)}"
        )
    if min(std_C) <= 0:
        raise ValueError(f"std must be positive, got {tuple(std_C)}")


def check_ids(name: str, ids: Tensor, batch: int, device: torch.device) -> None:
    """Check int32 patch ids `[B, anything]` on the device of the tensors they index."""
    check_tensor(name, ids, ndim=2, dtypes=(torch.int32,), device=device)
    if ids.shape[0] != batch:
        raise ValueError(f"{name} has {ids.shape[0]} rows for a batch of {batch}")
