"""Counts and lists bad samples, and stops the run when there are too many.

One bad image in a billion must not stop a run; a failing disk must. The limit is a fraction of the dataset, rounded up.
Each process counts its own distinct bad samples.
"""

import json
import math
import threading
from pathlib import Path

from patchmill.pipeline.read.shards import BadSample


class Quarantine:
    """Collects bad samples; safe to use from many threads.

    Args:
        path: JSON-lines file to append to, one object `{"sample", "where", "reason"}` a line; None writes nothing.
        num_samples: size of the dataset.
        max_bad_fraction: fraction of it that may be bad before the run stops; 0 stops at the first.
    """

    def __init__(self, path: Path | None, num_samples: int, max_bad_fraction: float) -> None:
        self.path = path
        self.num_samples = num_samples
        self.max_bad_fraction = max_bad_fraction
        self._seen: set[int] = set()
        self._lock = threading.Lock()

    @property
    def bad_samples(self) -> int:
        """Number of distinct bad samples that this process has found."""
        return len(self._seen)

    def record(self, bad: BadSample) -> None:
        """Records a bad sample. Raises ValueError once there are too many."""
        with self._lock:
            if bad.index in self._seen:
                return
            self._seen.add(bad.index)
            if self.path is not None:
                line = json.dumps({"sample": bad.index, "where": bad.where, "reason": bad.reason})
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
        if len(self._seen) > math.ceil(self.num_samples * self.max_bad_fraction):
            listed = f", listed in {self.path}" if self.path else ""
            raise ValueError(
                f"{len(self._seen)} of {self.num_samples} samples are bad{listed}; data.max_bad_fraction allows "
                f"{self.max_bad_fraction:g}. The last: {bad.where}: {bad.reason}. Check the dataset with "
                "`patchmill verify`, or allow more"
            )
