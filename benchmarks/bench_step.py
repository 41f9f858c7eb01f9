"""The training step against the published one: `python -m benchmarks.bench_step --model b16 --batch 16`.

All variants take turns, so that whatever else the machine does falls on all of them; the ratio is that of medians. The
published step is the published formulation (published_mae.py) with torch's default AdamW and bf16 autocast, attention
written out or through SDPA: the faster one counts. Ours draws its masks inside the clock. On a CPU each variant is a
process of its own, with the allocator as its program would have it (ours holds freed memory, as `patchmill pretrain`
does), which waits while the others have their turn; peak memory is the process's. On a GPU all live in one process and
peak memory is the allocator's.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple, cast

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.pages import results_folder
from benchmarks.published_mae import PublishedMAE
from patchmill.pipeline.batch import Batch
from patchmill.pipeline.masks import MaskConfig, MaskPlan
from patchmill.tools.machine import today
from patchmill.tools.timing import environment
from patchmill.trainer.config import ModelConfig
from patchmill.trainer.mae import MaskedAutoencoder
from patchmill.trainer.metrics import device_peak, peak_memory_gb, train_flops_per_image
from patchmill.trainer.optim import build_optimizer, parameter_groups
from patchmill.trainer.recipes import get_recipe
from patchmill.trainer.step import Guard, set_learning_rate, update
from patchmill.trainer.world import World, hold_memory

RECIPES = {"b16": "mae-vit-b16", "l16": "mae-vit-l16", "h14": "mae-vit-h14"}
MASK = MaskConfig()
LEARNING_RATE = 1e-4
WARM_STEPS = 3
Step = Callable[[], None]


class Variant(NamedTuple):
    """A writing of the step, built and warmed up."""

    turn: Callable[[int], float]
    """runs so many steps and returns the seconds they took"""
    memory_gib: float
    """at most held"""


def published(config: ModelConfig, images: torch.Tensor, attention: str, compiled: bool) -> Step:
    """The published step on these images, noise drawn anew each time."""
    torch.manual_seed(0)
    model: nn.Module = PublishedMAE(config, attention).to(images.device)
    groups = parameter_groups(model, weight_decay=0.05)
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95))
    forward = torch.compile(model) if compiled else model

    def step() -> None:
        noise = torch.rand(len(images), config.num_patches, device=images.device)
        with torch.autocast(images.device.type, dtype=torch.bfloat16):
            loss = forward(images, noise, MASK.ratio)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def ours(config: ModelConfig, images: torch.Tensor, compiled: bool) -> Step:
    """Patchmill's step on these images, masks drawn anew each time."""
    torch.manual_seed(0)
    model = MaskedAutoencoder(config).to(images.device)
    optimizer = build_optimizer(model, get_recipe("mae-vit-b16").optim)
    set_learning_rate(optimizer, LEARNING_RATE)
    forward: nn.Module = cast(nn.Module, torch.compile(model, fullgraph=True)) if compiled else model
    world, guard = World(0, 1, images.device), Guard(images.device)
    ids_B = torch.arange(len(images), device=images.device)
    epochs = iter(range(1 << 30))

    def step() -> None:
        epoch = next(epochs)
        plan = MaskPlan.draw(MASK, seed=0, epoch=epoch, sample_ids_B=ids_B, grid_hw=config.grid_hw)
        update(
            forward,
            optimizer,
            Batch(images, plan, ids_B, ids_B, epoch, 0),
            world=world,
            guard=guard,
            autocast=torch.bfloat16,
        )

    return step


def variants(config: ModelConfig, images: torch.Tensor) -> dict[str, Callable[[], Step]]:
    """Builders of all variants, by name."""
    return {
        "published explicit": lambda: published(config, images, "explicit", False),
        "published sdpa": lambda: published(config, images, "sdpa", False),
        "patchmill": lambda: ours(config, images, False),
        "published sdpa compiled": lambda: published(config, images, "sdpa", True),
        "patchmill compiled": lambda: ours(config, images, True),
    }


def measure(variants: dict[str, Variant], rounds: int, per_round: int) -> dict[str, list[float]]:
    """Seconds a step of every variant in every round; the order turns around from round to round."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        for name in list(variants)[:: 1 if number % 2 else -1]:
            seconds[name].append(variants[name].turn(per_round) / per_round)
    return seconds


def parts(step: Step, config: ModelConfig, device: torch.device) -> dict[str, float]:
    """Milliseconds of one step's parts, from the profiler: what each kernel's name and shapes say it is for."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities, record_shapes=True) as seen:
        step()
        _wait(device)
    table: dict[str, float] = {}
    for event in seen.key_averages(group_by_input_shape=True):
        cost = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        part = _part(event.key, event.input_shapes, config)
        table[part] = table.get(part, 0.0) + cost / 1e3
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


def here(step: Step, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> Variant:
    """A variant in this process."""
    before = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    _warm(step)
    _wait(device)

    def turn(count: int) -> float:
        _wait(device)
        start = clock()
        for _ in range(count):
            step()
        _wait(device)
        return clock() - start

    if device.type == "cuda":
        return Variant(turn, (torch.cuda.max_memory_allocated(device) - before) / 2**30)
    return Variant(turn, peak_memory_gb(device))


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


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Runs the benchmark and writes Markdown and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=RECIPES, default="b16")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="steps a variant's turn")
    parser.add_argument("--compile", action="store_true", help="compiled variants as well (always on a GPU)")
    parser.add_argument("--threads", type=int, help="of torch on a CPU")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, not wall time: for a busy machine")
    parser.add_argument("--only", help="one variant, as many steps as each line of the standard input says")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
    if device.type == "cpu" and not (options.only or "").startswith("published"):
        hold_memory()  # as pretrain does
    config = get_recipe(RECIPES[options.model]).model
    torch.manual_seed(0)
    images = torch.randint(0, 256, (options.batch, *config.image_hw, config.channels), dtype=torch.uint8, device=device)
    table = variants(config, images)
    if options.only:
        serve(here(table[options.only](), device, time.process_time if options.cpu_time else time.perf_counter))
        return
    with_compiled = options.compile or device.type == "cuda"
    with ExitStack() as processes:
        ready: dict[str, Variant] = {}
        # results of the eager ones are written before compiling begins, which takes minutes
        for compiled in (False, True) if with_compiled else (False,):
            for name in (name for name in table if ("compiled" in name) == compiled):
                if device.type == "cpu":
                    ready[name] = processes.enter_context(apart(name, sys.argv[1:]))
                else:
                    ready[name] = here(table[name](), device)
            seconds = measure(ready, options.rounds, options.steps)
            memory = {name: variant.memory_gib for name, variant in ready.items()}
            _report(options, config, device, seconds, memory, parts(_warm(table["patchmill"]()), config, device))


def _warm(step: Step) -> Step:
    for _ in range(WARM_STEPS):
        step()
    return step


def _report(
    options: argparse.Namespace,
    config: ModelConfig,
    device: torch.device,
    seconds: dict[str, list[float]],
    memory: dict[str, float],
    part_ms: dict[str, float],
) -> None:
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rivals = [name for name in medians if name.startswith("published") and "compiled" not in name]
    rival = min(rivals, key=medians.__getitem__)
    flops, peak = train_flops_per_image(config, MASK.ratio), device_peak(device)
    rows = []
    for name, median in medians.items():
        rate = options.batch / median
        mfu = f"{rate * flops / peak:.1%}" if peak else "-"
        spread = f"{min(seconds[name]):.4f} to {max(seconds[name]):.4f}"
        ratio = medians[rival] / median
        rows.append(f"| {name} | {median:.4f} | {spread} | {rate:.1f} | {mfu} | {memory[name]:.2f} | {ratio:.2f} |")
    text = "\n".join(
        [
            f"# Training step, {RECIPES[options.model]}, batch {options.batch}, bf16, {device.type}",
            "",
            f"- command: `python -m benchmarks.bench_step {' '.join(sys.argv[1:])}`",
            *(f"- {name}: {value}" for name, value in environment(str(device)).items()),
            "",
            "Times are processor time of one process, since the machine was shared."
            if options.cpu_time
            else "Wall time.",
            f"Ratios are against `{rival}`, the faster eager writing of the published step.",
            "",
            "| variant | s a step (median) | range | images/s | MFU | peak GiB | ratio |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
            "Parts of one `patchmill` step under the profiler (whose own cost is in them), ms: "
            + ", ".join(f"{part} {ms:g}" for part, ms in part_ms.items()),
            "",
        ]
    )
    print(text)
    name = f"step_{options.model}_{device.type}_{today()}"
    folder = results_folder()
    (folder / f"{name}.md").write_text(text)
    data = {"options": vars(options), "seconds": seconds, "memory_gib": memory, "parts_ms": part_ms}
    (folder / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
