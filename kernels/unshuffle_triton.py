"""Unshuffles tokens in Triton, forward and backward. See unshuffle.py and reference.py.

A program owns a tile of token rows and columns and takes it from a few images, whose loads all come before the first
store; the tile's positions are read once for all of them.
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

from patchmill.kernels.tokens_triton import column_block

TILE_VALUES, TILE_IMAGES = 1024, 8  # 8 values a thread, of eight images at once


@triton.jit
def token_rows(p_ids_restore, i_b, o_j, m_j, B, K, L, num_prefix):
    """Find for each decoder row of image i_b whether it holds an encoder token, and in which row of its tokens."""
    is_prefix = o_j < num_prefix
    m_j = m_j & (i_b < B)
    b_place = tl.load(p_ids_restore + i_b * L + (o_j - num_prefix), mask=m_j & (o_j >= num_prefix), other=0)
    return m_j & (is_prefix | (b_place < K)), tl.where(is_prefix, o_j, num_prefix + b_place)


@triton.jit
def unshuffle_kernel(
    p_x,
    p_mask_token,
    p_pos,
    p_ids_restore,
    p_out,
    B,
    K,
    L,
    E,
    num_prefix,
    R: tl.constexpr,
    BE: tl.constexpr,
    IMAGES: tl.constexpr,
):
    """Tokens [c, k], one of them a prefix, ids_restore [1, 0, 2] and mask token m give [c, m, k, m], plus positions."""
    N_in, N_out = num_prefix + K, num_prefix + L
    o_j = tl.program_id(0) * R + tl.arange(0, R)
    o_e = tl.program_id(1) * BE + tl.arange(0, BE)
    m_j, m_e = o_j < N_out, o_e < E
    m_je = m_j[:, None] & m_e[None, :]
    o_je = o_j[:, None] * E + o_e[None, :]
    i_first = tl.program_id(2) * IMAGES
    loaded = ()
    for i in tl.static_range(IMAGES):
        is_token, i_token = token_rows(p_ids_restore, i_first + i, o_j, m_j, B, K, L, num_prefix)
        p_tokens = p_x + (i_first + i).to(tl.int64) * N_in * E
        m_x = is_token[:, None] & m_e[None, :]
        loaded = loaded + ((is_token, tl.load(p_tokens + (i_token[:, None] * E + o_e[None, :]), mask=m_x, other=0)),)
    b_pos = tl.load(p_pos + o_je, mask=m_je, other=0).to(tl.float32)
    b_masked = b_pos + tl.load(p_mask_token + o_e, mask=m_e, other=0).to(tl.float32)[None, :]
    for i in tl.static_range(IMAGES):
        is_token, b_x = loaded[i]
        b_out = tl.where(is_token[:, None], b_x.to(tl.float32) + b_pos, b_masked)
        p_rows = p_out + (i_first + i).to(tl.int64) * N_out * E
        tl.store(p_rows + o_je, b_out.to(p_out.dtype.element_ty), mask=m_je & (i_first + i < B))


@triton.jit
def unshuffle_backward_kernel(
    p_grad,
    p_ids_restore,
    p_dx,
    p_partial,
    B,
    K,
    L,
    E,
    num_prefix,
    R: tl.constexpr,
    BE: tl.constexpr,
    IMAGES: tl.constexpr,
):
    """Grad [s, t, u, v] of the example above gives dx [s, u] and a mask token's share of t + v."""
    N_in, N_out = num_prefix + K, num_prefix + L
    o_j = tl.program_id(0) * R + tl.arange(0, R)
    o_e = tl.program_id(1) * BE + tl.arange(0, BE)
    m_j, m_e = o_j < N_out, o_e < E
    m_je = m_j[:, None] & m_e[None, :]
    i_first = tl.program_id(2) * IMAGES
    loaded = ()
    for i in tl.static_range(IMAGES):
        p_rows = p_grad + (i_first + i).to(tl.int64) * N_out * E
        b_grad = tl.load(p_rows + (o_j[:, None] * E + o_e[None, :]), mask=m_je & (i_first + i < B), other=0)
        loaded = loaded + (token_rows(p_ids_restore, i_first + i, o_j, m_j, B, K, L, num_prefix) + (b_grad,),)
    b_sum = tl.zeros([R, BE], tl.float32)
    for i in tl.static_range(IMAGES):
        is_token, i_token, b_grad = loaded[i]
        p_tokens = p_dx + (i_first + i).to(tl.int64) * N_in * E
        tl.store(p_tokens + (i_token[:, None] * E + o_e[None, :]), b_grad, mask=is_token[:, None] & m_e[None, :])
        b_sum += tl.where(is_token[:, None], 0.0, b_grad.to(tl.float32))
    i_partial = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    tl.store(p_partial + i_partial.to(tl.int64) * E + o_e, tl.sum(b_sum, axis=0), mask=m_e)


def tile_options(batch: int, width: int) -> dict[str, int]:
    """Tile of both directions: rows, columns, images and warps."""
    block, images = column_block(width), min(TILE_IMAGES, triton.next_power_of_2(batch))
    return {"R": TILE_VALUES // block, "BE": block, "IMAGES": images, "num_warps": 4}


def tile_grid(batch: int, num_rows: int, width: int) -> tuple[int, int, int]:
    """Programs over token rows, columns and groups of images."""
    tile = tile_options(batch, width)
    return triton.cdiv(num_rows, tile["R"]), triton.cdiv(width, tile["BE"]), triton.cdiv(batch, tile["IMAGES"])


def unshuffle(x_BNE: Tensor, mask_token_E: Tensor, pos: Tensor, ids_restore_BL: Tensor, num_prefix: int) -> Tensor:
    """Launch the forward pass; see reference.unshuffle."""
    batch, num_tokens, width = x_BNE.shape
    out = x_BNE.new_empty(batch, pos.shape[0], width)
    with torch.cuda.device_of(x_BNE):
        unshuffle_kernel[tile_grid(batch, pos.shape[0], width)](
            p_x=x_BNE,
            p_mask_token=mask_token_E,
            p_pos=pos,
            p_ids_restore=ids_restore_BL,
            p_out=out,
            B=batch,
            K=num_tokens - num_prefix,
            L=ids_restore_BL.shape[1],
            E=width,
            num_prefix=num_prefix,
            **tile_options(batch, width),
        )
    return out


def unshuffle_backward(
    grad_BNE: Tensor, ids_restore_BL: Tensor, num_keep: int, num_prefix: int
) -> tuple[Tensor, Tensor]:
    """Launch the backward pass, then add the programs' shares of dmask_token in their order; see reference."""
    batch, num_rows, width = grad_BNE.shape
    grid = tile_grid(batch, num_rows, width)
    dx = grad_BNE.new_empty(batch, num_prefix + num_keep, width)
    partial = grad_BNE.new_empty(grid[0] * grid[2], width, dtype=torch.float32)
    with torch.cuda.device_of(grad_BNE):
        unshuffle_backward_kernel[grid](
            p_grad=grad_BNE,
            p_ids_restore=ids_restore_BL,
            p_dx=dx,
            p_partial=partial,
            B=batch,
            K=num_keep,
            L=ids_restore_BL.shape[1],
            E=width,
            num_prefix=num_prefix,
            **tile_options(batch, width),
        )
    return dx, partial.sum(0)
