"""Damages samples of a packed dataset in place."""

import numpy as np


def rows_of(dataset):
    return np.load(dataset / "samples.npy")


def overwrite(dataset, sample, at, data):
    """Writes into the shard, `at` bytes after the sample's first."""
    row = rows_of(dataset)[sample]
    with sorted(dataset.glob("*.tar"))[row["shard"]].open("r+b") as file:
        file.seek(int(row["offset"]) + at)
        file.write(data)


def flip_a_bit(dataset, sample, at=300):
    """Inverts the lowest bit of one byte."""
    row = rows_of(dataset)[sample]
    shard = sorted(dataset.glob("*.tar"))[row["shard"]].read_bytes()
    overwrite(dataset, sample, at, bytes([shard[int(row["offset"]) + at] ^ 1]))
