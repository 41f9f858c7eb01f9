"""shards, decode -> [quarantine] -> quarantine.jsonl: bad samples are counted, named, and limited.

One bad image among a billion must not stop a run; a disk that returns rubbish must. The limit is a share of the
dataset, rounded up, of different bad samples; each process holds its own count.
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
        max_bad_fraction: share of it that may be bad before the run stops; 0 stops at the first.
    """

    def __init__(self, path: Path | None, num_samples: int, max_bad_fraction: float) -> None:
        self.path = path
        self.num_samples = num_samples
        self.max_bad_fraction = max_bad_fraction
        self._seen: set[int] = set()
        self._lock = threading.Lock()

    @property
    def bad_samples(self) -> int:
        """Different bad samples met so far by this process."""
        return len(self._seen)

    def record(self, bad: BadSample) -> None:
        """Notes a bad sample; ValueError once there are too many."""
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
