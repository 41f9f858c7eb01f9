"""Computes the loss on masked patches, and its gradient in the same pass.

The published loss makes a target of every patch, normalises it, squares the error of every patch, and then multiplies
by the mask. Here the bytes of the masked patches are read straight from the images, their mean and variance are taken
in registers, and the gradient is written while prediction and target are at hand: one read of pred, one write of dpred,
no target in memory. The backward pass scales what was written by the incoming gradient.

Example: an image of 2 x 2 pixels with bytes 0, 1, 2, 3, one channel, patch size 2, mean 0, std 1 / 255, norm_pix off:
the target is [0, 1, 2, 3]; pred [0, 1, 2, 1] has a squared error of (0 + 0 + 0 + 4) / 4 = 1, an absolute one of 2 / 4,
and gradients [0, 0, 0, -1] and [0, 0, 0, -1 / 4].

Shapes: B images, H W C pixels, M masked patches, P = patch_size * patch_size * C values per patch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from patchmill.kernels import reference
from patchmill.kernels.arguments import FLOATS, check_ids, check_images, check_tensor
from patchmill.kernels.backend import active_backend, register_as_data_movement


@torch.library.custom_op("patchmill::masked_loss", mutates_args=())
def _masked_loss(
    pred: Tensor,
    images: Tensor,
    ids_mask: Tensor,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    norm_pix: bool,
    power: int,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    if active_backend(pred) == "triton":
        from patchmill.kernels.masked_loss_triton import masked_loss as launch

        return launch(pred, images, ids_mask, patch_size, mean, std, norm_pix, power, with_grad)
    return reference.masked_loss(pred, images, ids_mask, patch_size, mean, std, norm_pix, power, with_grad)


@_masked_loss.register_fake
def _(
    pred: Tensor,
    images: Tensor,
    ids_mask: Tensor,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    norm_pix: bool,
    power: int,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    loss = pred.new_empty((), dtype=reference.compute_dtype(pred.dtype))
    return loss, torch.empty_like(pred) if with_grad else pred.new_empty(0)


@torch.library.custom_op("patchmill::masked_loss_backward", mutates_args=())
def _masked_loss_backward(grad_loss: Tensor, scaled_grad: Tensor) -> Tensor:
    if active_backend(scaled_grad) == "triton":
        from patchmill.kernels.masked_loss_triton import masked_loss_backward as launch

        return launch(grad_loss, scaled_grad)
    return reference.masked_loss_backward(grad_loss, scaled_grad)


@_masked_loss_backward.register_fake
def _(grad_loss: Tensor, scaled_grad: Tensor) -> Tensor:
    return torch.empty_like(scaled_grad)


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, scaled_grad = output
    ctx.mark_non_differentiable(scaled_grad)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(scaled_grad)


def _masked_loss_gradients(ctx: Any, grad_loss: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    (scaled_grad,) = ctx.saved_tensors
    dpred = None if grad_loss is None else torch.ops.patchmill.masked_loss_backward(grad_loss, scaled_grad)
    return dpred, None, None, None, None, None, None, None, None


_masked_loss.register_autograd(_masked_loss_gradients, setup_context=_save_gradient)
register_as_data_movement(torch.ops.patchmill.masked_loss, torch.ops.patchmill.masked_loss_backward)


def masked_mse(
    pred_BMP: Tensor,
    images_u8_BHWC: Tensor,
    ids_mask_BM: Tensor,
    patch_size: int,
    mean_C: Sequence[float],
    std_C: Sequence[float],
    norm_pix: bool,
) -> Tensor:
    """Mean squared error over the masked patches (He et al. 2021; forward_loss of the published code).

    Args:
        pred_BMP: prediction of the masked patches, in the order of ids_mask and (row, column, channel) within a patch.
        images_u8_BHWC: uint8 images; the target is (byte / 255 - mean) / std.
        ids_mask_BM: int32 ids of the masked patches.
        patch_size: pixels on a side.
        mean_C, std_C: per channel, in 0..1 units.
        norm_pix: whether to normalise each target patch by its own mean and sqrt(unbiased variance + 1e-6).

    Returns:
        0-d float32 (float64 for float64 pred): the mean over the values of a patch, then over all masked patches.
        Gradient: pred, rounded once to its dtype when the incoming gradient is a power of two.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, device or memory layout, named.
    """
    return _loss(pred_BMP, images_u8_BHWC, ids_mask_BM, patch_size, mean_C, std_C, norm_pix, power=2)


def masked_l1(
    pred_BMP: Tensor,
    images_u8_BHWC: Tensor,
    ids_mask_BM: Tensor,
    patch_size: int,
    mean_C: Sequence[float],
    std_C: Sequence[float],
    norm_pix: bool,
) -> Tensor:
    """Mean absolute error over the masked patches (SimMIM's loss). As masked_mse; no error has gradient 0."""
    return _loss(pred_BMP, images_u8_BHWC, ids_mask_BM, patch_size, mean_C, std_C, norm_pix, power=1)


def _loss(
    pred_BMP: Tensor,
    images_u8_BHWC: Tensor,
    ids_mask_BM: Tensor,
    patch_size: int,
    mean_C: Sequence[float],
    std_C: Sequence[float],
    norm_pix: bool,
    power: int,
) -> Tensor:
    check_images(images_u8_BHWC, patch_size, mean_C, std_C)
    check_tensor("pred", pred_BMP, ndim=3, dtypes=FLOATS, device=images_u8_BHWC.device)
    check_ids("ids_mask", ids_mask_BM, images_u8_BHWC.shape[0], images_u8_BHWC.device)
    expected = (*ids_mask_BM.shape, patch_size * patch_size * images_u8_BHWC.shape[3])
    if pred_BMP.shape != expected:
        raise ValueError(f"pred must be {tuple(expected)} for these ids and images, got {tuple(pred_BMP.shape)}")
    if ids_mask_BM.shape[1] == 0:
        raise ValueError("ids_mask is empty: the loss needs at least one masked patch an image; raise the mask ratio")
    with_grad = torch.is_grad_enabled() and pred_BMP.requires_grad
    loss, _ = torch.ops.patchmill.masked_loss(
        pred_BMP, images_u8_BHWC, ids_mask_BM, patch_size, list(mean_C), list(std_C), norm_pix, power, with_grad
    )
    return loss
