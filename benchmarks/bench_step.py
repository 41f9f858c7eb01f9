"""The training step against the published one: `python -m benchmarks.bench_step --model b16 --batch 16`.

On a CPU; bench_step_gpu.py is its counterpart. All variants (steps.py) take turns, so that whatever else the machine
does falls on all of them; the ratio is that of medians. Of the published step with attention written out and through
SDPA the faster one counts. Each variant is a process of its own, with the allocator as its program would have it (ours
holds freed memory, as `patchmill pretrain` does), which waits while the others have their turn; peak memory is the
process's.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.pages import results_folder
from benchmarks.steps import RECIPES, Step, ours, published, random_images
from patchmill.tools.profiler.machine import today
from patchmill.tools.profiler.timing import environment
from patchmill.trainer.config.model import ModelConfig
from patchmill.trainer.engine.world import hold_memory
from patchmill.trainer.metrics import peak_memory_gb
from patchmill.trainer.recipes.pretrain import get_recipe

CPU = torch.device("cpu")
WARM_STEPS = 3


class Variant(NamedTuple):
    """A writing of the step, built and warmed up."""

    turn: Callable[[int], float]
    """runs so many steps and returns the seconds they took"""
    memory_gib: float
    """at most held"""


def variants(config: ModelConfig, images: torch.Tensor) -> dict[str, Callable[[], Step]]:
    """Builders of all variants, by name."""
    return {
        "published explicit": lambda: published(config, images, "explicit"),
        "published sdpa": lambda: published(config, images, "sdpa"),
        "patchmill": lambda: ours(config, images),
        "published sdpa compiled": lambda: published(config, images, "sdpa", "model"),
        "patchmill compiled": lambda: ours(config, images, "model"),
    }


def measure(variants: dict[str, Variant], rounds: int, per_round: int) -> dict[str, list[float]]:
    """Seconds a step of every variant in every round; the order turns around from round to round."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        for name in list(variants)[:: 1 if number % 2 else -1]:
            seconds[name].append(variants[name].turn(per_round) / per_round)
    return seconds


def parts(step: Step, config: ModelConfig) -> dict[str, float]:
    """Milliseconds of one step's parts, from the profiler: what each operator's name and shapes say it is for."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        step()
    table: dict[str, float] = {}
    for event in seen.key_averages(group_by_input_shape=True):
        part = _part(event.key, event.input_shapes, config)
        table[part] = table.get(part, 0.0) + event.self_cpu_time_total / 1e3
    return dict(sorted(((k, round(v, 2)) for k, v in table.items()), key=lambda item: -item[1]))


def _part(name: str, shapes: list, config: ModelConfig) -> str:
    E = config.decoder_embed_dim
    decoder = {E, 2 * E, 3 * E, int(E * config.mlp_ratio)}
    if name in ("aten::mm", "aten::addmm", "aten::linear", "aten::_addmm_activation"):
        sizes = {size for shape in shapes for size in shape if isinstance(size, int)}
        return "decoder GEMM" if sizes & decoder else "encoder GEMM"
    for words, part in (
        (("bmm", "softmax", "attention", "flash"), "attention"),
        (("patchmill::masked_loss", "vecdot"), "loss"),
        (("patchmill::", "index", "sort", "scatter"), "masking"),
        (("adam", "norm_except", "foreach", "linalg_vector_norm"), "optimizer and guard"),
    ):
        if any(word in name for word in words):
            return part
    return "pointwise"


def here(step: Step, clock: Callable[[], float]) -> Variant:
    """A variant in this process."""
    _warm(step)

    def turn(count: int) -> float:
        start = clock()
        for _ in range(count):
            step()
        return clock() - start

    return Variant(turn, peak_memory_gb(CPU))


@contextmanager
def apart(name: str, line: list[str]) -> Iterator[Variant]:
    """A variant in a process of its own, which `serve` answers for."""
    command = [sys.executable, "-m", "benchmarks.bench_step", *line, "--only", name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        asked, answers = process.stdin, (line.split() for line in process.stdout)

        def answer(word: str) -> float:
            found = next((words for words in answers if words[:1] == [word]), None)
            if found is None:
                raise ChildProcessError(f"the process of {name!r} ended with code {process.wait()}")
            return float(found[1])

        def turn(count: int) -> float:
            print(count, file=asked, flush=True)
            return answer("seconds")

        yield Variant(turn, answer("memory"))
        asked.close()


def serve(variant: Variant) -> None:
    """Runs as many steps as each line of the standard input says, and prints the seconds they took."""
    print("memory", variant.memory_gib, flush=True)
    for line in sys.stdin:
        print("seconds", variant.turn(int(line)), flush=True)


def main() -> None:
    """Runs the benchmark and writes Markdown and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=RECIPES, default="b16")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="steps a variant's turn")
    parser.add_argument("--compile", action="store_true", help="compiled variants as well")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, not wall time: for a busy machine")
    parser.add_argument("--only", help="one variant, as many steps as each line of the standard input says")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if not (options.only or "").startswith("published"):
        hold_memory()  # as pretrain does
    config = get_recipe(RECIPES[options.model]).model
    table = variants(config, random_images(config, options.batch, CPU))
    if options.only:
        serve(here(table[options.only](), time.process_time if options.cpu_time else time.perf_counter))
        return
    with ExitStack() as processes:
        ready: dict[str, Variant] = {}
        # results of the eager ones are written before compiling begins, which takes minutes
        for compiled in (False, True) if options.compile else (False,):
            for name in (name for name in table if ("compiled" in name) == compiled):
                ready[name] = processes.enter_context(apart(name, sys.argv[1:]))
            seconds = measure(ready, options.rounds, options.steps)
            memory = {name: variant.memory_gib for name, variant in ready.items()}
            _report(options, seconds, memory, parts(_warm(table["patchmill"]()), config))


def _warm(step: Step) -> Step:
    for _ in range(WARM_STEPS):
        step()
    return step


def _report(
    options: argparse.Namespace,
    seconds: dict[str, list[float]],
    memory: dict[str, float],
    part_ms: dict[str, float],
) -> None:
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rivals = [name for name in medians if name.startswith("published") and "compiled" not in name]
    rival = min(rivals, key=medians.__getitem__)
    rows = []
    for name, median in medians.items():
        rate = options.batch / median
        spread = f"{min(seconds[name]):.4f} to {max(seconds[name]):.4f}"
        ratio = medians[rival] / median
        rows.append(f"| {name} | {median:.4f} | {spread} | {rate:.1f} | {memory[name]:.2f} | {ratio:.2f} |")
    text = "\n".join(
        [
            f"# Training step, {RECIPES[options.model]}, batch {options.batch}, bf16, CPU",
            "",
            f"- command: `python -m benchmarks.bench_step {' '.join(sys.argv[1:])}`",
            *(f"- {name}: {value}" for name, value in environment("cpu").items()),
            "",
            "Times are processor time of one process, since the machine was shared."
            if options.cpu_time
            else "Wall time.",
            f"Ratios are against `{rival}`, the faster eager writing of the published step.",
            "",
            "| variant | s a step (median) | range | images/s | peak GiB | ratio |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            "Parts of one `patchmill` step under the profiler (whose own cost is in them), ms: "
            + ", ".join(f"{part} {ms:g}" for part, ms in part_ms.items()),
            "",
        ]
    )
    print(text)
    name = f"step_{options.model}_cpu_{today()}"
    folder = results_folder()
    (folder / f"{name}.md").write_text(text)
    data = {"options": vars(options), "seconds": seconds, "memory_gib": memory, "parts_ms": part_ms}
    (folder / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
