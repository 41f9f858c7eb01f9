"""Adds and normalises in Triton, forward and backward. See add_norm.py and reference.py.

A warp holds whole rows in blocks that fit the width, so that sums need no barrier.
"""

# Kernel arguments have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton joins tuples with +, it does not unpack them; they start empty and grow.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment,var-annotated"

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchmill.kernels.gather_triton import least_padding

FORWARD_ROWS, BACKWARD_ROWS, ROWS_PER_PROGRAM = 8, 4, 64


@triton.jit
def row_blocks(p_x, o_r, m_r, D: tl.constexpr, BD: tl.constexpr):
    """Read rows as float32: a tuple of blocks [R, BD], 0 beyond the width."""
    blocks = ()
    for first in tl.static_range(0, D, BD):
        o_d = first + tl.arange(0, BD)
        m_rd = m_r[:, None] & (o_d < D)[None, :]
        blocks = blocks + (tl.load(p_x + o_r.to(tl.int64)[:, None] * D + o_d[None, :], mask=m_rd, other=0),)
    return blocks


@triton.jit
def add_norm_kernel(
    p_x,
    p_delta,
    p_weight,
    p_bias,
    p_sum,
    p_norm,
    p_mean,
    p_rstd,
    N,
    eps,
    D: tl.constexpr,
    BD: tl.constexpr,
    R: tl.constexpr,
):
    """Rows x = [1, 2] and delta = [1, 4] give the sum [2, 6] and the norm [-1, 1]."""
    o_r = tl.program_id(0) * R + tl.arange(0, R)
    m_r = o_r < N
    x = row_blocks(p_x, o_r, m_r, D, BD)
    delta = row_blocks(p_delta, o_r, m_r, D, BD)
    totals = ()
    b_sum = tl.zeros([R, BD], tl.float32)
    for i in tl.static_range(len(x)):
        b_rounded = (x[i].to(tl.float32) + delta[i].to(tl.float32)).to(p_sum.dtype.element_ty)
        b_sum += b_rounded.to(tl.float32)
        totals = totals + (b_rounded,)
    b_mean = tl.sum(b_sum, axis=1) / D
    b_squares = tl.zeros([R, BD], tl.float32)
    for i in tl.static_range(len(x)):
        m_d = i * BD + tl.arange(0, BD) < D
        b_centred = tl.where(m_d[None, :], totals[i].to(tl.float32) - b_mean[:, None], 0.0)
        b_squares += b_centred * b_centred
    b_rstd = 1.0 / tl.sqrt(tl.sum(b_squares, axis=1) / D + eps)
    for i in tl.static_range(len(x)):
        o_d = i * BD + tl.arange(0, BD)
        b_weight = tl.load(p_weight + o_d, mask=o_d < D, other=0).to(tl.float32)
        b_bias = tl.load(p_bias + o_d, mask=o_d < D, other=0).to(tl.float32)
        b_norm = (totals[i].to(tl.float32) - b_mean[:, None]) * b_rstd[:, None] * b_weight[None, :] + b_bias[None, :]
        o_rd = o_r.to(tl.int64)[:, None] * D + o_d[None, :]
        m_rd = m_r[:, None] & (o_d < D)[None, :]
        tl.store(p_sum + o_rd, totals[i], mask=m_rd)
        tl.store(p_norm + o_rd, b_norm.to(p_norm.dtype.element_ty), mask=m_rd)
    tl.store(p_mean + o_r, b_mean, mask=m_r)
    tl.store(p_rstd + o_r, b_rstd, mask=m_r)


@triton.jit
def add_norm_backward_kernel(
    p_grad_sum,
    p_grad_norm,
    p_total,
    p_weight,
    p_mean,
    p_rstd,
    p_dx,
    p_partial,
    N,
    D: tl.constexpr,
    BD: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
):
    """dx = grad_sum + rstd (g - mean(g) - n mean(g n)), g = grad_norm weight, n the norm before weight and bias.

    Also leaves this program's sums of grad_norm n (dweight) and of grad_norm (dbias), added over its ROWS rows.
    """
    BLOCKS: tl.constexpr = (D + BD - 1) // BD
    dweight, dbias = (), ()
    for _ in tl.static_range(BLOCKS):
        dweight, dbias = dweight + (tl.zeros([R, BD], tl.float32),), dbias + (tl.zeros([R, BD], tl.float32),)
    for first in range(tl.program_id(0) * ROWS, tl.minimum((tl.program_id(0) + 1) * ROWS, N), R):
        o_r = first + tl.arange(0, R)
        m_r = o_r < N
        totals = row_blocks(p_total, o_r, m_r, D, BD)
        grads = row_blocks(p_grad_norm, o_r, m_r, D, BD)
        b_mean = tl.load(p_mean + o_r, mask=m_r, other=0)
        b_rstd = tl.load(p_rstd + o_r, mask=m_r, other=0)
        normal, weighted, weights, biases = (), (), (), ()
        b_dot, b_sum = tl.zeros([R, BD], tl.float32), tl.zeros([R, BD], tl.float32)
        for i in tl.static_range(BLOCKS):
            o_d = i * BD + tl.arange(0, BD)
            b_weight = tl.load(p_weight + o_d, mask=o_d < D, other=0).to(tl.float32)
            b_grad = grads[i].to(tl.float32)
            b_normal = (totals[i].to(tl.float32) - b_mean[:, None]) * b_rstd[:, None]
            b_weighted = b_grad * b_weight[None, :]
            b_dot += b_weighted * b_normal
            b_sum += b_weighted
            weights, biases = weights + (dweight[i] + b_grad * b_normal,), biases + (dbias[i] + b_grad,)
            normal, weighted = normal + (b_normal,), weighted + (b_weighted,)
        dweight, dbias = weights, biases
        b_dot_mean, b_sum_mean = tl.sum(b_dot, axis=1) / D, tl.sum(b_sum, axis=1) / D
        streams = row_blocks(p_grad_sum, o_r, m_r, D, BD)
        for i in tl.static_range(BLOCKS):
            o_d = i * BD + tl.arange(0, BD)
            b_dx = weighted[i] - b_sum_mean[:, None] - normal[i] * b_dot_mean[:, None]
            b_dx = streams[i].to(tl.float32) + b_dx * b_rstd[:, None]
            o_rd = o_r.to(tl.int64)[:, None] * D + o_d[None, :]
            tl.store(p_dx + o_rd, b_dx.to(p_dx.dtype.element_ty), mask=m_r[:, None] & (o_d < D)[None, :])
    p_partial += tl.program_id(0).to(tl.int64) * 2 * D
    for i in tl.static_range(BLOCKS):
        o_d = i * BD + tl.arange(0, BD)
        tl.store(p_partial + o_d, tl.sum(dweight[i], axis=0), mask=o_d < D)
        tl.store(p_partial + D + o_d, tl.sum(dbias[i], axis=0), mask=o_d < D)


def add_norm(
    x_ND: Tensor, delta_ND: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch one program for every few rows; see reference.add_norm."""
    N, D = x_ND.shape
    total, norm = torch.empty_like(x_ND), torch.empty_like(delta_ND)
    mean, rstd = (x_ND.new_empty(N, dtype=torch.float32) for _ in range(2))
    with torch.cuda.device_of(x_ND):
        add_norm_kernel[(triton.cdiv(N, FORWARD_ROWS),)](
            p_x=x_ND,
            p_delta=delta_ND,
            p_weight=weight_D,
            p_bias=bias_D,
            p_sum=total,
            p_norm=norm,
            p_mean=mean,
            p_rstd=rstd,
            N=N,
            eps=eps,
            D=D,
            BD=least_padding(D),
            R=FORWARD_ROWS,
            num_warps=4,
        )
    return total, norm, mean, rstd


def add_norm_backward(
    grad_sum_ND: Tensor, grad_norm_ND: Tensor, total_ND: Tensor, weight_D: Tensor, mean_N: Tensor, rstd_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch one program for every 64 rows, then add their sums in order; see reference.add_norm_backward."""
    N, D = total_ND.shape
    programs = triton.cdiv(N, ROWS_PER_PROGRAM)
    dx, partial = torch.empty_like(total_ND), mean_N.new_empty(programs, 2, D)
    with torch.cuda.device_of(total_ND):
        add_norm_backward_kernel[(programs,)](
            p_grad_sum=grad_sum_ND,
            p_grad_norm=grad_norm_ND,
            p_total=total_ND,
            p_weight=weight_D,
            p_mean=mean_N,
            p_rstd=rstd_N,
            p_dx=dx,
            p_partial=partial,
            N=N,
            D=D,
            BD=least_padding(D),
            R=BACKWARD_ROWS,
            ROWS=ROWS_PER_PROGRAM,
            num_warps=4 if D <= 768 else 8,
        )
    dweight, dbias = partial.sum(0).unbind(0)
    return dx, dweight.clone(), dbias.clone()
