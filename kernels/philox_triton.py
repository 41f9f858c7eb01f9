"""Draws Philox words in registers, in Triton, with the same bits as philox.py."""

# Kernel arguments have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from patchmill.kernels import philox

MULTIPLIER_0 = tl.constexpr(philox.MULTIPLIER_0)
MULTIPLIER_1 = tl.constexpr(philox.MULTIPLIER_1)
WEYL_0 = tl.constexpr(philox.WEYL_0)
WEYL_1 = tl.constexpr(philox.WEYL_1)
ROUNDS = tl.constexpr(philox.ROUNDS)


def as_int32(word: int) -> int:
    """Read a 32-bit word as a signed number: Triton then sees an i32 for every value and compiles once."""
    return (word & philox.WORD ^ 1 << 31) - (1 << 31)


@triton.jit
def philox_triton(c0, c1, c2, c3, k0, k1):
    """Encrypt uint32 counters (scalars or blocks that broadcast) under two uint32 key words; returns four words."""
    multiplier_0 = tl.full([], MULTIPLIER_0, tl.uint32)
    multiplier_1 = tl.full([], MULTIPLIER_1, tl.uint32)
    for _ in tl.static_range(ROUNDS):
        high_0, low_0 = tl.umulhi(c0, multiplier_0), c0 * multiplier_0
        high_1, low_1 = tl.umulhi(c2, multiplier_1), c2 * multiplier_1
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0 += tl.full([], WEYL_0, tl.uint32)
        k1 += tl.full([], WEYL_1, tl.uint32)
    return c0, c1, c2, c3
