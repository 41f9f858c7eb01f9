"""Predicts images per second, hours and cost on another machine; each number is measured, given or assumed.

The model is the verdict's with other servers: stages cost what they cost here, and cores are as fast as these. The step
is the measured one where the report comes from the same kind of GPU, else FLOPs over the peak at an assumed MFU.
"""

from dataclasses import dataclass
from typing import Any

from patchmill.tools.profiler.bottleneck import CORES, DEVICE, GIL, STEP, STORAGE, Model, Stage, judge
from patchmill.tools.profiler.loader_bound import HOLDERS
from patchmill.trainer.flops import PEAK_BF16_FLOPS


@dataclass(frozen=True)
class PlanConfig:
    """A machine and a run to predict."""

    gpus: int = 0
    """GPUs of the machine; 0: no prediction"""
    gpu: str = "H200"
    """their kind"""
    mfu: float = 0.4
    """assumed share of the GPU's peak, where the step was not measured on that kind"""
    cores: int = 0
    """cores of the machine; 0: 16 for each GPU"""
    disk_mb_per_s: float = 2000.0
    """what its storage gives"""
    images: int = 0
    """of the dataset; 0: as many as were profiled"""
    epochs: float = 0.0
    """of the run; 0: the recipe's"""
    scaling: float = 0.95
    """assumed share of the rate that is left when GPUs work together"""
    price: float = 0.0
    """of a GPU-hour; 0: no cost"""

    def __post_init__(self) -> None:
        if self.gpu not in PEAK_BF16_FLOPS:
            raise ValueError(f"the peak of GPU {self.gpu!r} is not known; choose from {', '.join(PEAK_BF16_FLOPS)}")
        for name in ("gpus", "cores", "images", "epochs", "price"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it cannot be negative")
        for name in ("mfu", "scaling"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be in (0, 1]")
        if self.disk_mb_per_s <= 0:
            raise ValueError(f"disk_mb_per_s is {self.disk_mb_per_s}; it must be positive")


def predict(report: dict[str, Any], plan: PlanConfig) -> dict[str, Any]:
    """Predicts a run on the described machine; docs/profile.md describes the result.

    Raises:
        ValueError: the report has neither a loader nor a step.
    """
    loader, config = report.get("loader"), report["config"]
    if loader is None and "step" not in report:
        raise ValueError("a plan needs the rates of a loader or a step: profile loader, step or all")
    lines: list[dict[str, str]] = []

    def say(what: str, value: str, basis: str) -> None:
        lines.append({"what": what, "value": value, "basis": basis})

    seconds, basis = _step_seconds(report, plan)
    say("step", f"{plan.gpus} x {1 / seconds:,.0f} images/s", basis)
    gpus = plan.gpus * plan.scaling if plan.gpus > 1 else plan.gpus
    stages, servers = [Stage(STEP, {DEVICE: seconds})], {DEVICE: float(gpus)}
    if plan.gpus > 1:
        say("together", f"{gpus / seconds:,.0f} images/s", f"assumed: {plan.scaling:.0%} is left")
    if loader is not None:
        cores, disk = plan.cores or 16 * plan.gpus, loader["image_bytes"] / (plan.disk_mb_per_s * 1e6)
        used = {stage["name"]: stage["cpu"]["median"] for stage in loader["stages"]}
        for name, cpu in used.items():
            stages.append(Stage(name, {CORES: cpu} | ({GIL: cpu} if GIL in HOLDERS.get(name, ()) else {})))
        stages.append(Stage("reading", {STORAGE: disk}))
        servers |= {CORES: float(cores), STORAGE: 1.0, GIL: float(plan.gpus)}
        total, given = sum(used.values()), "as given" if plan.cores else "assumed, 16 for each GPU"
        basis = f"measured: {1e6 * total:,.0f} µs of a core an image (decoder {loader['decoder']}); cores {given}"
        say("loader", f"{cores} cores: {cores / total:,.0f} images/s", basis)
        basis = f"measured: {loader['image_bytes'] / 1e3:,.0f} KB an image; the disk as given"
        say("storage", f"{plan.disk_mb_per_s:,.0f} MB/s: {1 / disk:,.0f} images/s", basis)
    verdict = judge(Model(stages, servers))
    rate = verdict.images_per_s
    say("the run", f"{rate:,.0f} images/s", verdict.sentence)
    images, epochs = plan.images or (loader or {}).get("images", 0), plan.epochs or config["train"]["total_epochs"]
    hours = gpu_hours = cost = None
    if images:
        hours = images * epochs / rate / 3600
        gpu_hours = hours * plan.gpus
        source = f"{'given' if plan.images else 'of the dataset'}; {'given' if plan.epochs else 'of the recipe'}"
        say("images x epochs", f"{images:,} x {epochs:g}", source)
        say("time", f"{hours:,.1f} h = {gpu_hours:,.0f} GPU-hours", "follows; without evaluation and stops")
        if plan.price:
            cost = gpu_hours * plan.price
            say("cost", f"{cost:,.0f}", f"at {plan.price:g} a GPU-hour, as given")
    return {
        "images_per_s": rate, "hours": hours, "gpu_hours": gpu_hours, "cost": cost, "binds": verdict.stage,
        "lines": lines,
    }  # fmt: skip


def _step_seconds(report: dict[str, Any], plan: PlanConfig) -> tuple[float, str]:
    """Returns the device seconds of an image, and their source."""
    step = report.get("step")
    if step is not None and report["device"] == "cuda" and plan.gpu in report["machine"]["hardware"]:
        return step["seconds"]["median"] / step["batch"], f"measured on {report['machine']['hardware']}"
    flops, peak = report["flops_per_image"], PEAK_BF16_FLOPS[plan.gpu]
    basis = f"assumed: MFU {plan.mfu:.0%} of {plan.gpu}'s {peak / 1e12:,.0f} TFLOP/s, {flops / 1e9:.1f} GFLOPs an image"
    return flops / (peak * plan.mfu), basis
