"""prediction, images, ids_mask -> [masked loss in Triton] -> loss and gradient. See masked_loss.py and reference.py.

One program holds a whole patch at a time, so that mean, variance, error and gradient come from registers; it adds its
few patches one after another and leaves one partial sum. The partial sums are added by one torch.sum, whose order is
fixed.
"""

# Kernel arguments have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchmill.kernels.gather_triton import (
    PATCHES_PER_PROGRAM,
    channel_affine,
    channel_constants,
    image_layout,
    patch_offsets,
    patch_options,
    patch_start,
)
from patchmill.kernels.reference import VARIANCE_EPS, gradient_exponent

EPS = tl.constexpr(VARIANCE_EPS)
SCALE_BLOCK = 2048


@triton.jit
def masked_loss_kernel(
    p_pred,
    p_images,
    p_ids,
    p_partial,
    p_grad,
    scale,
    bias,
    grad_scale,
    num_patches,
    picked,
    columns,
    image_row,
    image_size,
    PATCH: tl.constexpr,
    C: tl.constexpr,
    BP: tl.constexpr,
    R: tl.constexpr,
    NORM_PIX: tl.constexpr,
    POWER: tl.constexpr,
    WITH_GRAD: tl.constexpr,
):
    """Target [0, 1, 2, 3] and pred [0, 1, 2, 1] add 4 to the partial sum (POWER 2) and write [0, 0, 0, -4] * s."""
    P: tl.constexpr = PATCH * PATCH * C
    o_p = tl.arange(0, BP)
    o_image = patch_offsets(o_p, image_row, PATCH, C)
    b_scale, b_bias = channel_affine(o_p, scale, bias, C)
    b_sum = tl.zeros([BP], tl.float32)
    m_p = o_p < P
    for r in tl.static_range(R):
        # The last program repeats the last patch, weighing 0, instead of masking: a constant mask keeps loads wide.
        i_wanted = tl.program_id(0).to(tl.int64) * R + r
        i_row = tl.minimum(i_wanted, num_patches - 1)
        weight = tl.where(i_wanted < num_patches, 1.0, 0.0)
        b_pred = tl.load(p_pred + i_row * P + o_p, mask=m_p, other=0).to(tl.float32)
        i_patch = tl.load(p_ids + i_row).to(tl.int64)
        start = patch_start(i_row // picked, i_patch, image_row, image_size, columns, PATCH, C)
        b_target = tl.load(p_images + start + o_image, mask=m_p, other=0).to(tl.float32) * b_scale + b_bias
        if NORM_PIX:
            mean = tl.sum(tl.where(m_p, b_target, 0.0), axis=0) / P
            b_target = tl.where(m_p, b_target - mean, 0.0)
            variance = tl.sum(b_target * b_target, axis=0) / (P - 1)
            b_target = b_target / tl.sqrt(variance + EPS)
        b_error = tl.where(m_p, b_pred - b_target, 0.0)
        if POWER == 2:
            b_sum += b_error * b_error * weight
            b_slope = 2.0 * b_error
        else:
            b_sum += tl.abs(b_error) * weight
            b_slope = (b_error > 0).to(tl.float32) - (b_error < 0).to(tl.float32)
        if WITH_GRAD:
            tl.store(p_grad + i_row * P + o_p, (b_slope * grad_scale).to(p_grad.dtype.element_ty), mask=m_p)
    tl.store(p_partial + tl.program_id(0), tl.sum(b_sum, axis=0))


@triton.jit
def scale_kernel(p_in, p_factor, p_out, power_of_two, num_values, BLOCK: tl.constexpr):
    """out = in * (factor * power_of_two), the factor read from the device."""
    o_v = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_v = o_v < num_values
    factor = tl.load(p_factor) * power_of_two
    b_out = tl.load(p_in + o_v, mask=m_v, other=0).to(tl.float32) * factor
    tl.store(p_out + o_v, b_out.to(p_out.dtype.element_ty), mask=m_v)


def masked_loss(
    pred_BMP: Tensor,
    images_BHWC: Tensor,
    ids_mask_BM: Tensor,
    patch_size: int,
    mean_C: Sequence[float],
    std_C: Sequence[float],
    norm_pix: bool,
    power: int,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Launch one program for every few masked patches, then add their sums; see reference.masked_loss."""
    num_programs = triton.cdiv(ids_mask_BM.numel(), PATCHES_PER_PROGRAM)
    partial = pred_BMP.new_empty(num_programs, dtype=torch.float32)
    grad = torch.empty_like(pred_BMP) if with_grad else pred_BMP.new_empty(0)
    scale, bias = channel_constants(mean_C, std_C)
    with torch.cuda.device_of(pred_BMP):
        masked_loss_kernel[(num_programs,)](
            p_pred=pred_BMP,
            p_images=images_BHWC,
            p_ids=ids_mask_BM,
            p_partial=partial,
            p_grad=grad,
            scale=scale,
            bias=bias,
            grad_scale=2.0 ** gradient_exponent(pred_BMP.numel()) / pred_BMP.numel(),
            num_patches=ids_mask_BM.numel(),
            picked=ids_mask_BM.shape[1],
            **image_layout(images_BHWC, patch_size),
            **patch_options(patch_size, images_BHWC.shape[3]),
            NORM_PIX=norm_pix,
            POWER=power,
            WITH_GRAD=with_grad,
        )
    return partial.sum() / pred_BMP.numel(), grad


def masked_loss_backward(grad_loss: Tensor, scaled_grad_BMP: Tensor) -> Tensor:
    """Launch the scaling of what the forward pass stored; see reference.masked_loss_backward."""
    dpred = torch.empty_like(scaled_grad_BMP)
    with torch.cuda.device_of(scaled_grad_BMP):
        scale_kernel[(triton.cdiv(dpred.numel(), SCALE_BLOCK),)](
            p_in=scaled_grad_BMP,
            p_factor=grad_loss,
            p_out=dpred,
            power_of_two=2.0 ** -gradient_exponent(dpred.numel()),
            num_values=dpred.numel(),
            BLOCK=SCALE_BLOCK,
            num_warps=4,
        )
    return dpred
