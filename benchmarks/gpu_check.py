"""make gpu-check: every test and benchmark that wants a GPU and nothing else, in one go, in under nine minutes.

    make gpu-check                                  # in a checkout
    PYTHON=python3 NO_VENV=1 make gpu-check         # on a GPU machine that has torch and triton and nothing else

Each stage is a process of its own with a time limit, so that one that fails or hangs costs no other its result. What
they write is packed into one archive after every stage, gpu_check_<date>.zip in $OUT or benchmarks/results/, with one
page that holds all pages: a run that is cut short leaves what it has. Without a GPU it says so and does nothing.
docs/gpu.md tells how to read it.
"""

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.pages import results_folder
from patchmill.tools.profiler import machine

ROOT = Path(__file__).parent.parent
TOTAL_SECONDS = 530.0
SPARE_SECONDS = 10.0
"""too little to begin a stage with"""
LOG_LINES = 25
"""of a stage that failed, to be printed"""


class Stage(NamedTuple):
    """A command, run with this Python from the root of the checkout."""

    name: str
    arguments: list[str]
    limit_seconds: float
    beside: bool = False
    """begins together with the next stage: for what is not timed"""


def operator_tests() -> list[str]:
    """The tests of a GPU, over several processes since they mostly compile kernels; without pytest the checks alone."""
    if importlib.util.find_spec("pytest") is None:
        return ["-c", "from benchmarks.check_kernels import check_all; print(check_all('cuda'), 'checks passed')"]
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_*_gpu.py"))
    spread = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    return ["-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "-m", "gpu", *spread, *files]


def step(model: str, batch: int, *more: str) -> list[str]:
    """The step benchmark of a model."""
    return ["-m", "benchmarks.bench_step_gpu", "--model", model, "--batch", str(batch), *more]


def all_stages() -> list[Stage]:
    """In the order of their worth. Compiling fills a cache on disk, which the timed stage after it finds."""
    return [
        Stage("tests", operator_tests(), 150, beside=True),
        Stage("compile-b16", step("b16", 512, "--rounds", "1", "--steps", "1", "--only", "compiled"), 150),
        Stage("step-b16", step("b16", 512), 150),
        Stage("step-l16", step("l16", 256, "--compiled", "blocks", "--rounds", "3", "--steps", "5"), 80),
        Stage("step-h14", step("h14", 128, "--compiled", "blocks", "--rounds", "3", "--steps", "5"), 80),
        Stage("kernels", ["-m", "benchmarks.bench_kernels"], 90),
        Stage("ceilings", ["-m", "benchmarks.bench_ceilings"], 60),
        Stage("numerics", ["-m", "benchmarks.bench_numerics", "--seconds", "70"], 120),
        Stage("sweep-b16", step("b16", 256, "--only", "eager", "--rounds", "1", "--sweep", "256", "1024", "2048"), 60),
    ]


class Running:
    """A stage that has been started."""

    def __init__(self, stage: Stage, folder: Path, seconds: float) -> None:
        self.stage, self.seconds, self.began = stage, seconds, time.perf_counter()
        (folder / stage.name).mkdir()
        environment = {
            **os.environ,
            "OUT": str(folder / stage.name),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "PYTHONUNBUFFERED": "1",
        }
        with open(folder / stage.name / "log.txt", "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [sys.executable, *stage.arguments],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def ended(self) -> str:
        """Waits, for no longer than the stage may take, and says in one line how it went."""
        try:
            code = self.process.wait(max(0.0, self.began + self.seconds - time.perf_counter()))
            how = "passed" if code == 0 else f"FAILED with exit code {code}"
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, 9)  # with the processes that it started
            self.process.wait()
            how = f"FAILED: not done after {self.seconds:.0f} s"
        return f"{self.stage.name}: {how} in {time.perf_counter() - self.began:.0f} s"


def pack(lines: list[str], work: Path, results: Path) -> Path:
    """Writes the archive of all that stages have written, and the page of all their pages; returns the archive."""
    pages = [path.read_text(encoding="utf-8") for path in sorted(work.glob("*/*.md"), key=lambda p: p.stat().st_mtime)]
    name = f"gpu_check_{machine.today()}"
    text = "\n".join(["# make gpu-check", "", *(f"- {line}" for line in lines), "", *pages])
    (results / f"{name}.md").write_text(text, encoding="utf-8")
    return Path(shutil.make_archive(str(results / name), "zip", work))


def end_of_log(folder: Path) -> str:
    """The last lines that a stage printed, set in."""
    text = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")
    return "\n".join(f"    {line[:200]}" for line in text.splitlines()[-LOG_LINES:])


def headlines(work: Path) -> list[str]:
    """Images/s of every variant of the step that has been measured."""
    lines = []
    for path in sorted(work.glob("step-*/step_*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        batch = found["options"]["batch"]
        rates = [f"{name} {batch / statistics.median(each):,.0f}" for name, each in found["seconds"].items()]
        lines.append(f"{path.parent.name}, images/s: {'; '.join(rates)}")
    return lines


def driver() -> str:
    """The GPUs, the driver and their memory, as nvidia-smi names them."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return "no nvidia-smi"
    return "; ".join(subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines())


def run(about: str, stages: list[Stage], total_seconds: float) -> int:
    """Runs stages, packing after each; returns how many failed."""
    results, end = results_folder(), time.perf_counter() + total_seconds
    lines = [about]
    with tempfile.TemporaryDirectory() as folder:
        running: list[Running] = []
        for stage in stages:
            left = end - time.perf_counter()
            if left < SPARE_SECONDS:
                lines.append(f"{stage.name}: FAILED: no time left")
                continue
            running.append(Running(stage, Path(folder), min(stage.limit_seconds, left)))
            if stage.beside:
                continue
            for each in running:
                lines.append(each.ended())
                print(lines[-1], flush=True)
                if "FAILED" in lines[-1]:
                    print(end_of_log(Path(folder) / each.stage.name), flush=True)
            running.clear()
            pack(lines, Path(folder), results)
        archive = pack(lines, Path(folder), results)
        print("\n".join(headlines(Path(folder))))
        print(f"all pages: {archive.with_suffix('.md')}; all files: {archive}")
    return sum("FAILED" in line for line in lines)


def main(argv: list[str]) -> int:
    """Runs all stages; 0 when each passed, or when there is no GPU to check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", help="only these, in their order")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for everything")
    options = parser.parse_args(argv)
    stages = all_stages()
    unknown = set(options.stages or ()) - {stage.name for stage in stages}
    if unknown:
        parser.error(f"no stage {', '.join(sorted(unknown))}; there are: {', '.join(stage.name for stage in stages)}")
    if not torch.cuda.is_available():
        print("gpu-check: torch sees no CUDA device here, nothing was run")
        return 0
    about = f"{driver()}; {machine.versions('torch', 'triton', 'numpy')}; commit {machine.commit()}"
    print(about, flush=True)
    return run(
        about, [stage for stage in stages if not options.stages or stage.name in options.stages], options.seconds
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
