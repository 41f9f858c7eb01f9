"""make gpu-check: every check and benchmark that wants a GPU, in one go, in under nine minutes.

    make gpu-check                                  # in a checkout
    PYTHON=python3 NO_VENV=1 make gpu-check         # on a GPU machine that has torch and triton and nothing else

Each stage is a process of its own with a time limit, so that one that fails or hangs costs no other its result. Logs
and results go to $OUT, or to benchmarks/results/. Without a GPU it says so and does nothing.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.pages import results_folder

ROOT = Path(__file__).parent.parent
TOTAL_SECONDS = 530.0


class Stage(NamedTuple):
    """A command, run with this Python from the root of the checkout."""

    name: str
    arguments: list[str]
    limit_seconds: float


CHECK_OPERATORS = "from benchmarks.check_kernels import check_all; print(check_all('cuda'), 'checks passed')"
STAGES = [
    Stage("operators", ["-c", CHECK_OPERATORS], 120),
    Stage("kernels", ["-m", "benchmarks.bench_kernels"], 120),
    Stage("step-b16", ["-m", "benchmarks.bench_step", "--model", "b16", "--batch", "512"], 150),
    Stage("step-l16", ["-m", "benchmarks.bench_step", "--model", "l16", "--batch", "256"], 120),
    Stage("step-h14", ["-m", "benchmarks.bench_step", "--model", "h14", "--batch", "128"], 120),
]


def run(stage: Stage, folder: Path, seconds: float) -> str:
    """Runs a stage within `seconds`, with its output in <name>.log, and returns one line on how it ended."""
    began = time.perf_counter()
    environment = {**os.environ, "OUT": str(folder), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with open(folder / f"gpu_check_{stage.name}.log", "w", encoding="utf-8") as log:
        command = [sys.executable, *stage.arguments]
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=seconds
            ).returncode
            how = "passed" if code == 0 else f"FAILED with exit code {code}"
        except subprocess.TimeoutExpired:
            how = f"FAILED: not done after {seconds:.0f} s"
    return f"{stage.name}: {how} in {time.perf_counter() - began:.0f} s"


def main() -> int:
    """Runs all stages; 0 when each passed, or when there is no GPU to check."""
    if not torch.cuda.is_available():
        print("gpu-check: torch sees no CUDA device here, nothing was run")
        return 0
    folder = results_folder()
    print(f"gpu-check on {torch.cuda.get_device_name()}, torch {torch.__version__}; results in {folder}", flush=True)
    end = time.perf_counter() + TOTAL_SECONDS
    lines = []
    for stage in STAGES:
        left = end - time.perf_counter()
        line = (
            run(stage, folder, min(stage.limit_seconds, left)) if left > 10 else f"{stage.name}: FAILED: no time left"
        )
        print(line, flush=True)
        lines.append(line)
    (folder / "gpu_check.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(any("FAILED" in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
