"""Gathers tokens in Triton, forward and backward. See gather.py and reference.py.

The backward pass first inverts the ids, then gathers: every row of dx is written once, from its place among the ids.
"""

# Kernel arguments have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchmill.kernels.gather_triton import tile_rows

TILE_VALUES, TOKEN_COLUMNS = 4096, 256  # a warp reads 256 bf16 values of a row as 32 loads of 16 bytes
NONE = tl.constexpr(2**31 - 1)  # no place: beyond every row


@triton.jit
def gather_tokens_kernel(
    p_x,
    p_ids,
    p_pos,
    p_out,
    picked,
    N,
    D,
    num_prefix,
    HAS_POS: tl.constexpr,
    R: tl.constexpr,
    BD: tl.constexpr,
):
    """Rows [a, b, c] of one image with ids [[2, 0]] give [c, a]."""
    i_b, o_r = tile_rows(picked, R)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_r = o_r < picked
    m_rd = m_r[:, None] & (o_d < D)[None, :]
    o_x = (num_prefix + tl.load(p_ids + (i_b * picked + o_r), mask=m_r, other=0))[:, None] * D + o_d[None, :]
    b_x = tl.load(p_x + i_b.to(tl.int64) * N * D + o_x, mask=m_rd, other=0)
    if HAS_POS:
        b_pos = tl.load(p_pos + o_x, mask=m_rd, other=0)
        b_x = (b_x.to(tl.float32) + b_pos.to(tl.float32)).to(p_out.dtype.element_ty)
    tl.store(p_out + i_b.to(tl.int64) * picked * D + (o_r[:, None] * D + o_d[None, :]), b_x, mask=m_rd)


@triton.jit
def invert_ids_kernel(p_ids, p_first, p_next, p_repeats, picked, N, num_prefix, BK: tl.constexpr, BN: tl.constexpr):
    """Find the first place of every row among an image's ids, the next place of the same id, and how often one comes.

    ids [2, 0, 2] give first [1, NONE, 0], next [2, NONE, NONE] and 2 repeats. The smallest place wins, whatever the
    order of threads, so that sums over places have one order too.
    """
    i_b = tl.program_id(0)
    o_k, o_n = tl.arange(0, BK), tl.arange(0, BN)
    m_k = o_k < picked
    p_next += i_b * picked
    p_first += i_b * N
    tl.store(p_first + o_n, NONE, mask=o_n < N)
    tl.store(p_next + o_k, NONE, mask=m_k)
    p_row = p_first + num_prefix + tl.load(p_ids + (i_b * picked + o_k), mask=m_k, other=0)
    tl.debug_barrier()
    tl.atomic_min(p_row, o_k, mask=m_k, sem="relaxed")
    tl.debug_barrier()
    i_last = tl.load(p_row, mask=m_k, other=0)
    repeats = 1
    while tl.max((m_k & (i_last != o_k)).to(tl.int32), axis=0) > 0:
        m_waits = m_k & (i_last != o_k)
        tl.atomic_min(p_next + i_last, o_k, mask=m_waits, sem="relaxed")
        tl.debug_barrier()
        i_last = tl.where(m_waits, tl.load(p_next + i_last, mask=m_waits, other=0), i_last)
        repeats += 1
    tl.store(p_repeats + i_b, repeats)


@triton.jit
def gather_tokens_backward_kernel(
    p_grad, p_first, p_next, p_repeats, p_dx, picked, N, D, R: tl.constexpr, BD: tl.constexpr
):
    """Every row of dx reads the gradient from its first place and adds those of further places, in rising order.

    ids [[2, 0]] with grad [u, v] give rows [v, 0, u]; ids [[0, 0]] give [u + v, 0, 0].
    """
    i_b, o_r = tile_rows(N, R)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_r, m_d = o_r < N, o_d < D
    i_place = tl.load(p_first + (i_b * N + o_r), mask=m_r, other=NONE)
    repeats = tl.load(p_repeats + i_b)
    p_rows = p_grad + i_b.to(tl.int64) * picked * D
    m_here = (i_place < picked)[:, None] & m_d[None, :]
    b_sum = tl.load(p_rows + (i_place[:, None] * D + o_d[None, :]), mask=m_here, other=0).to(tl.float32)
    for _ in range(1, repeats):
        i_place = tl.load(p_next + (i_b * picked + i_place), mask=i_place < picked, other=NONE)
        m_here = (i_place < picked)[:, None] & m_d[None, :]
        b_sum += tl.load(p_rows + (i_place[:, None] * D + o_d[None, :]), mask=m_here, other=0).to(tl.float32)
    o_dx = o_r[:, None] * D + o_d[None, :]
    m_rd = m_r[:, None] & m_d[None, :]
    tl.store(p_dx + i_b.to(tl.int64) * N * D + o_dx, b_sum.to(p_dx.dtype.element_ty), mask=m_rd)


def column_block(width: int) -> int:
    """Columns of a tile: as many as pad the width by an eighth at most, so that a warp reads 256 where they fit."""
    return next((b for b in (TOKEN_COLUMNS, 128, 64) if triton.cdiv(width, b) * b * 8 <= width * 9), 32)


def token_tile(width: int) -> dict[str, int]:
    """Rows, columns and warps of a tile of tokens: 32 values a thread."""
    block = column_block(width)
    return {"R": TILE_VALUES // block, "BD": block, "num_warps": 4}


def token_grid(batch: int, num_rows: int, width: int) -> tuple[int, int]:
    """Programs over images and tiles of their rows, and over columns."""
    tile = token_tile(width)
    return batch * triton.cdiv(num_rows, tile["R"]), triton.cdiv(width, tile["BD"])


def gather_tokens(x_BND: Tensor, ids_BK: Tensor, pos_ND: Tensor | None, num_prefix: int) -> Tensor:
    """Launch one program for every tile of picked rows; see reference.gather_tokens."""
    (batch, picked), (_, num_rows, width) = ids_BK.shape, x_BND.shape
    out = x_BND.new_empty(batch, picked, width)
    with torch.cuda.device_of(x_BND):
        gather_tokens_kernel[token_grid(batch, picked, width)](
            p_x=x_BND,
            p_ids=ids_BK,
            p_pos=pos_ND,
            p_out=out,
            picked=picked,
            N=num_rows,
            D=width,
            num_prefix=num_prefix,
            HAS_POS=pos_ND is not None,
            **token_tile(width),
        )
    return out


def invert_ids(ids_BK: Tensor, num_rows: int, num_prefix: int) -> dict[str, Tensor]:
    """Launch one program an image: where each row is picked, as the backward pass reads it."""
    batch, picked = ids_BK.shape
    shapes = {"p_first": (batch, num_rows), "p_next": (batch, picked), "p_repeats": (batch,)}
    inverse = {name: ids_BK.new_empty(shape) for name, shape in shapes.items()}
    with torch.cuda.device_of(ids_BK):
        invert_ids_kernel[(batch,)](
            p_ids=ids_BK,
            **inverse,
            picked=picked,
            N=num_rows,
            num_prefix=num_prefix,
            BK=triton.next_power_of_2(picked),
            BN=triton.next_power_of_2(num_rows),
            num_warps=4,
        )
    return inverse


def gather_tokens_backward(grad_BKD: Tensor, ids_BK: Tensor, num_rows: int, num_prefix: int) -> Tensor:
    """Invert the ids, then launch one program for every tile of dx; see reference.gather_tokens_backward."""
    batch, picked, width = grad_BKD.shape
    dx = grad_BKD.new_empty(batch, num_rows, width)
    inverse = invert_ids(ids_BK, num_rows, num_prefix)
    with torch.cuda.device_of(grad_BKD):
        gather_tokens_backward_kernel[token_grid(batch, num_rows, width)](
            p_grad=grad_BKD,
            **inverse,
            p_dx=dx,
            picked=picked,
            N=num_rows,
            D=width,
            **token_tile(width),
        )
    return dx
