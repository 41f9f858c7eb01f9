"""Measures how fast the update is, against what the device can do.

Images are random bytes on the device, so only the update is measured: forward, backward, guard and optimizer, as
`patchmill pretrain` runs them. The ceiling is the data sheet's bf16 peak where the device is known, else a large matrix
product, measured in the same run.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch

from patchmill.pipeline.batch import Batch
from patchmill.pipeline.plan.masks import MaskPlan
from patchmill.tools.profiler import timing
from patchmill.tools.profiler.bottleneck import STEP
from patchmill.tools.profiler.parts import count_forward, take_apart
from patchmill.tools.profiler.remedies import Trial
from patchmill.tools.profiler.timing import steps_in_turns, torch_threads
from patchmill.trainer.config.pretrain import PretrainConfig
from patchmill.trainer.engine.step import set_learning_rate
from patchmill.trainer.engine.world import World, autocast_dtype, hold_memory
from patchmill.trainer.flops import device_peak, train_flops_per_image
from patchmill.trainer.loop import Trainee
from patchmill.trainer.metrics import peak_memory_gb
from patchmill.trainer.pretrain import build_trainee
from patchmill.trainer.recipes.pretrain import with_options

LEARNING_RATE = 1e-4
STEPS_OF_A_TRIAL = 6
"""at least, of each side: warm-up and three measurements"""


def measure_step(config: PretrainConfig, device: torch.device, seconds: float, trace: Path | None) -> dict[str, Any]:
    """Measures updates for about `seconds`; docs/profile.md describes the result.

    Args:
        config: its train.global_batch is the batch that is measured, on one device.
        trace: file of the profiler's trace (.json.gz).
    """
    if device.type == "cpu":
        hold_memory()  # as pretraining does
    else:
        torch.cuda.reset_peak_memory_stats(device)
    trainee = build_trainee(config, World(0, 1, device))
    step = updates(config, trainee, device)
    taken, cpu = steps_in_turns({"": step}, device, 0.4 * seconds)[""]
    memory = peak_memory_gb(device)
    autocast = autocast_dtype(config.train.precision, device)
    peak = device_peak(device) if autocast is not None else None
    ceiling = peak or timing.matmul_flops_per_second(str(device), autocast or torch.float32)
    flops, batch = train_flops_per_image(config.model, config.mask), config.train.global_batch
    return {
        "batch": batch, "precision": str(autocast or torch.float32).removeprefix("torch."), "seconds": taken,
        "cpu_seconds": cpu, "flops_per_image": flops, "ceiling_flops": ceiling,
        "ceiling": "data sheet, dense bf16" if peak else "measured: a large matrix product",
        "copy_bytes": timing.copy_bytes_per_second(str(device), repeats=5),
        "mfu": flops * batch / taken["median"] / ceiling, "memory_gb": memory, **_parts(config, trainee, device, trace),
        "trials": _trials(config, device, step, taken["median"], seconds),
    }  # fmt: skip


def updates(config: PretrainConfig, trainee: Trainee, device: torch.device) -> Callable[[], object]:
    """Returns a function that does one update on random images, with masks drawn before."""
    batches = [synthetic_batch(config, device, seed) for seed in range(2)]
    numbers = count()
    set_learning_rate(trainee.optimizer, LEARNING_RATE)
    return lambda: trainee.update(batches[next(numbers) % len(batches)])


def synthetic_batch(config: PretrainConfig, device: torch.device, seed: int = 0) -> Batch:
    """Makes random images and masks of the config's size, on the device."""
    size = config.train.global_batch
    generator = torch.Generator().manual_seed(seed)
    shape = (size, *config.model.image_hw, config.model.channels)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)
    ids = torch.arange(size, device=device)
    plan = MaskPlan.draw(config.mask, seed=seed, epoch=0, sample_ids_B=ids, grid_hw=config.model.grid_hw)
    return Batch(images, plan, ids, ids, 0, 0)


def _parts(config: PretrainConfig, trainee: Trainee, device: torch.device, trace: Path | None) -> dict[str, Any]:
    """Splits the update into parts, and puts their forward passes on the roofline.

    The parts of a compiled or captured model cannot be told apart, so it is built again, eager.
    """
    if config.train.compile or config.train.cuda_graph:
        config = with_options(config, train__compile=False, train__cuda_graph=False)
        trainee = build_trainee(config, World(0, 1, device))
    step = updates(config, trainee, device)
    for _ in range(2):
        step()
    split = take_apart(trainee.model, step, device, trace)
    batch = synthetic_batch(config, device)
    autocast = autocast_dtype(config.train.precision, device)

    def forward() -> None:
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            trainee.model(batch.images, batch.plan)

    seconds = {part["name"]: part["forward"] for part in split["parts"]}
    points = [
        {"name": name, "flops": flops, "bytes": size, "seconds": seconds[name]}
        for name, (flops, size) in count_forward(trainee.model, forward).items()
        if seconds.get(name, 0.0) > 0 and size > 0
    ]
    return {**split, "roofline": points}


def _trials(
    config: PretrainConfig, device: torch.device, step: Callable[[], object], taken: float, seconds: float
) -> list[Trial]:
    """Measures other settings of the step, each in turn with the step as configured.

    Settings whose few steps would take longer than `seconds` are left out; a step takes `taken`.
    """
    batch, found = config.train.global_batch, []
    threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    if device.type == "cpu" and threads < cores:

        def on_all_cores() -> None:
            with torch_threads(cores):
                step()

        factors = _compare(step, on_all_cores, 1.0, device, seconds / 10)
        found.append(Trial(f"{cores} threads of torch", f"OMP_NUM_THREADS={cores}", *factors))
    others: list[tuple[str, str, dict[str, Any]]] = [
        (f"batches of {size}", f"--train.global-batch {size}", {"train__global_batch": size})
        for size in (2 * batch, max(1, batch // 2))
    ]
    if autocast_dtype(config.train.precision, device) is None and autocast_dtype("auto", device) is not None:
        others.insert(0, ("matrix products in bf16", "--train.precision bf16", {"train__precision": "bf16"}))
    for title, how, changes in others:
        changed = with_options(config, **changes)
        ratio = changed.train.global_batch / batch
        if taken * STEPS_OF_A_TRIAL * (1 + ratio) > seconds:
            continue
        try:
            other = updates(changed, build_trainee(changed, World(0, 1, device)), device)
            found.append(Trial(title, how, *_compare(step, other, 1 / ratio, device, seconds / 10)))
        except torch.OutOfMemoryError:
            continue
    return found


def _compare(
    now: Callable[[], object], then: Callable[[], object], per_image: float, device: torch.device, seconds: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Returns an image's cost after a change over that before: of the device, and of this host's cores."""
    (before, used_before), (after, used) = steps_in_turns({"now": now, "then": then}, device, seconds).values()
    return {STEP: after["median"] / before["median"] * per_image}, {STEP: used / used_before * per_image}


def fitting_batch(
    config: PretrainConfig, device: torch.device, wanted: int | None = None, ranks: int = 1
) -> PretrainConfig:
    """Returns the config with the batch to measure on one device, in one part.

    The batch is the wanted one, else the recipe's; on a CPU no more than about a second of arithmetic.
    """
    batch = wanted or max(1, config.train.global_batch // config.train.accum_steps // ranks)
    if wanted is None and device.type == "cpu":
        most = max(1, int(1e12 / train_flops_per_image(config.model, config.mask)))
        batch = min(batch, 1 << (most.bit_length() - 1))
    repeats = config.data.repeats
    batch = max(1, batch // repeats) * repeats
    return replace(config, train=replace(config.train, global_batch=batch, accum_steps=1))
