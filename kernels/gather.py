"""Gathers visible patches from images, normalised on the way, and tokens from tokens.

gather_patches reads the bytes of the visible patches alone, straight from the uint8 NHWC batch, and writes them
normalised, in the published patch order and the dtype of the patch embedding's matrix product: no float image and no
full patch sequence is ever made. gather_tokens picks rows of a token matrix, with the position embedding added in the
same pass.

Example: an image of 2 x 4 pixels with values 0..7 and one channel, patch size 2, mean 0 and std 1 / 255 (so that bytes
come out as they are). Its patches are [0, 1, 4, 5] and [2, 3, 6, 7]; ids [[1]] give [[[2, 3, 6, 7]]].

Shapes: B images, H W C pixels, L patches, K picked, P = patch_size * patch_size * C, N = num_prefix + L rows, D width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from patchmill.kernels import reference
from patchmill.kernels.arguments import FLOATS, check_ids, check_images, check_tensor
from patchmill.kernels.backend import active_backend, register_as_data_movement


@torch.library.custom_op("patchmill::gather_patches", mutates_args=())
def _gather_patches(
    images: Tensor, ids: Tensor, patch_size: int, mean: Sequence[float], std: Sequence[float], out_dtype: torch.dtype
) -> Tensor:
    if active_backend(images) == "triton" and out_dtype != torch.float64:
        from patchmill.kernels.gather_triton import gather_patches as launch

        return launch(images, ids, patch_size, mean, std, out_dtype)
    return reference.gather_patches(images, ids, patch_size, mean, std, out_dtype)


@_gather_patches.register_fake
def _(
    images: Tensor, ids: Tensor, patch_size: int, mean: Sequence[float], std: Sequence[float], out_dtype: torch.dtype
) -> Tensor:
    return images.new_empty(*ids.shape, patch_size * patch_size * images.shape[3], dtype=out_dtype)


@torch.library.custom_op("patchmill::gather_tokens", mutates_args=())
def _gather_tokens(x: Tensor, ids: Tensor, pos: Tensor | None, num_prefix: int) -> Tensor:
    if active_backend(x) == "triton":
        from patchmill.kernels.tokens_triton import gather_tokens as launch

        return launch(x, ids, pos, num_prefix)
    return reference.gather_tokens(x, ids, pos, num_prefix)


@_gather_tokens.register_fake
def _(x: Tensor, ids: Tensor, pos: Tensor | None, num_prefix: int) -> Tensor:
    return x.new_empty(*ids.shape, x.shape[2])


@torch.library.custom_op("patchmill::gather_tokens_backward", mutates_args=())
def _gather_tokens_backward(grad: Tensor, ids: Tensor, num_rows: int, num_prefix: int) -> Tensor:
    if active_backend(grad) == "triton":
        from patchmill.kernels.tokens_triton import gather_tokens_backward as launch

        return launch(grad, ids, num_rows, num_prefix)
    return reference.gather_tokens_backward(grad, ids, num_rows, num_prefix)


@_gather_tokens_backward.register_fake
def _(grad: Tensor, ids: Tensor, num_rows: int, num_prefix: int) -> Tensor:
    return grad.new_empty(grad.shape[0], num_rows, grad.shape[2])


def _save_ids(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, int], output: Tensor) -> None:
    x, ids, pos, ctx.num_prefix = inputs
    ctx.save_for_backward(ids)
    ctx.num_rows, ctx.pos_dtype = x.shape[1], None if pos is None else pos.dtype


def _gather_tokens_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor | None, None]:
    (ids,) = ctx.saved_tensors
    dx = torch.ops.patchmill.gather_tokens_backward(grad.contiguous(), ids, ctx.num_rows, ctx.num_prefix)
    # A position belongs to every image, so that its gradient is that of the rows, summed over the batch.
    dpos = None
    if ctx.pos_dtype is not None and ctx.needs_input_grad[2]:
        dpos = dx.sum(0, dtype=reference.compute_dtype(dx.dtype)).to(ctx.pos_dtype)
    return dx, None, dpos, None


_gather_tokens.register_autograd(_gather_tokens_gradients, setup_context=_save_ids)
register_as_data_movement(
    torch.ops.patchmill.gather_patches, torch.ops.patchmill.gather_tokens, torch.ops.patchmill.gather_tokens_backward
)


def gather_patches(
    images_u8_BHWC: Tensor,
    ids_BK: Tensor,
    patch_size: int,
    mean_C: Sequence[float],
    std_C: Sequence[float],
    out_dtype: torch.dtype,
) -> Tensor:
    """Gather and normalise the patches in ids, (byte / 255 - mean) / std, in the order (row, column, channel).

    Args:
        images_u8_BHWC: uint8 images; H and W are multiples of patch_size.
        ids_BK: int32 patch ids in [0, L), row by row.
        patch_size: pixels on a side.
        mean_C, std_C: per channel, in 0..1 units.
        out_dtype: any of the float dtypes; arithmetic is float32 (float64 for float64).

    Returns:
        `[B, K, P]` of out_dtype. Images have no gradient.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, device or memory layout, named.
    """
    check_images(images_u8_BHWC, patch_size, mean_C, std_C)
    check_ids("ids", ids_BK, images_u8_BHWC.shape[0], images_u8_BHWC.device)
    if out_dtype not in FLOATS:
        raise TypeError(f"out_dtype must be one of {', '.join(str(d) for d in FLOATS)}, got {out_dtype}")
    return torch.ops.patchmill.gather_patches(images_u8_BHWC, ids_BK, patch_size, list(mean_C), list(std_C), out_dtype)


def gather_tokens(x_BND: Tensor, ids_BK: Tensor, pos_ND: Tensor | None = None, num_prefix: int = 0) -> Tensor:
    """Pick the tokens in ids, plus their position: out[b, k] = (x[b] + pos)[num_prefix + ids[b, k]].

    Args:
        x_BND: tokens, N = num_prefix + L rows an image.
        ids_BK: int32 patch ids in [0, L); an id may come twice.
        pos_ND: position embedding of every row, of any float dtype; the sum is in float32, rounded once.
        num_prefix: rows (class token, registers) that stand before the patches; ids do not count them and the result
            leaves them out.

    Returns:
        `[B, K, D]` of x's dtype. Gradients: x (rows not picked get zero) and pos.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, device or memory layout, named.
    """
    check_tensor("x", x_BND, ndim=3, dtypes=FLOATS)
    check_ids("ids", ids_BK, x_BND.shape[0], x_BND.device)
    if not 0 <= num_prefix < x_BND.shape[1]:
        raise ValueError(
            f"num_prefix must be 0 to {x_BND.shape[1] - 1} for x of {x_BND.shape[1]} rows, got {num_prefix}"
        )
    if pos_ND is not None:
        check_tensor("pos", pos_ND, ndim=2, dtypes=FLOATS, device=x_BND.device)
        if pos_ND.shape != x_BND.shape[1:]:
            raise ValueError(f"pos must be {tuple(x_BND.shape[1:])} like the rows of x, got {tuple(pos_ND.shape)}")
    return torch.ops.patchmill.gather_tokens(x_BND, ids_BK, pos_ND, num_prefix)
