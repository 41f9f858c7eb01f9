"""Splits a listing into datasets such as train and val, with one list of classes.

Splits are either names of the source's top folders (`train`, `val`), or shares (`train:0.9`, `val:0.1`). Shares are
drawn by the hash of each name: an image keeps its split when others are added or removed, with any seed.
"""

import numpy as np

from patchmill.tools.packing.listing import Listing, common_folder
from patchmill.tools.packing.plan import shuffle_keys


def split_listing(listing: Listing, splits: tuple[str, ...]) -> dict[str, Listing]:
    """Split name -> its part of the listing, classes shared. Raises ValueError for unknown folders and wrong shares."""
    shared = [":" in split for split in splits]
    if len(set(splits)) < len(splits) or any("/" in split or not split.partition(":")[0] for split in splits):
        raise ValueError(f"--splits {' '.join(splits)}: give different names without slashes")
    if all(shared):
        rows = _rows_by_share(listing, splits)
    elif not any(shared):
        rows = _rows_by_folder(listing, splits)
    else:
        raise ValueError(f"--splits {' '.join(splits)}: give folder names, or give every split its share (train:0.9)")
    for name, chosen in rows.items():
        if not len(chosen):
            raise ValueError(f"--splits {' '.join(splits)}: no image falls into {name}")
    return {name: listing.take(chosen) for name, chosen in rows.items()}


def _rows_by_folder(listing: Listing, splits: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Rows under each of these top folders."""
    depth = len(common_folder(listing.names))
    tops = np.array([name[depth:].partition("/")[0] if "/" in name[depth:] else "" for name in listing.names])
    present = sorted(set(tops.tolist()))
    if missing := [split for split in splits if split not in present]:
        raise ValueError(f"--splits: the source has no folder {', '.join(missing)}; it has: {', '.join(present[:20])}")
    return {split: np.flatnonzero(tops == split) for split in splits}


def _rows_by_share(listing: Listing, splits: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Rows by the share that the hash of their name falls into; shares add up to at most 1."""
    names = [split.partition(":")[0] for split in splits]
    try:
        shares = [float(split.partition(":")[2]) for split in splits]
    except ValueError:
        raise ValueError(f"--splits {' '.join(splits)}: a share is a number, as in train:0.9") from None
    if min(shares) <= 0 or sum(shares) > 1 + 1e-9:
        raise ValueError(f"--splits {' '.join(splits)}: shares are above 0 and add up to at most 1")
    where = shuffle_keys(listing.names, seed=0) / 2.0**64
    edges = np.concatenate([[0.0], np.cumsum(shares)])
    if sum(shares) > 1 - 1e-9:
        edges[-1] = 1.0 + 1e-9  # all of them, whatever the rounding
    return {
        name: np.flatnonzero((low <= where) & (where < high))
        for name, low, high in zip(names, edges, edges[1:], strict=False)
    }
