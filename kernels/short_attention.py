"""Computes attention of short sequences on packed queries, keys and values.

A candidate: no model uses it. `benchmarks.bench_kernels --candidates` times it against the backends of
scaled_dot_product_attention on a GPU, which decides whether it stays. It reads the output of the `qkv` matrix and
writes that output's gradient, both as they are in memory: nothing is unbound, transposed or stacked. A program takes
some heads of one image and holds all keys and values of a head, so that softmax needs no second look at the scores.

Example: one image, two tokens, one head: equal scores give every token the mean of the two values.

Shapes: B images, N tokens (264 at most), H heads of d = 32 or 64.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from patchmill.kernels import reference
from patchmill.kernels.arguments import FLOATS, check_tensor
from patchmill.kernels.backend import active_backend

MAX_TOKENS, HEAD_DIMS = 264, (32, 64)


@torch.library.custom_op("patchmill::short_attention", mutates_args=())
def _short_attention(qkv: Tensor) -> tuple[Tensor, Tensor]:
    if active_backend(qkv) == "triton":
        from patchmill.kernels.short_attention_triton import short_attention as launch

        return launch(qkv)
    return reference.short_attention(qkv)


@_short_attention.register_fake
def _(qkv: Tensor) -> tuple[Tensor, Tensor]:
    B, N, _, H, d = qkv.shape
    return qkv.new_empty(B, N, H, d), qkv.new_empty(B, H, N, dtype=reference.compute_dtype(qkv.dtype))


@torch.library.custom_op("patchmill::short_attention_backward", mutates_args=())
def _short_attention_backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    if active_backend(qkv) == "triton":
        from patchmill.kernels.short_attention_triton import short_attention_backward as launch

        return launch(grad, qkv, out, lse)
    return reference.short_attention_backward(grad, qkv, out, lse)


@_short_attention_backward.register_fake
def _(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    return torch.empty_like(qkv)


def _save(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(inputs[0], out, lse)


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> Tensor:
    dqkv: Tensor = torch.ops.patchmill.short_attention_backward(grad.contiguous(), *ctx.saved_tensors)
    return dqkv


def _products(qkv_shape: tuple[int, ...], products: int) -> int:
    B, N, _, H, d = qkv_shape
    return products * 2 * B * H * N * N * d


_short_attention.register_autograd(_gradients, setup_context=_save)


@register_flop_formula(torch.ops.patchmill.short_attention)  # type: ignore[untyped-decorator]
def _(qkv_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    return _products(qkv_shape, 2)


@register_flop_formula(torch.ops.patchmill.short_attention_backward)  # type: ignore[untyped-decorator]
def _(grad_shape: tuple[int, ...], qkv_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    return _products(qkv_shape, 5)


def short_attention(qkv: Tensor) -> Tensor:
    """Softmax attention of every head among the tokens of its image, scaled by 1 / sqrt(d).

    Args:
        qkv: `[B, N, 3, H, d]`, any float dtype; products of 16-bit types are added in float32.

    Returns:
        `[B, N, H, d]` of qkv's dtype. Gradient: qkv.

    Raises:
        TypeError, ValueError: another dtype, shape or memory layout, too many tokens, or another head width.
    """
    check_tensor("qkv", qkv, ndim=5, dtypes=FLOATS)
    _, N, three, _, d = qkv.shape
    if three != 3:
        raise ValueError(f"qkv must be [B, N, 3, heads, d], got {tuple(qkv.shape)}")
    if N > MAX_TOKENS or d not in HEAD_DIMS:
        raise ValueError(
            f"short_attention takes at most {MAX_TOKENS} tokens and heads of {HEAD_DIMS}, got {N} and {d}:"
            " use torch.nn.functional.scaled_dot_product_attention"
        )
    out: Tensor = torch.ops.patchmill.short_attention(qkv)[0]
    return out
