"""Gathers patches in Triton. See gather.py and reference.py.

A program takes a tile of rows of one image: its first byte is a 64-bit offset, all arithmetic within the image is
32-bit. Loads come before the first store, since the compiler moves no load over a store.

Kernel-local names: i_ program and row numbers, o_ offsets, m_ masks, b_ values in registers, p_ pointers, capitals
sizes.
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

TILE_VALUES = 6144  # of the patches that a program holds: 8 patches of 768
THREAD_VALUES = 96


@triton.jit
def tile_rows(num_rows, R: tl.constexpr):
    """Split the first grid axis into images and tiles of R of an image's num_rows rows: image and row numbers."""
    tiles = tl.cdiv(num_rows, R)
    i_b = tl.program_id(0) // tiles
    return i_b, (tl.program_id(0) - i_b * tiles) * R + tl.arange(0, R)


@triton.jit
def patch_starts(b_ids, COLUMNS: tl.constexpr, IMAGE_ROW: tl.constexpr, PATCH: tl.constexpr, C: tl.constexpr):
    """First byte of patches within their image."""
    return (b_ids // COLUMNS) * (IMAGE_ROW * PATCH) + (b_ids % COLUMNS) * (PATCH * C)


@triton.jit
def load_patches(
    p_image, o_start, scale, bias, IMAGE_ROW: tl.constexpr, PATCH: tl.constexpr, C: tl.constexpr, BP: tl.constexpr
):
    """Read the patches that start at o_start [R] of an image as scale * byte + bias: a tuple of blocks [R, BP].

    What the last block holds beyond a patch has no meaning.
    """
    ROW: tl.constexpr = PATCH * C
    P: tl.constexpr = PATCH * ROW
    o_p = tl.arange(0, BP)
    i_channel = o_p % C
    blocks = ()
    for first in tl.static_range(0, P, BP):
        # 8 values a thread: 16 bytes would halve the loads but send every block through shared memory to be stored.
        o_image = tl.max_contiguous((o_p + first) // ROW * IMAGE_ROW + (o_p + first) % ROW, 8)
        b_bytes = tl.load(p_image + (o_start[:, None] + o_image[None, :]), mask=(o_p + first < P)[None, :], other=0)
        blocks = blocks + (b_bytes,)
    values = ()
    for i in tl.static_range(len(blocks)):
        # Value o_p of this block has channel (i_channel + i * BP) % C: one remainder serves all blocks.
        b_scale, b_bias = tl.zeros([BP], tl.float32) + scale[i * BP % C], tl.zeros([BP], tl.float32) + bias[i * BP % C]
        for c in tl.static_range(1, C):
            b_scale = tl.where(i_channel == c, scale[(c + i * BP) % C], b_scale)
            b_bias = tl.where(i_channel == c, bias[(c + i * BP) % C], b_bias)
        values = values + (blocks[i].to(tl.float32) * b_scale[None, :] + b_bias[None, :],)
    return values


@triton.jit
def gather_patches_kernel(
    p_images,
    p_ids,
    p_out,
    scale,
    bias,
    picked,
    COLUMNS: tl.constexpr,
    IMAGE_ROW: tl.constexpr,
    IMAGE_SIZE: tl.constexpr,
    PATCH: tl.constexpr,
    C: tl.constexpr,
    BP: tl.constexpr,
    R: tl.constexpr,
):
    """Bytes 0..7 as a 2 x 4 image, patch 2, ids [[1]], scale 1, bias 0 give [2, 3, 6, 7]."""
    P: tl.constexpr = PATCH * PATCH * C
    i_b, o_r = tile_rows(picked, R)
    m_r = o_r < picked
    b_ids = tl.load(p_ids + (i_b * picked + o_r), mask=m_r, other=0)
    p_image = p_images + i_b.to(tl.int64) * IMAGE_SIZE
    o_start = patch_starts(b_ids, COLUMNS, IMAGE_ROW, PATCH, C)
    values = load_patches(p_image, o_start, scale, bias, IMAGE_ROW, PATCH, C, BP)
    p_rows = p_out + i_b.to(tl.int64) * picked * P
    for i in tl.static_range(len(values)):
        o_p = i * BP + tl.arange(0, BP)
        b_out = values[i].to(p_out.dtype.element_ty)
        tl.store(p_rows + (o_r[:, None] * P + o_p[None, :]), b_out, mask=m_r[:, None] & (o_p < P)[None, :])


def channel_constants(mean_C: Sequence[float], std_C: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(byte / 255 - mean) / std as scale * byte + bias: one tuple each."""
    return tuple(1 / (255 * s) for s in std_C), tuple(-m / s for m, s in zip(mean_C, std_C, strict=True))


def image_layout(images_BHWC: Tensor, patch_size: int) -> dict[str, int]:
    """Sizes that find a patch in a batch: patches a row, bytes a row and an image, pixels on a side, channels."""
    _, height, width, channels = images_BHWC.shape
    return {
        "COLUMNS": width // patch_size,
        "IMAGE_ROW": width * channels,
        "IMAGE_SIZE": height * width * channels,
        "PATCH": patch_size,
        "C": channels,
    }


def least_padding(values: int) -> int:
    """Of the blocks of which at most eight make a row of values, the one that pads it least: 256 for 768."""
    blocks = [b for b in (16, 32, 64, 128, 256, 512, 1024) if values <= 8 * b] or [1024]
    return min(blocks, key=lambda b: (triton.cdiv(values, b) * b, -b))


def patch_tile(patch_size: int, channels: int, thread_values: int = THREAD_VALUES) -> dict[str, int]:
    """Values a block, rows and warps of a tile of patches, for at most thread_values values a thread."""
    values = patch_size * patch_size * channels
    block = least_padding(values)
    rows = max(r for r in (1, 2, 4, 8, 16) if r == 1 or r * values <= TILE_VALUES)
    threads = triton.cdiv(rows * triton.cdiv(values, block) * block, thread_values)
    return {"BP": block, "R": rows, "num_warps": min(8, triton.next_power_of_2(triton.cdiv(threads, 32)))}


def gather_patches(
    images_BHWC: Tensor,
    ids_BK: Tensor,
    patch_size: int,
    mean_C: Sequence[float],
    std_C: Sequence[float],
    out_dtype: torch.dtype,
) -> Tensor:
    """Launch one program for every few patches of an image; see reference.gather_patches."""
    channels, (batch, picked) = images_BHWC.shape[3], ids_BK.shape
    out = images_BHWC.new_empty(batch, picked, patch_size * patch_size * channels, dtype=out_dtype)
    scale, bias = channel_constants(mean_C, std_C)
    tile = patch_tile(patch_size, channels)
    with torch.cuda.device_of(images_BHWC):
        gather_patches_kernel[(batch * triton.cdiv(picked, tile["R"]),)](
            p_images=images_BHWC,
            p_ids=ids_BK,
            p_out=out,
            scale=scale,
            bias=bias,
            picked=picked,
            **image_layout(images_BHWC, patch_size),
            **tile,
        )
    return out
