"""make bench: the CPU benchmarks one after the other; each writes its page to benchmarks/results/.

make bench                       # synthetic batches and photographs of scikit-image
make bench IMAGES=photos/        # loader and sharding tool on your own JPEGs (folder or .zip)
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> int:
    """Runs them; the exit code is the number of benchmarks that failed."""
    with tempfile.TemporaryDirectory() as temporary:
        images = os.environ.get("IMAGES")
        if not images:
            from patchmill.tools.demo import cut_crops

            images = str(Path(temporary) / "photographs")
            cut_crops(Path(images), 256, seed=0)
        commands = [
            ["-m", "benchmarks.bench_kernels"],
            ["-m", "benchmarks.bench_step", "--model", "b16", "--batch", "16"],
            ["-m", "benchmarks.bench_loader", images],
            ["-m", "benchmarks.bench_shard", images],
            ["-m", "benchmarks.bench_profile", images],
        ]
        codes = [subprocess.run([sys.executable, *command], cwd=ROOT).returncode for command in commands]
    return sum(code != 0 for code in codes)


if __name__ == "__main__":
    sys.exit(main())
