"""Runs every test and benchmark that needs a GPU and nothing else, in two calls of under nine minutes each.

    make gpu-check                                  # in a checkout: tests, the step, kernels, ceilings
    make gpu-check-more                             # loss curves, other models and batches
    PYTHON=python3 NO_VENV=1 make gpu-check         # on a GPU machine that has torch and triton and nothing else
    make gpu-check GPU_CHECK=--dry-run              # every stage at tiny sizes, without a GPU

Each stage is a process with a time limit: one that fails or hangs costs no other its result. A stage may use what the
stages after it have not reserved. What they write is packed after every stage into one archive,
gpu_check_<date>.zip or gpu_check_more_<date>.zip in $OUT or benchmarks/results/, with one page that holds all pages: a
run that is cut short leaves what it has. Without a GPU it says so and does nothing. docs/gpu.md tells how to read it.
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
from torch._inductor.runtime.cache_dir_utils import cache_dir

from benchmarks.pages import results_folder
from patchmill.tools.profiler import machine

ROOT = Path(__file__).parent.parent
TOTAL_SECONDS = 510.0
"""of a call; the rest of nine minutes is for Python to start and for make"""
SPARE_SECONDS = 10.0
"""too little to begin a stage with"""
LOG_LINES = 25
"""of a stage that failed, to be printed"""


class Stage(NamedTuple):
    """A command, run with this Python from the root of the checkout."""

    name: str
    arguments: list[str]
    reserved_seconds: float
    """it gets at least so many; stages before it cannot take them"""
    once_tested: tuple[str, ...] = ()
    """more arguments where the stage `tests` has passed in this call"""


Groups = list[list[Stage]]
"""stages one after another; those of a group, which time nothing, run at the same time"""


def operator_tests(dry: bool) -> list[str]:
    """The tests of a GPU, over several processes since they mostly compile kernels; without pytest the checks alone."""
    if importlib.util.find_spec("pytest") is None:
        device = "cpu" if dry else "cuda"
        return ["-c", f"from benchmarks.check_kernels import check_all; print(check_all({device!r}), 'checks passed')"]
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_*_gpu.py"))
    spread = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    options = ["-q", "-rA", "-p", "no:cacheprovider", "-m", "gpu", *spread, *files]
    if dry:  # imports the tests and runs none: pytest calls that 5
        return ["-c", f"import sys, pytest; sys.exit(pytest.main({[*options, '--collect-only']!r}) not in (0, 5))"]
    return ["-m", "pytest", *options]


def step(model: str, batch: int, *more: str) -> list[str]:
    """The step benchmark of a model."""
    return ["-m", "benchmarks.bench_step_gpu", "--model", model, "--batch", str(batch), *more]


def compiling(variant: str) -> list[str]:
    """Compiles one variant of ViT-B/16 as one graph and times nothing: fills a cache on disk for `step-b16`."""
    return step("b16", 512, "--rounds", "0", "--variants", variant)


def first_call() -> Groups:
    """What is worth most, in its order. One compiler each for ours and the published model, while tests run."""
    blocks = ("--compiled", "blocks", "--rounds", "3", "--steps", "5")
    return [
        [
            Stage("tests", operator_tests(dry=False), 150),
            Stage("compile-b16", compiling("patchmill compiled"), 150),
            Stage("compile-b16-published", compiling("published compiled"), 150),
        ],
        [Stage("step-b16", step("b16", 512), 140)],
        [Stage("kernels", ["-m", "benchmarks.bench_kernels"], 80, once_tested=("--no-check",))],
        [Stage("ceilings-b16", ["-m", "benchmarks.bench_ceilings", "--models", "b16"], 40)],
        [Stage("step-l16", step("l16", 256, *blocks), 90)],
    ]


def second_call() -> Groups:
    """The rest, in the order of its worth."""
    blocks = ("--compiled", "blocks", "--rounds", "3", "--steps", "5")
    both = ("published compiled", "patchmill compiled")
    return [
        [Stage("numerics", ["-m", "benchmarks.bench_numerics"], 200)],
        [Stage("step-h14", step("h14", 128, *blocks), 100)],
        [Stage("sweep-b16", step("b16", 512, "--variants", "--sweep", "256", "1024", "2048"), 90)],
        [Stage("ceilings-l16-h14", ["-m", "benchmarks.bench_ceilings", "--models", "l16", "h14"], 50)],
        [Stage("step-b16-blocks", step("b16", 512, *blocks, "--variants", *both), 60)],
    ]


CALLS = {"gpu_check": first_call, "gpu_check_more": second_call}
SMALL: dict[str, dict[str, str | None]] = {
    "bench_step_gpu": {"--model": "tiny", "--batch": "2", "--rounds": "1", "--steps": "1"},
    "bench_kernels": {"--batch": "2", "--no-compile": None},
    "bench_ceilings": {"--models": "tiny", "--batch": "2"},
    "bench_numerics": {"--model": "tiny", "--batch": "2", "--steps": "2", "--images": "4"},
}
"""sizes of a dry run; of options that are given twice the last one counts"""
DRY_ENVIRONMENT = {"COMPILE_BACKEND": "eager", "OMP_NUM_THREADS": "1"}


def as_dry_run(stage: Stage) -> Stage:
    """The same stage at tiny sizes on the CPU."""
    if stage.name == "tests":
        return stage._replace(arguments=operator_tests(dry=True))
    small = {"--device": "cpu", **SMALL[stage.arguments[1].removeprefix("benchmarks.")]}
    if stage.name.startswith("compile-"):
        small["--rounds"] = "0"
    if "--sweep" in stage.arguments:
        small["--sweep"] = "3"
    return stage._replace(arguments=[*stage.arguments, *(part for pair in small.items() for part in pair if part)])


class Running:
    """A stage that has been started."""

    def __init__(self, stage: Stage, tested: bool, folder: Path, seconds: float, dry: bool) -> None:
        self.stage, self.seconds, self.began = stage, seconds, time.perf_counter()
        (folder / stage.name).mkdir()
        environment = {
            **os.environ,
            "OUT": str(folder / stage.name),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "PYTHONUNBUFFERED": "1",
            **(DRY_ENVIRONMENT if dry else {}),
        }
        with open(folder / stage.name / "log.txt", "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [sys.executable, *stage.arguments, *(stage.once_tested if tested else ())],
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


def pack(name: str, lines: list[str], work: Path) -> Path:
    """Writes the archive of all that stages have written, and the page of all their pages; returns the archive."""
    pages = [path.read_text(encoding="utf-8") for path in sorted(work.glob("*/*.md"), key=lambda p: p.stat().st_mtime)]
    text = "\n".join([f"# {name}", "", *(f"- {line}" for line in lines), "", *pages])
    path = results_folder() / f"{name}_{machine.today()}"
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    return Path(shutil.make_archive(str(path), "zip", work))


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


def forget_tuning() -> None:
    """Lets the timed stage choose launch settings anew: those found while tests ran on the same GPU are guesses."""
    for path in Path(cache_dir()).rglob("*.best_config"):
        path.unlink(missing_ok=True)


def reserved(groups: Groups) -> float:
    """Seconds that stages take at most when each takes what is reserved for it."""
    return sum(max(stage.reserved_seconds for stage in group) for group in groups)


def run(name: str, about: str, groups: Groups, total_seconds: float, dry: bool = False) -> int:
    """Runs stages, packing after each group; returns how many failed."""
    end, lines, passed = time.perf_counter() + total_seconds, [about], set[str]()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for number, group in enumerate(groups, 1):
            seconds = end - time.perf_counter() - reserved(groups[number:])
            if seconds < SPARE_SECONDS:
                lines += [f"{stage.name}: FAILED: no time left" for stage in group]
                continue
            tested = "tests" in passed
            for each in [Running(stage, tested, folder, seconds, dry) for stage in group]:
                lines.append(each.ended())
                print(lines[-1], flush=True)
                if "FAILED" in lines[-1]:
                    print(end_of_log(folder / each.stage.name), flush=True)
                else:
                    passed.add(each.stage.name)
            if len(group) > 1 and not dry:
                forget_tuning()
            pack(name, lines, folder)
        archive = pack(name, lines, folder)
        print("\n".join(headlines(folder)))
        print(f"all pages: {archive.with_suffix('.md')}; all files: {archive}")
    return sum("FAILED" in line for line in lines)


def chosen_groups(groups: Groups, names: list[str] | None) -> Groups:
    """The stages of these names, `step-b16` always with those that compile for it and the other way round."""
    wanted = {stage.name for group in groups for stage in group} if names is None else set(names)
    compiled = {"step-b16", "compile-b16", "compile-b16-published"}
    if wanted & compiled:
        wanted |= compiled
    chosen = ([stage for stage in group if stage.name in wanted] for group in groups)
    return [group for group in chosen if group]


def main(argv: list[str]) -> int:
    """Runs all stages; 0 when each passed, or when there is no GPU to check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--more", action="store_true", help="the second call")
    parser.add_argument("--stages", nargs="+", help="only these, in their order")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for everything")
    parser.add_argument("--dry-run", action="store_true", help="every stage at tiny sizes on the CPU")
    options = parser.parse_args(argv)
    name = "gpu_check_more" if options.more else "gpu_check"
    groups = CALLS[name]()
    known = [stage.name for group in groups for stage in group]
    unknown = sorted(set(options.stages or ()) - set(known))
    if unknown:
        parser.error(f"no stage {', '.join(unknown)}; expected some of: {', '.join(known)}")
    groups = chosen_groups(groups, options.stages)
    about = f"{driver()}; {machine.versions('torch', 'triton', 'numpy')}; commit {machine.commit()}"
    if options.dry_run:
        name, about = f"{name}_dry", f"dry run on a CPU; {about}"
        groups = [[as_dry_run(stage) for stage in group] for group in groups]
    elif not torch.cuda.is_available():
        print("gpu-check: torch sees no CUDA device here, nothing was run")
        return 0
    print(about, flush=True)
    return run(name, about, groups, options.seconds, options.dry_run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
