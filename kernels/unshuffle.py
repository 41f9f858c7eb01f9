"""Puts encoder tokens and mask tokens back into image order and adds positions.

The decoder sees every patch again: kept ones as the encoder left them, masked ones as one learned token, each with its
position. The published code repeats the mask token, concatenates, gathers and adds; here one pass writes each row once.
The backward pass reads the gradient once: rows of kept patches go to dx, the others are summed into dmask_token in a
fixed order.

Example with one class token (num_prefix = 1), K = 1 kept patch of L = 3, width 1, pos = 0: x = [[c], [k]], mask token m
and ids_restore [1, 0, 2] (patch 1 was kept) give [[c], [m], [k], [m]].

Shapes: B images, L patches, K kept, N = num_prefix + K tokens, E decoder width.
"""

from typing import Any

import torch
from torch import Tensor

from patchmill.kernels import reference
from patchmill.kernels.arguments import FLOATS, check_ids, check_tensor
from patchmill.kernels.backend import active_backend, register_as_data_movement


@torch.library.custom_op("patchmill::unshuffle", mutates_args=())
def _unshuffle(x: Tensor, mask_token: Tensor, pos: Tensor, ids_restore: Tensor, num_prefix: int) -> Tensor:
    if active_backend(x) == "triton":
        from patchmill.kernels.unshuffle_triton import unshuffle as launch

        return launch(x, mask_token, pos, ids_restore, num_prefix)
    return reference.unshuffle(x, mask_token, pos, ids_restore, num_prefix)


@_unshuffle.register_fake
def _(x: Tensor, mask_token: Tensor, pos: Tensor, ids_restore: Tensor, num_prefix: int) -> Tensor:
    return x.new_empty(x.shape[0], pos.shape[0], x.shape[2])


@torch.library.custom_op("patchmill::unshuffle_backward", mutates_args=())
def _unshuffle_backward(grad: Tensor, ids_restore: Tensor, num_keep: int, num_prefix: int) -> tuple[Tensor, Tensor]:
    if active_backend(grad) == "triton":
        from patchmill.kernels.unshuffle_triton import unshuffle_backward as launch

        return launch(grad, ids_restore, num_keep, num_prefix)
    return reference.unshuffle_backward(grad, ids_restore, num_keep, num_prefix)


@_unshuffle_backward.register_fake
def _(grad: Tensor, ids_restore: Tensor, num_keep: int, num_prefix: int) -> tuple[Tensor, Tensor]:
    dx = grad.new_empty(grad.shape[0], num_prefix + num_keep, grad.shape[2])
    return dx, grad.new_empty(grad.shape[2], dtype=reference.compute_dtype(grad.dtype))


def _save_ids(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, int], output: Tensor) -> None:
    x, mask_token, pos, ids_restore, ctx.num_prefix = inputs
    ctx.save_for_backward(ids_restore)
    ctx.num_keep, ctx.dtypes = x.shape[1] - ctx.num_prefix, (mask_token.dtype, pos.dtype)


def _unshuffle_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
    (ids_restore,) = ctx.saved_tensors
    token_dtype, pos_dtype = ctx.dtypes
    grad = grad.contiguous()
    dx, dtoken = torch.ops.patchmill.unshuffle_backward(grad, ids_restore, ctx.num_keep, ctx.num_prefix)
    dpos = grad.sum(0, dtype=dtoken.dtype).to(pos_dtype) if ctx.needs_input_grad[2] else None
    return dx, dtoken.to(token_dtype), dpos, None, None


_unshuffle.register_autograd(_unshuffle_gradients, setup_context=_save_ids)
register_as_data_movement(torch.ops.patchmill.unshuffle, torch.ops.patchmill.unshuffle_backward)


def unshuffle(x_BNE: Tensor, mask_token_E: Tensor, pos: Tensor, ids_restore_BL: Tensor, num_prefix: int = 0) -> Tensor:
    """Put kept tokens in their places, the mask token everywhere else, and add the position embedding.

    Args:
        x_BNE: encoder tokens at decoder width: num_prefix rows, then the K kept patches in kept order.
        mask_token_E: learned token, any float dtype.
        pos: position embedding `[num_prefix + L, E]`, any float dtype; sums are in float32, rounded once.
        ids_restore_BL: int32 place of each patch in the order (kept if below K): a permutation of 0..L-1 per image.
        num_prefix: rows (class token, registers) that keep their place; ids_restore does not count them.

    Returns:
        `[B, num_prefix + L, E]` of x's dtype. Gradients: x, mask_token and pos.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, device or memory layout, named.
    """
    check_tensor("x", x_BNE, ndim=3, dtypes=FLOATS)
    batch, num_tokens, width = x_BNE.shape
    check_ids("ids_restore", ids_restore_BL, batch, x_BNE.device)
    check_tensor("mask_token", mask_token_E, ndim=1, dtypes=FLOATS, device=x_BNE.device)
    check_tensor("pos", pos, ndim=2, dtypes=FLOATS, device=x_BNE.device)
    num_patches = ids_restore_BL.shape[1]
    if mask_token_E.shape[0] != width:
        raise ValueError(f"mask_token must have the width of x, {width}, got {mask_token_E.shape[0]}")
    if pos.shape[0] != num_prefix + num_patches or pos.shape[1] != width:
        raise ValueError(f"pos must be ({num_prefix + num_patches}, {width}), got {tuple(pos.shape)}")
    if not 0 <= num_tokens - num_prefix <= num_patches:
        raise ValueError(
            f"x has {num_tokens} rows: with num_prefix={num_prefix} it must hold 0 to {num_patches} patches"
        )
    return torch.ops.patchmill.unshuffle(x_BNE, mask_token_E, pos, ids_restore_BL, num_prefix)
