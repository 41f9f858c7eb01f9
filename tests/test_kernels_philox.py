"""Philox-4x32-10: the vectors published with Random123, and equal bits in every form."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchmill.kernels.philox import draw_numpy, philox_numpy, philox_torch, seed_key, uniform_numpy

# Random123, tests/kat_vectors: counter, key -> result of philox4x32-10.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
words = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS, ids=["zeros", "ones", "pi"])
def test_published_vectors(counter, key, expected):
    c0, c1, c2, c3 = counter
    assert tuple(int(w) for w in philox_numpy(c0, c1, c2, c3, key)) == expected
    t0, t1, t2, t3 = (torch.tensor(c) for c in counter)
    assert tuple(int(w) for w in philox_torch(t0, t1, t2, t3, key)) == expected


@settings(deadline=None)
@given(st.lists(st.tuples(words, words, words, words), min_size=1, max_size=9), words, words)
def test_torch_and_numpy_give_equal_bits(counters, k0, k1):
    c0, c1, c2, c3 = np.array(counters, dtype=np.int64).T
    expected = philox_numpy(c0, c1, c2, c3, (k0, k1))
    t0, t1, t2, t3 = torch.tensor(counters).T
    found = philox_torch(t0, t1, t2, t3, (k0, k1))
    for e, f in zip(expected, found, strict=True):
        np.testing.assert_array_equal(e.astype(np.int64), f.numpy())


def test_counters_broadcast_and_only_their_low_words_count():
    row = philox_numpy(np.arange(3), 5, 7, 0, (1, 2))
    table = philox_numpy(np.arange(3), np.array([[5], [5 + 2**32]]), 7, 0, (1, 2))
    for r, t in zip(row, table, strict=True):
        assert t.shape == (2, 3)
        np.testing.assert_array_equal(t, np.stack([r, r]))


def test_draw_is_the_documented_counter():
    seed, stream, block = 0x0123456789ABCDEF, 2, 9
    drawn = draw_numpy(seed, stream, block, np.array([4, 2**32 + 4]), epoch=3, repeats=np.array([0, 1]))
    assert drawn.dtype == np.uint32
    assert drawn.shape == (2, 4)
    for repeat in (0, 1):
        expected = philox_numpy(2 << 24 | 9, 4, 3, repeat, (0x89ABCDEF, 0x01234567))
        np.testing.assert_array_equal(drawn[repeat], np.array(expected))


def test_uniform_stays_below_one():
    assert uniform_numpy(np.array([0, 2**31, 2**32 - 1], dtype=np.uint32)).tolist() == [0.0, 0.5, 1 - 2**-32]


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_beyond_64_bits_is_refused(seed):
    with pytest.raises(ValueError, match="seed must be in"):
        seed_key(seed)
