"""Draws random words as a pure function of seed and counters (Philox-4x32-10): crops, flips, masks, epoch order.

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) is a keyed bijection on 128-bit
counters. It has no state: the four words of counter (c0, c1, c2, c3) under a key are the same wherever and whenever
they are computed. Everything random about a sample is therefore a pure function of where it stands:

    c0 = stream << 24 | block      which decision, and which group of four words of it
    c1 = sample index              low 32 bits
    c2 = epoch
    c3 = repeat                    for repeated augmentation; else 0
    key = (seed & 0xffffffff, seed >> 32)

The NumPy form here, the torch form here and the Triton form in philox_triton.py give equal bits; tests hold all
three to the vectors published with Random123.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

STREAM_CROP, STREAM_FLIP, STREAM_MASK, STREAM_COLOUR, STREAM_REPLACE, STREAM_ORDER = range(6)

# Multipliers and Weyl increments of Philox-4x32, from the paper.
MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
WORD = 0xFFFFFFFF

Key = tuple[int, int]
Words = tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.uint32], NDArray[np.uint32]]


def seed_key(seed: int) -> Key:
    """Split a 64-bit seed into the two key words, low word first.

    Raises:
        ValueError: the seed is negative or does not fit 64 bits.
    """
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be in [0, 2**64), got {seed}")
    return seed & WORD, seed >> 32


def philox_numpy(c0: ArrayLike, c1: ArrayLike, c2: ArrayLike, c3: ArrayLike, key: Key) -> Words:
    """Encrypt counters with Philox-4x32-10.

    Args:
        c0, c1, c2, c3: integers or integer arrays that broadcast together; their low 32 bits count.
        key: two 32-bit words.

    Returns:
        Four uint32 arrays of the broadcast shape.
    """
    word, shift = np.uint64(WORD), np.uint64(32)
    counters = [np.asarray(c).astype(np.uint64) & word for c in np.broadcast_arrays(c0, c1, c2, c3)]
    x0, x1, x2, x3 = counters
    k0, k1 = key
    for _ in range(ROUNDS):
        product_0, product_1 = x0 * np.uint64(MULTIPLIER_0), x2 * np.uint64(MULTIPLIER_1)
        x0, x1, x2, x3 = (
            (product_1 >> shift) ^ x1 ^ np.uint64(k0),
            product_1 & word,
            (product_0 >> shift) ^ x3 ^ np.uint64(k1),
            product_0 & word,
        )
        k0, k1 = (k0 + WEYL_0) & WORD, (k1 + WEYL_1) & WORD
    return x0.astype(np.uint32), x1.astype(np.uint32), x2.astype(np.uint32), x3.astype(np.uint32)


def philox_torch(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, key: Key) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Encrypt counters with Philox-4x32-10 on any device.

    Args:
        c0, c1, c2, c3: int64 tensors that broadcast together; their low 32 bits count.
        key: two 32-bit words.

    Returns:
        Four int64 tensors that hold 32-bit values in [0, 2**32); their shapes broadcast to the counters' shape.
    """
    # An int64 product wraps modulo 2**64, so its bits are those of the unsigned product; the masks undo the sign.
    x0, x1, x2, x3 = c0 & WORD, c1 & WORD, c2 & WORD, c3 & WORD
    k0, k1 = key
    for _ in range(ROUNDS):
        product_0, product_1 = x0 * MULTIPLIER_0, x2 * MULTIPLIER_1
        x0, x1, x2, x3 = (
            ((product_1 >> 32) & WORD) ^ x1 ^ k0,
            product_1 & WORD,
            ((product_0 >> 32) & WORD) ^ x3 ^ k1,
            product_0 & WORD,
        )
        k0, k1 = (k0 + WEYL_0) & WORD, (k1 + WEYL_1) & WORD
    return x0, x1, x2, x3


def draw_numpy(
    seed: int, stream: int, block: ArrayLike, sample_ids: ArrayLike, epoch: int, repeats: ArrayLike = 0
) -> NDArray[np.uint32]:
    """Draw the four words of each (stream, block, sample, epoch, repeat).

    Args:
        seed: 64-bit run seed.
        stream: one of the STREAM_ constants.
        block: which group of four words, below 2**24; broadcasts with the samples.
        sample_ids: sample indices; the low 32 bits count.
        epoch: epoch number.
        repeats: repeat numbers of repeated augmentation.

    Returns:
        uint32 `[..., 4]`, where `...` is the broadcast shape of block, sample_ids and repeats.
    """
    c0 = np.asarray(block, dtype=np.int64) | (stream << 24)
    words = philox_numpy(c0, sample_ids, epoch, repeats, seed_key(seed))
    return np.stack(words, axis=-1)


def uniform_numpy(words_u32: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Turn words into float64 in [0, 1): exact, since a float64 holds every multiple of 2**-32 there."""
    return words_u32.astype(np.float64) * 2.0**-32
