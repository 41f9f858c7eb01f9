"""Adds a branch's output to the residual stream and normalises the sum, in one pass.

A candidate: no model uses it. `benchmarks.bench_kernels --candidates` times it against torch.compile on a GPU, which
decides whether it stays. Where eager PyTorch reads and writes the sum, its norm and both gradients in four kernels,
here the forward and the backward pass are one each.

Example: x = [[1, 2]] and delta = [[1, 4]] give the sum [[2, 6]] and, with weight 1 and bias 0, the norm [[-1, 1]].

Shapes: N rows (tokens of all images), D width.
"""

from typing import Any

import torch
from torch import Tensor

from patchmill.kernels import reference
from patchmill.kernels.arguments import FLOATS, check_tensor
from patchmill.kernels.backend import active_backend, register_as_data_movement


@torch.library.custom_op("patchmill::add_norm", mutates_args=())
def _add_norm(
    x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if active_backend(x) == "triton":
        from patchmill.kernels.add_norm_triton import add_norm as launch

        return launch(x, delta, weight, bias, eps)
    return reference.add_norm(x, delta, weight, bias, eps)


@_add_norm.register_fake
def _(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row = x.new_empty(x.shape[0], dtype=reference.compute_dtype(x.dtype))
    return torch.empty_like(x), torch.empty_like(delta), row, torch.empty_like(row)


@torch.library.custom_op("patchmill::add_norm_backward", mutates_args=())
def _add_norm_backward(
    grad_sum: Tensor, grad_norm: Tensor, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if active_backend(total) == "triton":
        from patchmill.kernels.add_norm_triton import add_norm_backward as launch

        return launch(grad_sum, grad_norm, total, weight, mean, rstd)
    return reference.add_norm_backward(grad_sum, grad_norm, total, weight, mean, rstd)


@_add_norm_backward.register_fake
def _(
    grad_sum: Tensor, grad_norm: Tensor, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    column = mean.new_empty(total.shape[1])
    return torch.empty_like(total), column, torch.empty_like(column)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, delta, weight, bias, _ = inputs
    total, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(total, weight, mean, rstd)
    ctx.dtypes = delta.dtype, weight.dtype, bias.dtype


def _gradients(ctx: Any, grad_sum: Tensor, grad_norm: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    grads = grad_sum.contiguous(), grad_norm.contiguous()
    dx, dweight, dbias = torch.ops.patchmill.add_norm_backward(*grads, *ctx.saved_tensors)
    delta, weight, bias = ctx.dtypes
    return dx, dx.to(delta), dweight.to(weight), dbias.to(bias), None


_add_norm.register_autograd(_gradients, setup_context=_save)
register_as_data_movement(torch.ops.patchmill.add_norm, torch.ops.patchmill.add_norm_backward)


def add_norm(
    x_ND: Tensor, delta_ND: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Add a branch's output to the residual stream and normalise the sum.

    Args:
        x_ND: the residual stream, any float dtype.
        delta_ND: what a branch adds, of x's dtype or a narrower one.
        weight_D, bias_D: of the LayerNorm, any float dtype.
        eps: added to the biased variance.

    Returns:
        The sum, rounded to x's dtype, and the LayerNorm of the rounded sum, of delta's dtype; arithmetic is float32
        (float64 for float64). Gradients: all four tensors.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, device or memory layout, named.
    """
    check_tensor("x", x_ND, ndim=2, dtypes=FLOATS)
    check_tensor("delta", delta_ND, ndim=2, dtypes=FLOATS, device=x_ND.device)
    if delta_ND.shape != x_ND.shape:
        raise ValueError(f"delta must be {tuple(x_ND.shape)} like x, got {tuple(delta_ND.shape)}")
    for name, tensor in (("weight", weight_D), ("bias", bias_D)):
        check_tensor(name, tensor, ndim=1, dtypes=FLOATS, device=x_ND.device)
        if tensor.shape[0] != x_ND.shape[1]:
            raise ValueError(f"{name} must have the width of x, {x_ND.shape[1]}, got {tensor.shape[0]}")
    total, norm, _, _ = torch.ops.patchmill.add_norm(x_ND, delta_ND, weight_D, bias_D, eps)
    return total, norm
