"""Computes short attention in Triton, forward and backward. See short_attention.py and reference.py.

The keys of a head are held in two blocks that pad them little: 197 as 128 + 128, 65 as 64 + 16, 257 as 256 + 16.
"""

# Kernel arguments have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)  # exp2 is one instruction, exp is two


@triton.jit
def head_rows(p_head, first, N, stride, ROWS: tl.constexpr, D: tl.constexpr):
    """Read ROWS rows [ROWS, D] of a head, 0 beyond the last token."""
    o_n = first + tl.arange(0, ROWS)
    return tl.load(p_head + (o_n[:, None] * stride + tl.arange(0, D)[None, :]), mask=(o_n < N)[:, None], other=0)


@triton.jit
def store_rows(p_head, b_rows, first, N, stride, ROWS: tl.constexpr, D: tl.constexpr):
    """Write what head_rows reads."""
    o_n = first + tl.arange(0, ROWS)
    p_rows = p_head + (o_n[:, None] * stride + tl.arange(0, D)[None, :])
    tl.store(p_rows, b_rows.to(p_head.dtype.element_ty), mask=(o_n < N)[:, None])


@triton.jit
def scores(b_q, b_k, N, factor, FIRST: tl.constexpr, KEYS: tl.constexpr):
    """Scores [Q, KEYS] times factor, -inf beyond the last token (a first block of more than 16 keys is full)."""
    b_scores = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * factor
    if FIRST > 0 or KEYS == 16:
        b_scores = tl.where((FIRST + tl.arange(0, KEYS) < N)[None, :], b_scores, -float("inf"))
    return b_scores


@triton.jit
def short_attention_kernel(
    p_qkv,
    p_out,
    p_lse,
    N,
    H,
    scale,
    D: tl.constexpr,
    KEYS_A: tl.constexpr,
    KEYS_B: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Two tokens with equal scores give each the mean of the two values; lse is the log of the scores' summed exp."""
    groups = tl.cdiv(H, HEADS)
    i_b, i_group = tl.program_id(0) // groups, tl.program_id(0) % groups
    row = 3 * H * D
    for i_h in range(i_group * HEADS, tl.minimum((i_group + 1) * HEADS, H)):
        p_q = p_qkv + i_b.to(tl.int64) * N * row + i_h * D
        p_k, p_v = p_q + H * D, p_q + 2 * H * D
        b_ka, b_kb = head_rows(p_k, 0, N, row, KEYS_A, D), head_rows(p_k, KEYS_A, N, row, KEYS_B, D)
        b_va, b_vb = head_rows(p_v, 0, N, row, KEYS_A, D), head_rows(p_v, KEYS_A, N, row, KEYS_B, D)
        for first in range(0, N, QUERIES):
            b_q = head_rows(p_q, first, N, row, QUERIES, D)
            b_sa = scores(b_q, b_ka, N, scale * LOG2_E, 0, KEYS_A)
            b_sb = scores(b_q, b_kb, N, scale * LOG2_E, KEYS_A, KEYS_B)
            b_max = tl.maximum(tl.max(b_sa, axis=1), tl.max(b_sb, axis=1))
            b_pa, b_pb = tl.exp2(b_sa - b_max[:, None]), tl.exp2(b_sb - b_max[:, None])
            b_sum = tl.sum(b_pa, axis=1) + tl.sum(b_pb, axis=1)
            b_out = tl.dot(b_pa.to(b_va.dtype), b_va, input_precision="ieee")
            b_out = tl.dot(b_pb.to(b_vb.dtype), b_vb, b_out, input_precision="ieee") / b_sum[:, None]
            p_head = p_out + (i_b.to(tl.int64) * N * H + i_h) * D
            store_rows(p_head, b_out, first, N, H * D, QUERIES, D)
            o_n = first + tl.arange(0, QUERIES)
            b_lse = (b_max + tl.log2(b_sum)) / LOG2_E
            tl.store(p_lse + (i_b.to(tl.int64) * H + i_h) * N + o_n, b_lse, mask=o_n < N)


@triton.jit
def key_gradients(
    b_k,
    b_v,
    b_dk,
    b_dv,
    b_dq,
    b_q,
    b_do,
    b_lse,
    b_delta,
    N,
    factor,
    FIRST: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Add what these queries give the gradients of some keys and values, and what the keys give theirs."""
    b_p = tl.exp2(tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * factor - b_lse[None, :])
    if FIRST > 0 or KEYS == 16:
        b_p = tl.where((FIRST + tl.arange(0, KEYS) < N)[:, None], b_p, 0.0)
    b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
    b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
    b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)
    b_dk = tl.dot(b_ds, b_q, b_dk, input_precision="ieee")
    b_dq = tl.dot(tl.trans(b_ds), b_k, b_dq, input_precision="ieee")
    return b_dk, b_dv, b_dq


@triton.jit
def short_attention_backward_kernel(
    p_grad,
    p_qkv,
    p_out,
    p_lse,
    p_dqkv,
    N,
    H,
    scale,
    D: tl.constexpr,
    KEYS_A: tl.constexpr,
    KEYS_B: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Walk through the queries once; the gradients of keys and values stay in registers, dq is written on the way."""
    groups = tl.cdiv(H, HEADS)
    i_b, i_group = tl.program_id(0) // groups, tl.program_id(0) % groups
    row = 3 * H * D
    for i_h in range(i_group * HEADS, tl.minimum((i_group + 1) * HEADS, H)):
        o_head = i_b.to(tl.int64) * N * row + i_h * D
        p_q, p_k, p_v = p_qkv + o_head, p_qkv + o_head + H * D, p_qkv + o_head + 2 * H * D
        o_out = (i_b.to(tl.int64) * N * H + i_h) * D
        b_ka, b_kb = head_rows(p_k, 0, N, row, KEYS_A, D), head_rows(p_k, KEYS_A, N, row, KEYS_B, D)
        b_va, b_vb = head_rows(p_v, 0, N, row, KEYS_A, D), head_rows(p_v, KEYS_A, N, row, KEYS_B, D)
        b_dka, b_dkb = tl.zeros([KEYS_A, D], tl.float32), tl.zeros([KEYS_B, D], tl.float32)
        b_dva, b_dvb = tl.zeros([KEYS_A, D], tl.float32), tl.zeros([KEYS_B, D], tl.float32)
        for first in range(0, N, QUERIES):
            b_q = head_rows(p_q, first, N, row, QUERIES, D)
            b_do = head_rows(p_grad + o_out, first, N, H * D, QUERIES, D)
            b_o = head_rows(p_out + o_out, first, N, H * D, QUERIES, D)
            b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), axis=1)
            o_n = first + tl.arange(0, QUERIES)
            p_rows = p_lse + (i_b.to(tl.int64) * H + i_h) * N + o_n
            b_lse = tl.load(p_rows, mask=o_n < N, other=0) * LOG2_E
            b_dq = tl.zeros([QUERIES, D], tl.float32)
            b_dka, b_dva, b_dq = key_gradients(
                b_ka, b_va, b_dka, b_dva, b_dq, b_q, b_do, b_lse, b_delta, N, scale * LOG2_E, 0, KEYS_A
            )
            b_dkb, b_dvb, b_dq = key_gradients(
                b_kb, b_vb, b_dkb, b_dvb, b_dq, b_q, b_do, b_lse, b_delta, N, scale * LOG2_E, KEYS_A, KEYS_B
            )
            store_rows(p_dqkv + o_head, b_dq * scale, first, N, row, QUERIES, D)
        p_dk, p_dv = p_dqkv + o_head + H * D, p_dqkv + o_head + 2 * H * D
        store_rows(p_dk, b_dka * scale, 0, N, row, KEYS_A, D)
        store_rows(p_dk, b_dkb * scale, KEYS_A, N, row, KEYS_B, D)
        store_rows(p_dv, b_dva, 0, N, row, KEYS_A, D)
        store_rows(p_dv, b_dvb, KEYS_A, N, row, KEYS_B, D)


def key_blocks(num_tokens: int) -> tuple[int, int]:
    """Two blocks for the keys: the largest power of two below their number, and one for the rest."""
    first = max(16, triton.next_power_of_2(num_tokens) // 2)
    return first, max(16, triton.next_power_of_2(max(1, num_tokens - first)))


def attention_options(qkv: Tensor, is_backward: bool) -> dict[str, float]:
    """Sizes and tile of both directions: heads that fill a 128-byte line of 16-bit values, queries that fit."""
    _, N, _, H, d = qkv.shape
    keys_a, keys_b = key_blocks(N)
    queries, warps = 64, 4
    if is_backward:
        queries, warps = (16 if keys_a * d > 4096 else 32), (8 if keys_a >= 128 else 4)
    sizes = {"N": N, "H": H, "scale": d**-0.5, "D": d, "KEYS_A": keys_a, "KEYS_B": keys_b}
    return {**sizes, "QUERIES": queries, "HEADS": 64 // d, "num_warps": warps, "num_stages": 1}


def attention_grid(qkv: Tensor) -> tuple[int]:
    """Programs over images and groups of heads."""
    B, _, _, H, d = qkv.shape
    return (B * triton.cdiv(H, 64 // d),)


def short_attention(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """Launch one program for some heads of an image; see reference.short_attention."""
    B, N, _, H, d = qkv.shape
    out, lse = qkv.new_empty(B, N, H, d), qkv.new_empty(B, H, N, dtype=torch.float32)
    with torch.cuda.device_of(qkv):
        short_attention_kernel[attention_grid(qkv)](p_qkv=qkv, p_out=out, p_lse=lse, **attention_options(qkv, False))
    return out, lse


def short_attention_backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """Launch one program for some heads of an image; see reference.short_attention_backward."""
    dqkv = torch.empty_like(qkv)
    with torch.cuda.device_of(qkv):
        short_attention_backward_kernel[attention_grid(qkv)](
            p_grad=grad, p_qkv=qkv, p_out=out, p_lse=lse, p_dqkv=dqkv, **attention_options(qkv, True)
        )
    return dqkv
