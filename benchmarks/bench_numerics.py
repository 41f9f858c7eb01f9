"""Loss curves of one training run in several arithmetics: `python -m benchmarks.bench_numerics [--steps 300]`.

Every run has the same weights at the start, the same images, order and masks; what differs is the precision, the
writing (ours or the published formulation) and how it is launched. Curves that part more than two runs of the same
arithmetic part from each other would mean that a shortcut changes what is learnt. One question is open and asked here:
under autocast our decoder's residual stream is bf16, the published one fp32 (docs/decisions.md).

Writes a page, the curves (JSON) and, where matplotlib is installed, a picture, anew after every run.
"""

import argparse
import functools
import importlib.util
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from benchmarks.attention_shapes import attention_facts
from benchmarks.pages import markdown_table, results_folder, write_page
from benchmarks.pictures import training_images
from benchmarks.published_mae import PublishedMAE
from benchmarks.steps import MASK, RECIPES, Compiled, compile_model
from patchmill.pipeline.batch import Batch
from patchmill.pipeline.plan.masks import MaskPlan
from patchmill.tools.profiler import machine, timing
from patchmill.trainer.config.model import ModelConfig
from patchmill.trainer.draw.style import line_style
from patchmill.trainer.engine.cuda_graph import GraphedUpdate
from patchmill.trainer.engine.optim import build_optimizer, parameter_groups
from patchmill.trainer.engine.step import Guard, set_learning_rate, update
from patchmill.trainer.engine.world import World
from patchmill.trainer.model.mae import MaskedAutoencoder
from patchmill.trainer.recipes.pretrain import get_recipe

PEAK_RATE, WARM_UP_STEPS = 5e-4, 30
WINDOW = 20
"""steps of a running mean: single losses are noisy, and all runs see the same noise"""
BF16 = torch.bfloat16
Update = Callable[[Batch, float], Tensor]


class Run(NamedTuple):
    """One arithmetic of the same training run."""

    autocast: torch.dtype | None = BF16
    published: bool = False
    wide_decoder: bool = False
    """the decoder's residual stream in fp32"""
    compiled: Compiled = "no"
    graphed: bool = False


RUNS = {
    "fp32": Run(None),
    "bf16": Run(),
    "bf16, decoder's stream in fp32": Run(wide_decoder=True),
    "published, bf16": Run(published=True),
    "bf16 once more": Run(),
    "bf16, blocks compiled": Run(compiled="blocks"),
    "bf16, one CUDA graph": Run(graphed=True),
    "published, fp32": Run(None, published=True),
}
"""in the order of their worth: a run that is cut short leaves the first ones"""


def curve(run: Run, config: ModelConfig, images: Tensor, batch: int, steps: int) -> list[float]:
    """The loss of every step."""
    torch.manual_seed(0)
    model = MaskedAutoencoder(config)
    step = (published_update if run.published else our_update)(run, model, config, images.device)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1)).to(images.device)
    losses = []
    for number in range(steps):
        ids_B = order.roll(-number * batch)[:batch]
        plan = MaskPlan.draw(MASK, seed=0, epoch=number, sample_ids_B=ids_B, grid_hw=config.grid_hw)
        rate = PEAK_RATE * min(1.0, (number + 1) / WARM_UP_STEPS)
        losses.append(step(Batch(images[ids_B], plan, ids_B, ids_B, number, 0), rate))
    return torch.stack(losses).tolist()


def our_update(run: Run, model: MaskedAutoencoder, config: ModelConfig, device: torch.device) -> Update:
    """Patchmill's update, as pretrain calls it."""
    model.to(device)
    if run.wide_decoder:
        model.decoder_embed.register_forward_hook(lambda module, args, out: out.float())
    optimizer = build_optimizer(model, get_recipe("mae-vit-b16").optim)
    call: Callable = functools.partial(
        update,
        compile_model(model, run.compiled),
        optimizer,
        world=World(0, 1, device),
        guard=Guard(device),
        autocast=run.autocast,
    )
    if run.graphed:
        call = GraphedUpdate(call, cast(torch.optim.AdamW, optimizer))

    def step(batch: Batch, rate: float) -> Tensor:
        set_learning_rate(optimizer, rate)
        return call(batch).loss.detach()

    return step


def published_update(run: Run, model: MaskedAutoencoder, config: ModelConfig, device: torch.device) -> Update:
    """The published formulation from the same weights, with the noise that gives the same masks."""
    published = PublishedMAE(config, "sdpa")
    published.load_state_dict(model.state_dict())
    published.to(device)
    optimizer = torch.optim.AdamW(parameter_groups(published, 0.05), betas=(0.9, 0.95))

    def step(batch: Batch, rate: float) -> Tensor:
        set_learning_rate(optimizer, rate)
        noise_BL = batch.plan.ids_restore.float()  # sorting places gives back the order that they are places in
        with torch.autocast(device.type, dtype=run.autocast, enabled=run.autocast is not None):
            loss = published(batch.images, noise_BL, MASK.ratio)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def running_mean(losses: list[float]) -> list[float]:
    """Means over WINDOW steps (fewer at the start)."""
    return [statistics.fmean(losses[max(0, i + 1 - WINDOW) : i + 1]) for i in range(len(losses))]


def rows_of(curves: dict[str, list[float]], seconds: dict[str, float]) -> list[list[str]]:
    """For each run: where it ends, and how far it parts from fp32."""
    exact = running_mean(curves["fp32"])
    rows = []
    for name, losses in curves.items():
        mean = running_mean(losses)
        parted = [a - b for a, b in zip(mean, exact, strict=True)]
        last = parted[-len(parted) // 3 :]
        rows.append(
            [
                name,
                f"{losses[0]:.6f}",
                f"{mean[-1]:.5f}",
                f"{max(map(abs, parted)):.5f}",
                f"{statistics.fmean(last):+.5f}",
                f"{seconds[name]:.0f}",
            ]
        )
    return rows


def draw(curves: dict[str, list[float]], name: str) -> None:
    """Curves, and their distances from fp32, as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    exact = running_mean(curves["fp32"])
    for number, (label, losses) in enumerate(curves.items()):
        mean, style = running_mean(losses), line_style(number)
        left.plot(mean, label=label, linewidth=1, **style)
        right.plot([a - b for a, b in zip(mean, exact, strict=True)], label=label, linewidth=1, **style)
    left.set(title=f"loss, mean over {WINDOW} steps", xlabel="step")
    right.set(title="less the loss in fp32", xlabel="step")
    right.legend(fontsize=8)
    figure.savefig(results_folder() / f"{name}.png", dpi=110)


def main(argv: list[str]) -> int:
    """Runs one arithmetic after the other and writes what there is after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=RECIPES, default="b16")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--images", type=int, default=2048, help="different ones")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32, also in the published convolution; products have none
    config = get_recipe(RECIPES[options.model]).model
    pictures, what = training_images(options.images, config.image_hw[0])
    images = pictures.to(device)
    facts = {"command": f"python -m benchmarks.bench_numerics {' '.join(argv)}", **timing.environment(str(device))}
    facts |= attention_facts(config, options.batch, str(device), BF16)
    facts["run"] = (
        f"{RECIPES[options.model]}, {options.steps} steps of {options.batch}, peak rate {PEAK_RATE:g}; {what}"
    )
    curves: dict[str, list[float]] = {}
    seconds: dict[str, float] = {}
    page, failed = "", 0
    for name, run in RUNS.items():
        if run.graphed and device.type == "cpu":
            continue
        start = time.perf_counter()
        try:
            curves[name] = curve(run, config, images, options.batch, options.steps)
        except RuntimeError:  # what cannot be compiled or captured here costs the others nothing
            if name == "fp32":
                raise
            traceback.print_exc()
            failed += 1
            continue
        seconds[name] = time.perf_counter() - start
        print(f"{name}: {curves[name][0]:.5f} to {curves[name][-1]:.5f} in {seconds[name]:.0f} s", flush=True)
        header = ["run", "first loss", f"last {WINDOW}", "furthest from fp32", "mean of the last third", "seconds"]
        data: dict[str, Any] = {"options": vars(options), "losses": curves, "seconds": seconds}
        file = f"numerics_{options.model}_{device.type}_{machine.today()}"
        table = markdown_table(header, rows_of(curves, seconds))
        page = write_page(file, "Loss curves in several arithmetics", facts, table, data)
        if importlib.util.find_spec("matplotlib"):
            draw(curves, file)
    print(page)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
