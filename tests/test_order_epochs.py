"""Epoch order: a bijection for every N, different in every epoch, at no cost for each sample."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchmill.pipeline.plan.order import EpochOrder, SequentialOrder, WindowOrder

SEEDS = st.integers(0, 2**64 - 1)


@settings(max_examples=60, deadline=None)
@given(num_samples=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 2**32 - 1))
def test_every_sample_comes_once(num_samples, seed, epoch):
    indices = EpochOrder(num_samples, seed).indices(epoch, np.arange(num_samples))
    np.testing.assert_array_equal(np.sort(indices), np.arange(num_samples))


@pytest.mark.parametrize("num_samples", [2**31 + 11, 2**32])
def test_a_billion_samples_need_no_list(num_samples):
    positions = np.concatenate([np.arange(5000), np.arange(num_samples - 5000, num_samples)])
    indices = EpochOrder(num_samples, seed=1).indices(0, positions)
    assert len(np.unique(indices)) == len(positions)
    assert indices.min() >= 0
    assert indices.max() < num_samples
    assert abs(indices.mean() / num_samples - 0.5) < 0.02  # 10,000 uniform draws: standard error 0.003


def test_order_depends_on_seed_and_epoch_and_on_nothing_else():
    positions = np.arange(1000)
    first = EpochOrder(1000, seed=7).indices(0, positions)
    np.testing.assert_array_equal(first, EpochOrder(1000, seed=7).indices(0, positions))
    np.testing.assert_array_equal(first[300:310], EpochOrder(1000, seed=7).indices(0, positions[300:310]))
    for other in (EpochOrder(1000, 7).indices(1, positions), EpochOrder(1000, 8).indices(0, positions), positions):
        assert (first == other).sum() < 10  # one match is expected of two random orders


def test_each_sample_falls_uniformly_over_the_epoch():
    """Position of sample 3 over 4,000 epochs in 20 bins: chi-square with 19 degrees of freedom, p > 1e-6."""
    order = EpochOrder(100, seed=5)
    place = np.array([np.flatnonzero(order.indices(e, np.arange(100)) == 3)[0] for e in range(4000)])
    counts = np.bincount(place // 5, minlength=20)
    assert ((counts - 200) ** 2 / 200).sum() < 66


@settings(max_examples=40, deadline=None)
@given(
    shards=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(sum),
    window=st.integers(1, 5),
    seed=SEEDS,
    epoch=st.integers(0, 5),
)
def test_window_shuffle_reads_few_shards_at_a_time(shards, window, seed, epoch):
    order = WindowOrder(shards, seed, window)
    total = sum(shards)
    indices = order.indices(epoch, np.arange(total))
    np.testing.assert_array_equal(np.sort(indices), np.arange(total))
    shard_of = np.repeat(np.arange(len(shards)), shards)[indices]
    visited = list(dict.fromkeys(shard_of.tolist()))
    for position in range(total):
        ahead = order.shards_ahead(epoch, position)
        assert shard_of[position] in ahead[:window]
        assert len(set(ahead)) == len(ahead) <= 2 * window
    for start in range(0, len(visited), window):  # a window's shards are done before the next window's begin
        group = visited[start : start + window]
        places = np.flatnonzero(np.isin(shard_of, group))
        assert places[-1] - places[0] + 1 == len(places)


def test_window_shuffle_mixes_shards_and_differs_between_epochs():
    order = WindowOrder([50] * 8, seed=1, window_shards=4)
    first, second = (order.indices(epoch, np.arange(400)) for epoch in (0, 1))
    assert (first == second).sum() < 10
    assert len(set((first[:50] // 50).tolist())) == 4
    np.testing.assert_array_equal(first, order.indices(0, np.arange(400)))  # going back to an earlier epoch


def test_sequential_order_is_the_stored_one():
    np.testing.assert_array_equal(SequentialOrder(10).indices(3, np.array([4, 2])), [4, 2])


def test_window_of_no_shard_is_refused():
    with pytest.raises(ValueError, match="window_shards"):
        WindowOrder([3], 0, 0)
