"""Gives the sample index at any position of an epoch as a pure function of (seed, epoch).

The order of an epoch is a function, not a list: a keyed bijection on [0, N) that each rank evaluates at the positions
it needs. Planning an epoch of a billion samples costs nothing, and resuming one needs no saved order.

The bijection is a Feistel network on Z_a x Z_b with a * b >= N and both near sqrt(N) (Black and Rogaway, "Ciphers with
arbitrary finite domains", CT-RSA 2002): each round adds a Philox word of one half to the other half. At most sqrt(N)
results are N or more; these are encrypted again until they are below N ("cycle walking"), which keeps it a bijection.
Eight rounds; each round is one counter of the `order` stream.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from patchmill.kernels.philox import STREAM_ORDER, draw_numpy

ROUNDS = 8

# The purpose of a bijection; part of the counter, which keeps their words apart.
_SAMPLES, _SHARDS, _WINDOW = 0, 1, 2

Index = NDArray[np.int64]


class EpochOrder:
    """Shuffles all samples of an epoch together; for data on local disks.

    Args:
        num_samples: N, from 1 to 2**32.
        seed: 64-bit run seed.

    Example: `EpochOrder(5, seed=0).indices(epoch=0, positions=np.arange(5))` holds 0 to 4, each once.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        self.num_samples = num_samples
        self.seed = seed

    def indices(self, epoch: int, positions: Index) -> Index:
        """Sample indices at `positions` (int64, each in [0, N)) of an epoch; int64, same shape."""
        return _permute(positions, np.full(positions.shape, self.num_samples), self.seed, epoch, _SAMPLES)


class SequentialOrder:
    """Keeps the order of the dataset in every epoch; for evaluation and debugging."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def indices(self, epoch: int, positions: Index) -> Index:
        """`positions` themselves, whatever the epoch."""
        del epoch
        return positions


class WindowOrder:
    """Shuffles shards, then the samples within windows of consecutive shards; for remote or spinning storage.

    Only `window_shards` shards are in use at a time: they can be fetched ahead and deleted afterwards. Every sample
    still comes exactly once in an epoch. Memory: three numbers a shard.

    Args:
        shard_samples: number of samples in each shard; sample indices run through the shards in order.
        seed: 64-bit run seed.
        window_shards: number of shards that are mixed with each other.
    """

    def __init__(self, shard_samples: list[int], seed: int, window_shards: int) -> None:
        if window_shards < 1:
            raise ValueError(f"data.window_shards must be at least 1, got {window_shards}")
        self.shard_samples = np.asarray(shard_samples, dtype=np.int64)
        self.shard_first = np.cumsum(self.shard_samples) - self.shard_samples
        self.num_samples = int(self.shard_samples.sum())
        self.seed = seed
        self.window_shards = window_shards
        self._layout = lru_cache(maxsize=2)(self._lay_out)  # of this epoch and of the next

    def indices(self, epoch: int, positions: Index) -> Index:
        """Sample indices at `positions` (int64, each in [0, N)) of an epoch; int64, same shape."""
        shards, slot_start, window_start = self._layout(epoch)
        window = np.searchsorted(window_start, positions, side="right") - 1
        begin, end = window_start[window], np.append(window_start, self.num_samples)[window + 1]
        place = begin + _permute(positions - begin, end - begin, self.seed, epoch, _WINDOW, window)
        slot = np.searchsorted(slot_start, place, side="right") - 1
        return self.shard_first[shards[slot]] + place - slot_start[slot]

    def shards_ahead(self, epoch: int, position: int) -> list[int]:
        """Shards of the window that contains `position`, then those of the next window, or of the next epoch."""
        shards, _, window_start = self._layout(epoch)
        first = (int(np.searchsorted(window_start, position, side="right")) - 1) * self.window_shards
        ahead = shards[first : first + 2 * self.window_shards].tolist()
        if first + self.window_shards >= len(shards):
            ahead += self._layout(epoch + 1)[0][: self.window_shards].tolist()
        return list(dict.fromkeys(ahead))

    def _lay_out(self, epoch: int) -> tuple[Index, Index, Index]:
        """Shards in the epoch's order, the position where each starts, and the position where each window starts.

        Leaves out empty shards, which have no positions: starts then increase strictly, and a search is unique.
        """
        count = len(self.shard_samples)
        shards = _permute(np.arange(count), np.full(count, count), self.seed, epoch, _SHARDS)
        shards = shards[self.shard_samples[shards] > 0]
        samples = self.shard_samples[shards]
        slot_start = np.cumsum(samples) - samples
        return shards, slot_start, slot_start[:: self.window_shards]


Order = EpochOrder | SequentialOrder | WindowOrder


def _permute(x: Index, sizes: Index, seed: int, epoch: int, purpose: int, group: Index | int = 0) -> Index:
    """Maps each x in [0, size) by the bijection of (seed, epoch, purpose, group); x, sizes int64, same shape.

    Example, sizes 5: x = 0 1 2 3 4 might give 3 0 4 2 1; sizes 1 always gives 0.
    """
    rows = np.ceil(np.sqrt(sizes)).astype(np.int64)
    columns = -(-sizes // rows)
    group = np.broadcast_to(np.asarray(group, dtype=np.int64), x.shape)
    out = _feistel(x, rows, columns, seed, epoch, purpose, group)
    outside = np.flatnonzero(out >= sizes)
    while outside.size:
        walk = (out[outside], rows[outside], columns[outside])
        out[outside] = _feistel(*walk, seed, epoch, purpose, group[outside])
        outside = outside[out[outside] >= sizes[outside]]
    return out


def _feistel(
    x: Index, rows: Index, columns: Index, seed: int, epoch: int, purpose: int, group: NDArray[np.int64]
) -> Index:
    """One pass of the network on [0, rows * columns): x = left * columns + right."""
    left, right = x // columns, x % columns
    for i in range(0, ROUNDS, 2):
        left = (left + _below(rows, right, purpose * ROUNDS + i, seed, epoch, group)) % rows
        right = (right + _below(columns, left, purpose * ROUNDS + i + 1, seed, epoch, group)) % columns
    return left * columns + right


def _below(bound: Index, half: Index, block: int, seed: int, epoch: int, group: Index) -> Index:
    """A Philox word of (block, half, epoch, group) scaled into [0, bound); bounds are <= 2**16, the bias < 2**-16."""
    word = draw_numpy(seed, STREAM_ORDER, block, half, epoch, group)[..., 0]
    return (word.astype(np.int64) * bound) >> 32
