"""synthetic batches -> [patchmill profile step] -> how fast the update is, against what the device can do.

Images are random bytes that lie on the device, so that nothing but the update is measured: forward, backward, guard and
optimizer as `patchmill pretrain` runs them. The ceiling is the data sheet's bf16 peak where the device is known, else a
large matrix product and a large copy, measured in the same run.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import torch

from patchmill.pipeline.batch import Batch
from patchmill.pipeline.plan.masks import MaskPlan
from patchmill.tools.profiler.bottleneck import STEP
from patchmill.tools.profiler.parts import Part, Parts, count_forward, take_apart
from patchmill.tools.profiler.remedies import Trial
from patchmill.tools.profiler.timing import (
    Measured,
    copy_bytes_per_second,
    matmul_flops_per_second,
    torch_threads,
    wait_for,
)
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
"""at least, of each of the two sides: warm-up and three measurements"""
ROUND_SECONDS = 0.05
"""a measurement lasts as long at least: short steps are timed several at once"""


@dataclass(frozen=True)
class Point:
    """One point of the roofline: a part's forward pass."""

    name: str
    flops: float
    bytes: float
    seconds: float


@dataclass(frozen=True)
class StepProfile:
    """One update on one device."""

    batch: int
    precision: str
    seconds: Measured
    cpu_seconds: float
    """of this process, for one update"""
    flops_per_image: float
    ceiling_flops: float
    ceiling: str
    """where the ceiling of arithmetic comes from"""
    copy_bytes: float
    """per second, read and written, of a large copy on the device"""
    mfu: float
    memory_gb: float
    parts: list[Part]
    profiled_seconds: float
    explained: float
    """share of the profiled update that lies in the parts"""
    roofline: list[Point]
    trials: list[Trial]

    @property
    def seconds_per_image(self) -> float:
        """Of the device."""
        return self.seconds.median / self.batch


def measure_step(config: PretrainConfig, device: torch.device, seconds: float, trace: Path | None) -> StepProfile:
    """Measures updates for about `seconds`.

    Args:
        config: its train.global_batch is the batch that is measured, on one device.
        trace: where the profiler's trace goes (.json.gz); None writes none.
    """
    if device.type == "cpu":
        hold_memory()  # as pretraining does
    else:
        torch.cuda.reset_peak_memory_stats(device)
    trainee = build_trainee(config, World(0, 1, device))
    step = updates(config, trainee, device)
    times, cpu = time_steps({"": step}, device, 0.4 * seconds)
    taken = Measured.of(times[""])
    memory = peak_memory_gb(device)
    autocast = autocast_dtype(config.train.precision, device)
    peak = device_peak(device) if autocast is not None else None
    ceiling = peak or matmul_flops_per_second(str(device), autocast or torch.float32)
    flops = train_flops_per_image(config.model, config.mask)
    parts, points = _parts(config, trainee, device, trace)
    batch = config.train.global_batch
    return StepProfile(
        batch=batch,
        precision=str(autocast or torch.float32).removeprefix("torch."),
        seconds=taken,
        cpu_seconds=cpu[""],
        flops_per_image=flops,
        ceiling_flops=ceiling,
        ceiling="data sheet, dense bf16" if peak else "measured: a large matrix product",
        copy_bytes=copy_bytes_per_second(str(device), repeats=5),
        mfu=flops * batch / taken.median / ceiling,
        memory_gb=memory,
        parts=parts.parts,
        profiled_seconds=parts.wall,
        explained=parts.explained,
        roofline=points,
        trials=_trials(config, device, step, taken.median, seconds),
    )


def updates(config: PretrainConfig, trainee: Trainee, device: torch.device) -> Callable[[], object]:
    """One update after the other on random images, masks drawn before."""
    batches = [synthetic_batch(config, device, seed) for seed in range(2)]
    numbers = count()
    set_learning_rate(trainee.optimizer, LEARNING_RATE)
    return lambda: trainee.update(batches[next(numbers) % len(batches)])


def synthetic_batch(config: PretrainConfig, device: torch.device, seed: int = 0) -> Batch:
    """Random images and masks of the config's size, on the device."""
    size = config.train.global_batch
    generator = torch.Generator().manual_seed(seed)
    shape = (size, *config.model.image_hw, config.model.channels)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)
    ids = torch.arange(size, device=device)
    plan = MaskPlan.draw(config.mask, seed=seed, epoch=0, sample_ids_B=ids, grid_hw=config.model.grid_hw)
    return Batch(images, plan, ids, ids, 0, 0)


def time_steps(
    steps: dict[str, Callable[[], object]], device: torch.device, seconds: float
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of a step of each candidate, in turn, at least three times; and mean CPU seconds of this process."""
    at_once: dict[str, int] = {}
    for name, step in steps.items():
        for _ in range(2):
            step()
        wait_for(device)
        start = time.perf_counter()
        step()
        wait_for(device)
        at_once[name] = max(1, round(ROUND_SECONDS / (time.perf_counter() - start)))
    taken: dict[str, list[float]] = {name: [] for name in steps}
    used = dict.fromkeys(steps, 0.0)
    end = time.perf_counter() + seconds
    while min(map(len, taken.values())) < 3 or time.perf_counter() < end:
        for name, step in steps.items():
            start, cpu = time.perf_counter(), time.process_time()
            for _ in range(at_once[name]):
                step()
            wait_for(device)
            taken[name].append((time.perf_counter() - start) / at_once[name])
            used[name] += time.process_time() - cpu
    return taken, {name: used[name] / len(taken[name]) / at_once[name] for name in steps}


def _parts(
    config: PretrainConfig, trainee: Trainee, device: torch.device, trace: Path | None
) -> tuple[Parts, list[Point]]:
    """The update taken apart, and its forward pass on the roofline.

    A compiled or captured model is built anew, eager: inside of it no part can be told from another.
    """
    if config.train.compile or config.train.cuda_graph:
        config = with_options(config, train__compile=False, train__cuda_graph=False)
        trainee = build_trainee(config, World(0, 1, device))
    step = updates(config, trainee, device)
    for _ in range(2):
        step()
    parts = take_apart(trainee.model, step, device, trace)
    batch = synthetic_batch(config, device)
    autocast = autocast_dtype(config.train.precision, device)

    def forward() -> None:
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            trainee.model(batch.images, batch.plan)

    counts = count_forward(trainee.model, forward)
    seconds = {part.name: part.forward for part in parts.parts}
    points = [
        Point(name, flops, size, seconds[name])
        for name, (flops, size) in counts.items()
        if seconds.get(name, 0.0) > 0 and size > 0
    ]
    return parts, points


def _trials(
    config: PretrainConfig, device: torch.device, step: Callable[[], object], taken: float, seconds: float
) -> list[Trial]:
    """Other settings of the step, each in turn with the step as it is: seconds an image over those of now.

    Settings whose few steps would take longer than `seconds` are left out; a step takes `taken`.
    """
    batch = config.train.global_batch
    others: list[tuple[str, str, PretrainConfig]] = []
    if autocast_dtype(config.train.precision, device) is None and autocast_dtype("auto", device) is not None:
        how = "--train.precision bf16"
        others.append(("matrix products in bf16", how, with_options(config, train__precision="bf16")))
    for size in (2 * batch, max(1, batch // 2)):
        how = f"--train.global-batch {size}"
        others.append((f"batches of {size}", how, with_options(config, train__global_batch=size)))
    found = []
    threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    if device.type == "cpu" and threads < cores:
        factors = _compare(step, _with_threads(step, cores), 1.0, device, seconds / 10)
        found.append(Trial(f"{cores} threads of torch", f"OMP_NUM_THREADS={cores}", *factors))
    for title, how, changed in others:
        if taken * (STEPS_OF_A_TRIAL + STEPS_OF_A_TRIAL * changed.train.global_batch / batch) > seconds:
            continue
        try:
            other = updates(changed, build_trainee(changed, World(0, 1, device)), device)
            factors = _compare(step, other, batch / changed.train.global_batch, device, seconds / 10)
        except torch.OutOfMemoryError:
            continue
        found.append(Trial(title, how, *factors))
    return found


def _compare(
    now: Callable[[], object], then: Callable[[], object], per_image: float, device: torch.device, seconds: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Costs of an image after a change over those before: of the device, and of this host's cores."""
    taken, used = time_steps({"now": now, "then": then}, device, seconds)
    wall = Measured.of(taken["then"]).median / Measured.of(taken["now"]).median
    return {STEP: wall * per_image}, {STEP: used["then"] / used["now"] * per_image}


def _with_threads(step: Callable[[], object], threads: int) -> Callable[[], object]:
    """The step on another number of torch's threads."""

    def run() -> None:
        with torch_threads(threads):
            step()

    return run


def fitting_batch(
    config: PretrainConfig, device: torch.device, wanted: int | None = None, ranks: int = 1
) -> PretrainConfig:
    """The config with the batch that one of its devices is measured with, in one part.

    It is what was asked for, else the recipe's own; on a CPU no more than about a second of arithmetic.
    """
    batch = wanted or max(1, config.train.global_batch // config.train.accum_steps // ranks)
    if wanted is None and device.type == "cpu":
        most = max(1, int(1e12 / train_flops_per_image(config.model, config.mask)))
        batch = min(batch, 1 << (most.bit_length() - 1))
    repeats = config.data.repeats
    batch = max(1, batch // repeats) * repeats
    return replace(config, train=replace(config.train, global_batch=batch, accum_steps=1))
