"""Draws the order of patches in Triton: one program draws, sorts, splits and inverts the order of an image.

The keys never leave registers. See permute.py for the operator and reference.mask_keys for the keys' layout.
"""

# Kernel arguments have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchmill.kernels.philox import STREAM_MASK as MASK
from patchmill.kernels.philox import Key
from patchmill.kernels.philox_triton import as_int32, philox_triton
from patchmill.kernels.reference import LARGE_ID_BITS, SMALL_ID_BITS, SMALL_KEY_PATCHES

STREAM_MASK = tl.constexpr(MASK)
SMALL_PATCHES = tl.constexpr(SMALL_KEY_PATCHES)
SMALL_BITS = tl.constexpr(SMALL_ID_BITS)
LARGE_BITS = tl.constexpr(LARGE_ID_BITS)
SMALL_IDS = tl.constexpr((1 << SMALL_ID_BITS) - 1)
LARGE_IDS = tl.constexpr((1 << LARGE_ID_BITS) - 1)


@triton.jit(do_not_specialize=["key_0", "key_1", "epoch"])
def mask_indices_kernel(
    p_sample_ids,
    p_repeats,
    p_ids_keep,
    p_ids_mask,
    p_ids_restore,
    key_0,
    key_1,
    epoch,
    L: tl.constexpr,
    K: tl.constexpr,
    BL: tl.constexpr,
    HAS_REPEATS: tl.constexpr,
):
    """Keys 30, 10, 20, 40 with K = 1 give ids_keep [1], ids_mask [2, 0, 3] and ids_restore [2, 0, 1, 3]."""
    i_b = tl.program_id(0).to(tl.int64)
    sample = tl.load(p_sample_ids + i_b).to(tl.uint32)
    repeat = tl.full([], 0, tl.uint32)
    if HAS_REPEATS:
        repeat = tl.load(p_repeats + i_b).to(tl.uint32)
    o_block = tl.arange(0, BL // 4).to(tl.uint32)
    zeros = o_block * 0
    w0, w1, w2, w3 = philox_triton(
        o_block | (STREAM_MASK << 24),
        zeros + sample,
        zeros + epoch.to(tl.uint32),
        zeros + repeat,
        key_0.to(tl.uint32),
        key_1.to(tl.uint32),
    )
    # The last dimension of a join is the fastest: the words come out as w0, w1, w2, w3 of block 0, then of block 1, ...
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BL])

    o_l = tl.arange(0, BL)
    if L <= SMALL_PATCHES:
        keys = ((words >> SMALL_BITS << SMALL_BITS) | o_l.to(tl.uint32)).to(tl.int32, bitcast=True)
        # Padding is the largest key there is; no patch has it, since padding exists only where ids stay below 255.
        keys = tl.where(o_l < L, keys, 0x7FFFFFFF)
        order = tl.sort(keys) & SMALL_IDS
    else:
        keys = (words.to(tl.int64) << LARGE_BITS) | o_l
        keys = tl.where(o_l < L, keys, 1 << 62)
        order = (tl.sort(keys) & LARGE_IDS).to(tl.int32)

    tl.store(p_ids_keep + i_b * K + o_l, order, mask=o_l < K)
    tl.store(p_ids_mask + i_b * (L - K) + (o_l - K), order, mask=(o_l >= K) & (o_l < L))
    tl.store(p_ids_restore + i_b * L + order, o_l, mask=o_l < L)


def mask_indices(
    sample_ids_B: Tensor, repeats_B: Tensor | None, key: Key, epoch: int, num_patches: int, num_keep: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch one program per image; see reference.mask_indices."""
    batch = sample_ids_B.shape[0]
    ids_keep, ids_mask, ids_restore = (
        sample_ids_B.new_empty(batch, size, dtype=torch.int32)
        for size in (num_keep, num_patches - num_keep, num_patches)
    )
    with torch.cuda.device_of(sample_ids_B):
        mask_indices_kernel[(batch,)](
            p_sample_ids=sample_ids_B,
            p_repeats=repeats_B,
            p_ids_keep=ids_keep,
            p_ids_mask=ids_mask,
            p_ids_restore=ids_restore,
            key_0=as_int32(key[0]),
            key_1=as_int32(key[1]),
            epoch=as_int32(epoch),
            **launch_options(num_patches, num_keep, repeats_B is not None),
        )
    return ids_keep, ids_mask, ids_restore


def launch_options(num_patches: int, num_keep: int, has_repeats: bool) -> dict[str, int | bool]:
    """Block size and warps for a number of patches: 8 keys a thread up to 1,024 of them, 16 beyond."""
    block = max(16, triton.next_power_of_2(num_patches))
    num_warps = min(8, max(1, block // 256))
    return {"L": num_patches, "K": num_keep, "BL": block, "HAS_REPEATS": has_repeats, "num_warps": num_warps}
