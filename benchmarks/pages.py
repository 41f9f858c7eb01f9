"""benchmarks -> [pages] -> benchmarks/results/: where result pages go. The standard library alone."""

import os
from pathlib import Path


def results_folder() -> Path:
    """$OUT, or benchmarks/results/."""
    folder = Path(os.environ.get("OUT") or Path(__file__).parent / "results")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
