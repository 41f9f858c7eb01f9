"""report, a described machine -> [profile_plan] -> images per second, hours and cost there, measured or assumed.

The same model as the verdict's, with other servers: stages cost what they cost here, cores are as fast as these, and
the step is the measured one where the report comes from the same kind of GPU, else FLOPs over peak at an assumed MFU.
"""

from dataclasses import dataclass
from typing import Any

from patchmill.tools.profiler.bottleneck import CORES, DEVICE, GIL, STEP, STORAGE, Model, Stage, judge
from patchmill.trainer.flops import PEAK_BF16_FLOPS

SECONDS_AN_HOUR = 3600
COMPUTE_LIKE = ("plan", "bookkeeping")
"""stages that hold Python's lock"""


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


@dataclass(frozen=True)
class Line:
    """One number of the prediction."""

    what: str
    value: str
    basis: str
    """measured, given or assumed, and how"""


@dataclass(frozen=True)
class Plan:
    """The prediction."""

    images_per_s: float
    hours: float | None
    gpu_hours: float | None
    cost: float | None
    binds: str
    lines: list[Line]


def predict(report: dict[str, Any], plan: PlanConfig) -> Plan:
    """What a run would do on the described machine.

    Raises:
        ValueError: the report holds neither a loader nor a step.
    """
    loader, config = report.get("loader"), report["config"]
    if loader is None and "step" not in report:
        raise ValueError("a plan needs the rates of a loader or a step: profile loader, step or all")
    cores = plan.cores or 16 * plan.gpus
    seconds, step_basis = _step_seconds(report, plan)
    lines = [Line("step", f"{plan.gpus} x {1 / seconds:,.0f} images/s", step_basis)]
    stages, servers = [Stage(STEP, {DEVICE: seconds})], {DEVICE: plan.gpus * _scaling(plan)}
    if plan.gpus > 1:
        lines.append(
            Line("together", f"{servers[DEVICE] / seconds:,.0f} images/s", f"assumed: {plan.scaling:.0%} is left")
        )
    if loader is not None:
        for stage in loader["stages"]:
            cpu = stage["cpu"]["median"]
            held = {CORES: cpu} | ({GIL: cpu} if stage["name"] in COMPUTE_LIKE else {})
            stages.append(Stage(stage["name"], held))
        disk = loader["image_bytes"] / (plan.disk_mb_per_s * 1e6)
        stages.append(Stage("reading", {STORAGE: disk}))
        servers |= {CORES: float(cores), STORAGE: 1.0, GIL: float(plan.gpus)}
        used = sum(stage["cpu"]["median"] for stage in loader["stages"])
        given = "as given" if plan.cores else "assumed, 16 for each GPU"
        basis = f"measured: {1e6 * used:,.0f} µs of a core an image (decoder {loader['decoder']}); cores {given}"
        lines.append(Line("loader", f"{cores} cores: {cores / used:,.0f} images/s", basis))
        basis = f"measured: {loader['image_bytes'] / 1e3:,.0f} KB an image; the disk as given"
        lines.append(Line("storage", f"{plan.disk_mb_per_s:,.0f} MB/s: {1 / disk:,.0f} images/s", basis))
    verdict = judge(Model(stages, servers))
    lines.append(Line("the run", f"{verdict.images_per_s:,.0f} images/s", verdict.sentence))
    images, epochs = plan.images or (loader or {}).get("images", 0), plan.epochs or config["train"]["total_epochs"]
    if not images:
        return Plan(verdict.images_per_s, None, None, None, verdict.stage, lines)
    hours = images * epochs / verdict.images_per_s / SECONDS_AN_HOUR
    source = f"{'given' if plan.images else 'of the dataset'}; {'given' if plan.epochs else 'of the recipe'}"
    lines.append(Line("images x epochs", f"{images:,} x {epochs:g}", source))
    lines.append(
        Line("time", f"{hours:,.1f} h = {hours * plan.gpus:,.0f} GPU-hours", "follows; evaluation and stops left out")
    )
    cost = hours * plan.gpus * plan.price if plan.price else None
    if cost is not None:
        lines.append(Line("cost", f"{cost:,.0f}", f"at {plan.price:g} a GPU-hour, as given"))
    return Plan(verdict.images_per_s, hours, hours * plan.gpus, cost, verdict.stage, lines)


def _scaling(plan: PlanConfig) -> float:
    return plan.scaling if plan.gpus > 1 else 1.0


def _step_seconds(report: dict[str, Any], plan: PlanConfig) -> tuple[float, str]:
    """Device seconds of an image, and where they come from."""
    step = report.get("step")
    if step is not None and report["device"] == "cuda" and plan.gpu in report["machine"]["hardware"]:
        return step["seconds"]["median"] / step["batch"], f"measured on {report['machine']['hardware']}"
    flops, peak = report["flops_per_image"], PEAK_BF16_FLOPS[plan.gpu]
    basis = f"assumed: MFU {plan.mfu:.0%} of {plan.gpu}'s {peak / 1e12:,.0f} TFLOP/s, {flops / 1e9:.1f} GFLOPs an image"
    return flops / (peak * plan.mfu), basis
