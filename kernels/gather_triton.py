"""images or tokens, ids -> [gather in Triton] -> patches or tokens. See gather.py for the operators and reference.py.

Kernel-local names: i_ program and row numbers, o_ offsets, m_ masks, b_ values in registers, p_ pointers, capitals
sizes.
"""

# Kernel arguments have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

PATCHES_PER_PROGRAM = 4  # offsets and channel constants are made once for so many patches
TOKEN_ROWS, TOKEN_COLUMNS = 16, 256  # a warp reads 256 bf16 values of a row as 32 loads of 16 bytes


@triton.jit
def patch_offsets(o_p, image_row, PATCH: tl.constexpr, C: tl.constexpr):
    """Byte offsets of a patch's values, in the order (row, column, channel), from the patch's first byte."""
    return (o_p // (PATCH * C)) * image_row + o_p % (PATCH * C)


@triton.jit
def patch_start(i_b, i_patch, image_row, image_size, columns, PATCH: tl.constexpr, C: tl.constexpr):
    """First byte of patch i_patch of image i_b (both int64)."""
    return i_b * image_size + (i_patch // columns) * image_row * PATCH + (i_patch % columns) * (PATCH * C)


@triton.jit
def channel_affine(o_p, scale, bias, C: tl.constexpr):
    """Spread per-channel scales and biases (tuples of C floats) over the values of a patch."""
    b_scale = tl.zeros(o_p.shape, tl.float32)
    b_bias = tl.zeros(o_p.shape, tl.float32)
    for c in tl.static_range(C):
        b_scale = tl.where(o_p % C == c, scale[c], b_scale)
        b_bias = tl.where(o_p % C == c, bias[c], b_bias)
    return b_scale, b_bias


@triton.jit
def gather_patches_kernel(
    p_images,
    p_ids,
    p_out,
    scale,
    bias,
    num_patches,
    picked,
    columns,
    image_row,
    image_size,
    PATCH: tl.constexpr,
    C: tl.constexpr,
    BP: tl.constexpr,
    R: tl.constexpr,
):
    """Bytes 0..7 as a 2 x 4 image, patch 2, ids [[1]], scale 1, bias 0 give [2, 3, 6, 7]."""
    P: tl.constexpr = PATCH * PATCH * C
    o_p = tl.arange(0, BP)
    o_image = patch_offsets(o_p, image_row, PATCH, C)
    b_scale, b_bias = channel_affine(o_p, scale, bias, C)
    m_p = o_p < P
    for r in tl.static_range(R):
        # The last program repeats the last patch instead of masking: a constant mask keeps the loads wide.
        i_row = tl.minimum(tl.program_id(0).to(tl.int64) * R + r, num_patches - 1)
        i_patch = tl.load(p_ids + i_row).to(tl.int64)
        start = patch_start(i_row // picked, i_patch, image_row, image_size, columns, PATCH, C)
        b_bytes = tl.load(p_images + start + o_image, mask=m_p, other=0).to(tl.float32)
        b_out = b_bytes * b_scale + b_bias
        tl.store(p_out + i_row * P + o_p, b_out.to(p_out.dtype.element_ty), mask=m_p)


@triton.jit
def gather_tokens_kernel(
    p_x,
    p_ids,
    p_pos,
    p_out,
    num_rows,
    picked,
    N,
    D,
    num_prefix,
    HAS_POS: tl.constexpr,
    R: tl.constexpr,
    BD: tl.constexpr,
):
    """Rows [a, b, c] of one image with ids [[2, 0]] give [c, a]."""
    o_r = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_rd = (o_r < num_rows)[:, None] & (o_d < D)[None, :]
    i_token = num_prefix + tl.load(p_ids + o_r, mask=o_r < num_rows, other=0).to(tl.int64)
    o_x = (o_r // picked * N + i_token) * D
    b_x = tl.load(p_x + o_x[:, None] + o_d[None, :], mask=m_rd, other=0)
    if HAS_POS:
        b_pos = tl.load(p_pos + (i_token * D)[:, None] + o_d[None, :], mask=m_rd, other=0)
        b_x = (b_x.to(tl.float32) + b_pos.to(tl.float32)).to(p_out.dtype.element_ty)
    tl.store(p_out + (o_r * D)[:, None] + o_d[None, :], b_x, mask=m_rd)


@triton.jit
def gather_tokens_backward_kernel(
    p_grad,
    p_ids,
    p_dx,
    num_rows,
    picked,
    N,
    D,
    num_prefix,
    R: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    """Every row of dx looks for its id among those of its image and adds what it finds in rising order: no atomics.

    ids [[2, 0]] with grad [u, v] give rows [v, 0, u]; ids [[0, 0]] give [u + v, 0, 0].
    """
    o_r = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    o_d = tl.arange(0, BD)
    o_k = tl.arange(0, BK)
    i_b = o_r // N
    m_rk = (o_r < num_rows)[:, None] & (o_k < picked)[None, :]
    b_ids = tl.load(p_ids + (i_b * picked)[:, None] + o_k[None, :], mask=m_rk, other=-1)
    is_here = m_rk & (b_ids == (o_r % N - num_prefix)[:, None])
    b_sum = tl.zeros([R, BD], tl.float32)
    i_k = tl.full([R], -1, tl.int32)
    for _ in range(tl.max(tl.sum(is_here.to(tl.int32), axis=1), axis=0)):
        i_k = tl.min(tl.where(is_here & (o_k[None, :] > i_k[:, None]), o_k[None, :], BK), axis=1)
        o_grad = (i_b * picked + i_k) * D
        m_rd = (i_k < BK)[:, None] & (o_d < D)[None, :]
        b_sum += tl.load(p_grad + o_grad[:, None] + o_d[None, :], mask=m_rd, other=0).to(tl.float32)
    m_out = (o_r < num_rows)[:, None] & (o_d < D)[None, :]
    tl.store(p_dx + (o_r * D)[:, None] + o_d[None, :], b_sum.to(p_dx.dtype.element_ty), mask=m_out)


def channel_constants(mean_C: Sequence[float], std_C: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(byte / 255 - mean) / std as scale * byte + bias: one tuple each."""
    return tuple(1 / (255 * s) for s in std_C), tuple(-m / s for m, s in zip(mean_C, std_C, strict=True))


def image_layout(images_BHWC: Tensor, patch_size: int) -> dict[str, int]:
    """Sizes that find a patch in a batch: patches a row, bytes a row and bytes an image."""
    _, height, width, channels = images_BHWC.shape
    return {
        "columns": width // patch_size,
        "image_row": width * channels,
        "image_size": height * width * channels,
    }


def patch_options(patch_size: int, channels: int) -> dict[str, int]:
    """Block size and warps for a patch: 8 values a thread, one 16-byte word of bfloat16."""
    block = max(32, triton.next_power_of_2(patch_size * patch_size * channels))
    return {
        "PATCH": patch_size,
        "C": channels,
        "BP": block,
        "R": PATCHES_PER_PROGRAM,
        "num_warps": min(8, max(1, block // 256)),
    }


def gather_patches(
    images_BHWC: Tensor,
    ids_BK: Tensor,
    patch_size: int,
    mean_C: Sequence[float],
    std_C: Sequence[float],
    out_dtype: torch.dtype,
) -> Tensor:
    """Launch one program for every few patches; see reference.gather_patches."""
    channels = images_BHWC.shape[3]
    out = images_BHWC.new_empty(*ids_BK.shape, patch_size * patch_size * channels, dtype=out_dtype)
    scale, bias = channel_constants(mean_C, std_C)
    with torch.cuda.device_of(images_BHWC):
        gather_patches_kernel[(triton.cdiv(ids_BK.numel(), PATCHES_PER_PROGRAM),)](
            p_images=images_BHWC,
            p_ids=ids_BK,
            p_out=out,
            scale=scale,
            bias=bias,
            num_patches=ids_BK.numel(),
            picked=ids_BK.shape[1],
            **image_layout(images_BHWC, patch_size),
            **patch_options(patch_size, channels),
        )
    return out


def gather_tokens(x_BND: Tensor, ids_BK: Tensor, pos_ND: Tensor | None, num_prefix: int) -> Tensor:
    """Launch one program for every tile of picked rows; see reference.gather_tokens."""
    _, num_rows, width = x_BND.shape
    out = x_BND.new_empty(*ids_BK.shape, width)
    block = min(TOKEN_COLUMNS, triton.next_power_of_2(width))
    with torch.cuda.device_of(x_BND):
        gather_tokens_kernel[(triton.cdiv(ids_BK.numel(), TOKEN_ROWS), triton.cdiv(width, block))](
            p_x=x_BND,
            p_ids=ids_BK,
            p_pos=pos_ND,
            p_out=out,
            num_rows=ids_BK.numel(),
            picked=ids_BK.shape[1],
            N=num_rows,
            D=width,
            num_prefix=num_prefix,
            HAS_POS=pos_ND is not None,
            R=TOKEN_ROWS,
            BD=block,
            num_warps=4,
        )
    return out


def backward_options(picked: int, width: int) -> dict[str, int]:
    """Tile of the backward pass: whole rows, as many as fit in registers beside the ids of their images."""
    block_k, block_d = triton.next_power_of_2(picked), triton.next_power_of_2(width)
    rows = max(1, min(8, 4096 // block_d, 1024 // block_k))
    return {"R": rows, "BK": block_k, "BD": block_d, "num_warps": 4}


def gather_tokens_backward(grad_BKD: Tensor, ids_BK: Tensor, num_rows: int, num_prefix: int) -> Tensor:
    """Launch one program for every few rows of dx; see reference.gather_tokens_backward."""
    batch, picked, width = grad_BKD.shape
    dx = grad_BKD.new_empty(batch, num_rows, width)
    options = backward_options(picked, width)
    with torch.cuda.device_of(grad_BKD):
        gather_tokens_backward_kernel[(triton.cdiv(batch * num_rows, options["R"]),)](
            p_grad=grad_BKD,
            p_ids=ids_BK,
            p_dx=dx,
            num_rows=batch * num_rows,
            picked=picked,
            N=num_rows,
            D=width,
            num_prefix=num_prefix,
            **options,
        )
    return dx
