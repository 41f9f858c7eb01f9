"""What mask tokens in the encoder cost: `python -m benchmarks.bench_mask_tokens --model l16 --batch 16`.

Table 1c of He et al. 2021 says 3.3 times the FLOPs, and 2.8 times the time for ViT-L (Table 2: 42.4 h against 15.4 h).
FLOPs are counted by torch while forward and backward run once, matrix products alone; time is that of forward and
backward in bf16, all models taking turns. The optimizer is left out: at any useful batch it does not count. What each
step costs whatever its batch (casting weights, adding up their gradients) does count: on a CPU take as large a batch as
memory allows.

On a CPU the clock is this process's CPU time, since other programs run there: with one thread (OMP_NUM_THREADS=1) that
is what the wall clock would show on a quiet machine.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.pages import markdown_table, write_page
from benchmarks.steps import RECIPES, random_images
from patchmill.pipeline.config import MaskConfig
from patchmill.pipeline.plan.masks import MaskPlan
from patchmill.tools.profiler.machine import today
from patchmill.tools.profiler.timing import Neighbours, environment, measured, timed_in_turns
from patchmill.trainer.config.model import ModelConfig
from patchmill.trainer.engine.world import hold_memory
from patchmill.trainer.model.build import build_model
from patchmill.trainer.recipes.pretrain import get_recipe

MODELS: dict[str, dict[str, Any]] = {"MAE": {}, "mask tokens in the encoder": {"encoder_mask_tokens": True}}
OTHERS: dict[str, dict[str, Any]] = {
    "SimMIM": {"kind": "simmim", "norm_pix_loss": False},
    "cross-attention decoder": {"kind": "crossmae"},
}


def gradient_step(config: ModelConfig, images_BHWC: Tensor) -> Callable[[], None]:
    """Forward and backward of a model of that config, in bf16."""
    model = build_model(config).to(images_BHWC.device)
    ids_B = torch.arange(len(images_BHWC), device=images_BHWC.device)
    plan = MaskPlan.draw(MaskConfig(), seed=0, epoch=0, sample_ids_B=ids_B, grid_hw=config.grid_hw)

    def step() -> None:
        with torch.autocast(images_BHWC.device.type, dtype=torch.bfloat16):
            loss = model(images_BHWC, plan).loss
        loss.backward()
        model.zero_grad(set_to_none=False)

    return step


def counted_flops(step: Callable[[], None]) -> int:
    """FLOPs of the matrix products and attentions of one call."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def main() -> int:
    """Measures and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=RECIPES, default="l16")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--others", action="store_true", help="SimMIM and the cross-attention decoder too")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    config, device = get_recipe(RECIPES[options.model]).model, torch.device(options.device)
    if device.type == "cpu":
        hold_memory()
    images = random_images(config, options.batch, device)
    models = MODELS | OTHERS if options.others else MODELS
    steps = {name: gradient_step(dataclasses.replace(config, **changes), images) for name, changes in models.items()}
    flops = {name: counted_flops(step) / options.batch for name, step in steps.items()}
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    with Neighbours() as neighbours:
        taken = timed_in_turns(steps, str(device), options.repeats, clock)
    seconds = {name: measured(values) for name, values in taken.items()}
    first = next(iter(models))
    rows = [
        [
            name,
            f"{flops[name] / 1e9:.1f}",
            f"{flops[name] / flops[first]:.2f}",
            f"{seconds[name]['median'] / options.batch:.4f}",
            f"{seconds[name]['low'] / options.batch:.4f} to {seconds[name]['high'] / options.batch:.4f}",
            f"{seconds[name]['median'] / seconds[first]['median']:.2f}",
        ]
        for name in models
    ]
    facts = {
        "command": f"`python -m benchmarks.bench_mask_tokens {' '.join(sys.argv[1:])}`",
        **environment(str(device)),
        "clock": "wall" if device.type == "cuda" else f"CPU time of the process; {neighbours.noise or 'quiet machine'}",
    }
    header = ["model", "GFLOP an image", "ratio", "s an image", "quartiles", "ratio"]
    title = f"Mask tokens in the encoder, {RECIPES[options.model]}, batch {options.batch}, 75 %, bf16, {device.type}"
    name = f"mask_tokens_{options.model}_{device.type}_{today()}"
    data = {"flops": flops, "seconds": {name: dataclasses.asdict(each) for name, each in seconds.items()}}
    print(write_page(name, title, facts, markdown_table(header, rows), data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
