"""The training step against the published one on a GPU: `python -m benchmarks.bench_step_gpu --model b16 --batch 512`.

Variants (steps.py) of one kind take turns: eager ones, then compiled ones, then, each alone because a graph keeps its
memory, those captured as one CUDA graph. Before each kind a large product is held for some seconds, until clocks and
power have settled. The page is written anew after every round: a run that is cut short leaves what it has. Then other
batches, and where the time goes by kind of work and by kernel (kernel_profile.py).

The published step has torch's default AdamW; the rows "fused" have its fused one.

MFU counts the FLOPs of the published formulation over the data sheet's dense bf16 peak, whatever was skipped.
"""

import argparse
import gc
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import torch.compiler.config
from torch.nn.attention import sdpa_kernel

from benchmarks.attention_shapes import BACKENDS, attention_facts
from benchmarks.clocks import hold_product
from benchmarks.kernel_profile import Profile, profile_lines, profile_step
from benchmarks.pages import markdown_table, write_page
from benchmarks.steps import MASK, RECIPES, Compiled, Step, ours, published, random_images
from patchmill.tools.profiler import machine, timing
from patchmill.trainer.config.model import ModelConfig
from patchmill.trainer.engine.cuda_graph import EAGER_STEPS
from patchmill.trainer.flops import device_peak, train_flops_per_image
from patchmill.trainer.metrics import peak_memory_gb
from patchmill.trainer.model import attention
from patchmill.trainer.recipes.pretrain import get_recipe

WARM_STEPS = EAGER_STEPS + 2
"""a captured update is captured in the step after its eager ones"""
EAGER = ("published explicit", "published sdpa", "published sdpa, fused AdamW", "patchmill")
COMPILED = ("published compiled", "published compiled, fused AdamW", "patchmill compiled")
GRAPHS = ("patchmill compiled, graph", "published compiled, graph", "patchmill, graph")
"""each alone"""
VARIANTS = (*EAGER, *COMPILED, *GRAPHS)
RIVALS = tuple(name for name in VARIANTS if name.startswith("published"))
Builders = dict[str, Callable[[], Step]]


class Results:
    """What has been measured so far, and the page that shows it."""

    def __init__(self, options: argparse.Namespace, config: ModelConfig, device: torch.device) -> None:
        self.options, self.device = options, device
        self.attention = attention_facts(config, options.batch, str(device), torch.bfloat16)
        self.held: list[float] = []
        """FLOP/s of the large product before each kind"""
        self.flops, self.peak = train_flops_per_image(config, MASK), device_peak(device)
        self.seconds: dict[str, list[float]] = {}
        self.memory: dict[str, float] = {}
        self.sweep: dict[str, dict[int, float]] = {}
        self.profiles: dict[str, Profile] = {}
        self.failures: dict[str, str] = {}

    def write(self) -> str:
        """Writes the page and its JSON; returns the page."""
        options, medians = self.options, {name: statistics.median(each) for name, each in self.seconds.items()}
        rivals = [name for name in RIVALS if name in medians]
        rows = []
        for name, median in medians.items():
            rate = options.batch / median
            spread = f"{min(self.seconds[name]) * 1e3:.2f} to {max(self.seconds[name]) * 1e3:.2f}"
            ratios = [f"{medians[rival] / median:.2f}" for rival in rivals]
            rows.append(
                [name, f"{median * 1e3:.2f}", spread, f"{rate:.0f}", self._mfu(rate), *self._memory(name), *ratios]
            )
        header = ["variant", "ms a step", "range", "images/s", "MFU", "peak GiB", *(f"over {name}" for name in rivals)]
        lines = markdown_table(header, rows)
        lines += [f"- {name}: {why}" for name, why in self.failures.items()]
        for name, rates in self.sweep.items():
            cells = [[batch, f"{rate:.0f}", self._mfu(rate)] for batch, rate in rates.items()]
            lines += ["", f"Batches of `{name}`:", "", *markdown_table(["batch", "images/s", "MFU"], cells)]
        for name, found in self.profiles.items():
            lines += ["", *profile_lines(name, found, medians[name])]
        facts = {
            "command": f"python -m benchmarks.bench_step_gpu {' '.join(options.line)}",
            **timing.environment(str(self.device)),
            **self.attention,
            "large bf16 product before each kind, TFLOP/s": ", ".join(f"{r / 1e12:.0f}" for r in self.held) or "-",
            "sizes": f"{RECIPES[options.model]}, batch {options.batch}, 75 % masked, bf16 autocast",
            "compiled": {"model": "as one graph", "blocks": "block by block"}[options.compiled],
        }
        data = {
            "options": {key: value for key, value in vars(options).items() if key != "line"},
            "flops_per_image": self.flops,
            "product_flops_per_second": self.held,
            "seconds": self.seconds,
            "memory_gib": self.memory,
            "images_per_s_by_batch": self.sweep,
            "profiles": {name: found.plain() for name, found in self.profiles.items()},
            "failures": self.failures,
        }
        name = f"step_{options.model}_{self.device.type}_{machine.today()}"
        return write_page(name, f"Training step, {RECIPES[options.model]}, batch {options.batch}", facts, lines, data)

    def _mfu(self, rate: float) -> str:
        return f"{rate * self.flops / self.peak:.1%}" if self.peak else "-"

    def _memory(self, name: str) -> list[str]:
        return [f"{self.memory[name]:.1f}"]


def builders(config: ModelConfig, images: torch.Tensor, compiled: Compiled) -> Builders:
    """How each variant is made, by its name."""
    return {
        "published explicit": lambda: published(config, images, "explicit"),
        "published sdpa": lambda: published(config, images, "sdpa"),
        "published sdpa, fused AdamW": lambda: published(config, images, "sdpa", fused=True),
        "patchmill": lambda: ours(config, images),
        "published compiled": lambda: published(config, images, "sdpa", compiled),
        "published compiled, fused AdamW": lambda: published(config, images, "sdpa", compiled, fused=True),
        "patchmill compiled": lambda: ours(config, images, compiled),
        "patchmill compiled, graph": lambda: ours(config, images, compiled, graphed=True),
        "published compiled, graph": lambda: published(config, images, "sdpa", compiled, graphed=True),
        "patchmill, graph": lambda: ours(config, images, graphed=True),
    }


def kinds(variants: Sequence[str], device: torch.device) -> list[list[str]]:
    """The variants that take turns with each other; a CPU has no graphs."""
    graphs = [[name] for name in GRAPHS] if device.type == "cuda" else []
    chosen = ([name for name in kind if name in variants] for kind in (EAGER, COMPILED, *graphs))
    return [kind for kind in chosen if kind]


def measure(kind: Builders, results: Results, config: ModelConfig) -> None:
    """Builds variants, lets them take turns, profiles ours unless it is one graph, and lets go of them."""
    options, device = results.options, results.device
    if options.compiled == "blocks":
        torch.compiler.reset()  # one function may be compiled for so many models and shapes only
    steps: dict[str, Step] = {}
    for name, build in kind.items():
        try:
            steps[name], results.memory[name] = warmed(build, device)
        except RuntimeError as error:  # out of memory, or what cannot be compiled or captured here
            traceback.print_exc()
            results.failures[name] = f"failed ({str(error).strip().splitlines()[0]})"
    if not options.rounds:
        return
    if held := hold_product(device):
        results.held.append(held)
    for number in range(options.rounds):
        for name in list(steps)[:: 1 if number % 2 else -1]:
            results.seconds.setdefault(name, []).append(turn(steps[name], options.steps, device))
        results.write()
    for name in (name for name in steps if name.startswith("patchmill") and name not in GRAPHS):
        if device.type == "cuda":
            results.profiles[name] = profile_step(steps[name], config)


def warmed(build: Callable[[], Step], device: torch.device) -> tuple[Step, float]:
    """A variant that is ready to be timed, and the most memory that it held (GiB)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    step = build()
    for _ in range(WARM_STEPS):
        step()
    return step, peak_memory_gb(device) - before / 2**30


def turn(step: Step, count: int, device: torch.device) -> float:
    """Seconds of one step, of `count` in a row."""
    timing.wait_for(device)
    start = time.perf_counter()
    for _ in range(count):
        step()
    timing.wait_for(device)
    return (time.perf_counter() - start) / count


def sweep(batches: Sequence[int], results: Results, config: ModelConfig) -> None:
    """Images/s of our step by batch, compiled block by block (a new batch compiles anew) and launched from Python."""
    options, device = results.options, results.device
    rates = results.sweep.setdefault("patchmill, blocks compiled", {})
    for batch in batches:
        torch.compiler.reset()  # one function may be compiled for so many shapes only
        images = random_images(config, batch, device)
        if held := hold_product(device, 1.0):
            results.held.append(held)
        try:
            step, _ = warmed(lambda images=images: ours(config, images, "blocks"), device)  # type: ignore[misc]
            rates[batch] = batch / statistics.median(turn(step, options.steps, device) for _ in range(3))
        except torch.OutOfMemoryError as error:
            results.failures[f"batch {batch}"] = f"failed ({str(error).splitlines()[0]})"
            return
        results.write()


def main(argv: list[str]) -> int:
    """Runs the benchmark and writes Markdown and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=RECIPES, default="b16")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5, help="0 compiles and times nothing")
    parser.add_argument("--steps", type=int, default=10, help="steps a variant's turn")
    parser.add_argument("--compiled", choices=("model", "blocks"), default="model", help="blocks compile much faster")
    parser.add_argument("--attention", choices=BACKENDS, help="one backend of SDPA for all variants")
    parser.add_argument("--sweep", type=int, nargs="*", default=[], help="other batches of ours")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=VARIANTS, metavar="NAME", help="only these")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    options.line = argv
    device = torch.device(options.device)
    config = get_recipe(RECIPES[options.model]).model
    if options.attention:
        attention.forced = BACKENDS[options.attention]  # our model's; sdpa_kernel below sets the published one's
        # compiled code is cached under a key that does not tell which backends were enabled
        torch.compiler.config.force_disable_caches = True
    with sdpa_kernel(BACKENDS[options.attention]) if options.attention else nullcontext():
        results = Results(options, config, device)
        images = random_images(config, options.batch, device)
        table = builders(config, images, options.compiled)
        for kind in kinds(options.variants, device):
            measure({name: table[name] for name in kind}, results, config)
            print(results.write(), flush=True)
        if options.sweep:
            sweep(options.sweep, results, config)
            print(results.write())
    return len(results.failures)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
