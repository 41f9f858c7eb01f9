"""Computes the masked loss and its gradient in Triton. See masked_loss.py and reference.py.

A program holds a few whole patches, most often two a warp, so that mean, variance, error and gradient come from
registers without a barrier; it leaves one partial sum. The partial sums are added by one torch.sum, whose order is
fixed.
"""

# Kernel arguments have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton joins tuples with +, it does not unpack them; they start empty and grow.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment,var-annotated"

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchmill.kernels.gather_triton import (
    channel_constants,
    image_layout,
    load_patches,
    patch_starts,
    patch_tile,
    tile_rows,
)
from patchmill.kernels.reference import VARIANCE_EPS, gradient_exponent

EPS = tl.constexpr(VARIANCE_EPS)
SCALE_BLOCK = 2048
THREAD_VALUES = 48  # prediction and target are both at hand


@triton.jit
def inside(b_values, i, P: tl.constexpr, BP: tl.constexpr):
    """Block i of a patch with 0 beyond the patch's P values."""
    if (i + 1) * BP > P:
        b_values = tl.where((i * BP + tl.arange(0, BP) < P)[None, :], b_values, 0.0)
    return b_values


@triton.jit
def normalize(blocks, b_first, P: tl.constexpr, BP: tl.constexpr, R: tl.constexpr):
    """Subtract the mean of every patch and divide by sqrt(unbiased variance + EPS): see reference.normalize_patches.

    The mean is taken of differences from the patch's first value: those of a flat patch are exactly 0, where rounding
    errors would be multiplied by 1 / sqrt(EPS).
    """
    b_sum = tl.zeros([R, BP], tl.float32)
    shifted = ()
    for i in tl.static_range(len(blocks)):
        b_values = inside(blocks[i] - b_first[:, None], i, P, BP)
        b_sum += b_values
        shifted = shifted + (b_values,)
    b_mean = tl.sum(b_sum, axis=1) / P
    centred = ()
    b_squares = tl.zeros([R, BP], tl.float32)
    for i in tl.static_range(len(blocks)):
        b_values = inside(shifted[i] - b_mean[:, None], i, P, BP)
        b_squares += b_values * b_values
        centred = centred + (b_values,)
    b_inverse = 1.0 / tl.sqrt(tl.sum(b_squares, axis=1) / (P - 1) + EPS)
    normal = ()
    for i in tl.static_range(len(blocks)):
        normal = normal + (centred[i] * b_inverse[:, None],)
    return normal


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
    picked,
    COLUMNS: tl.constexpr,
    IMAGE_ROW: tl.constexpr,
    IMAGE_SIZE: tl.constexpr,
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
    i_b, o_r = tile_rows(picked, R)
    m_r = o_r < picked
    b_ids = tl.load(p_ids + (i_b * picked + o_r), mask=m_r, other=0)
    o_rows = i_b.to(tl.int64) * picked * P
    preds = ()
    for first in tl.static_range(0, P, BP):
        o_p = first + tl.arange(0, BP)
        m_rp = m_r[:, None] & (o_p < P)[None, :]
        preds = preds + (tl.load(p_pred + o_rows + (o_r[:, None] * P + o_p[None, :]), mask=m_rp, other=0),)
    p_image = p_images + i_b.to(tl.int64) * IMAGE_SIZE
    o_start = patch_starts(b_ids, COLUMNS, IMAGE_ROW, PATCH, C)
    targets = load_patches(p_image, o_start, scale, bias, IMAGE_ROW, PATCH, C, BP)
    if NORM_PIX:
        targets = normalize(targets, tl.load(p_image + o_start).to(tl.float32) * scale[0] + bias[0], P, BP, R)
    b_sum = tl.zeros([R, BP], tl.float32)
    for i in tl.static_range(len(targets)):
        o_p = i * BP + tl.arange(0, BP)
        b_error = inside(preds[i].to(tl.float32) - targets[i], i, P, BP)
        b_sum += b_error * b_error if POWER == 2 else tl.abs(b_error)
        if WITH_GRAD:
            b_slope = b_error
            if POWER == 1:
                b_slope = (b_error > 0).to(tl.float32) - (b_error < 0).to(tl.float32)
            b_grad = (b_slope * (POWER * grad_scale)).to(p_grad.dtype.element_ty)
            m_rp = m_r[:, None] & (o_p < P)[None, :]
            tl.store(p_grad + o_rows + (o_r[:, None] * P + o_p[None, :]), b_grad, mask=m_rp)
    b_sums = tl.where(m_r, tl.sum(b_sum, axis=1), 0.0)
    tl.store(p_partial + tl.program_id(0), tl.sum(b_sums, axis=0))


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
    """Launch one program for every few masked patches of an image, then add their sums; see reference.masked_loss."""
    batch, picked = ids_mask_BM.shape
    tile = patch_tile(patch_size, images_BHWC.shape[3], THREAD_VALUES)
    num_programs = batch * triton.cdiv(picked, tile["R"])
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
            picked=picked,
            **image_layout(images_BHWC, patch_size),
            **tile,
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
