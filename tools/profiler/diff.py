"""Compares two reports: ratios, and which of them are more than noise."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro
from rich.console import Console

from patchmill.tools.profiler.bottleneck import rounded
from patchmill.tools.profiler.report import read
from patchmill.tools.profiler.tables import table
from patchmill.tools.profiler.timing import spread

UNSPREAD = 0.05
"""assumed spread of numbers that were measured once"""
STYLES = {"better": "green", "worse": "red", "within noise": "dim"}


@dataclass(frozen=True)
class DiffArgs:
    """Compares two reports of `patchmill profile`: ratios of B to A, and which of them are more than noise.

    Example:
        patchmill profile diff before after
    """

    a: tyro.conf.Positional[Path]
    """Folder or report.json of before."""
    b: tyro.conf.Positional[Path]
    """Folder or report.json of after."""
    all: Annotated[bool, tyro.conf.arg(help="Also show parts and stages that are the same within noise.")] = False


class Number(NamedTuple):
    """One number of a report; its spread is half of the interquartile range over the median."""

    name: str
    value: float
    spread: float
    unit: str
    more_is_better: bool = False


class Change(NamedTuple):
    """A number in two reports; the ratio is after over before, the verdict better, worse or within noise."""

    name: str
    before: float
    after: float
    unit: str
    ratio: float
    verdict: str


def show(args: DiffArgs) -> int:
    """Prints the comparison."""
    a, b = read(args.a), read(args.b)
    changes = compare(a, b)
    if not changes:
        raise ValueError(
            f"{args.a} (profile {a['mode']}) and {args.b} (profile {b['mode']}) measured nothing in common"
        )
    console = Console()
    for line in differences(a, b):
        console.print(f"[yellow]{line}")
    shown = [change for change in changes if args.all or change.verdict != "within noise"]
    if shown:
        rows = [
            (name, *(f"{rounded(value)} {unit}".rstrip() for value in (before, after)), f"{ratio:.3f}", verdict)
            for name, before, after, unit, ratio, verdict in shown
        ]
        drawn = table("", ("", "*A", "*B", "*B / A", ""), rows)
        for row, change in zip(drawn.rows, shown, strict=True):
            row.style = STYLES[change.verdict]
        console.print(drawn)
    if same := len(changes) - len(shown):
        console.print(f"[dim]{same} more are the same within noise (--all shows them)")
    for name, report in (("A", a), ("B", b)):
        if "verdict" in report:
            console.print(f"[bold]{name}[/] {report['verdict']['sentence']}")
    return 0


def compare(a: dict[str, Any], b: dict[str, Any]) -> list[Change]:
    """Compares every number that both reports have, in the order of the first."""
    changes, after = [], {number.name: number for number in numbers(b)}
    for old in numbers(a):
        new = after.get(old.name)
        if new is None or old.value <= 0:
            continue
        ratio = new.value / old.value
        verdict = "better" if (ratio > 1) == old.more_is_better else "worse"
        if abs(ratio - 1) <= old.spread + new.spread:
            verdict = "within noise"
        changes.append(Change(old.name, old.value, new.value, old.unit, ratio, verdict))
    return changes


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Lists what else differs and may explain a ratio."""
    lines = []
    for name in ("hardware", "versions"):
        before, after = a["machine"].get(name), b["machine"].get(name)
        if before != after:
            lines.append(f"{name} differs: {before} | {after}")
    lines += [f"{name} was measured while {each['noise']}" for name, each in (("A", a), ("B", b)) if each["noise"]]
    for section in ("loader", "step", "train", "kernels"):
        first, second = (report.get(section, {}).get("batch") for report in (a, b))
        if first and second and first != second:
            lines.append(f"{section} was measured with batches of {first} and {second}")
    return lines


def numbers(report: dict[str, Any]) -> Iterator[Number]:
    """Yields the numbers that two reports may share."""
    if train := report.get("train"):
        yield _measured("training, a step", train["step_seconds"], 1e3, "ms")
        yield Number("training, images/s", train["images_per_s"], spread(train["step_seconds"]), "", True)
    if loader := report.get("loader"):
        together, noise = loader["together"], spread(loader["together"]["images_per_s"])
        yield Number("loader, images/s", together["images_per_s"]["median"], noise, "", True)
        yield Number("loader, images per CPU-second", together["images_per_cpu_s"], UNSPREAD, "", True)
        yield Number("loader, p99 between batches", together["interval_p99_ms"], 2 * noise + UNSPREAD, "ms")
        for stage in loader["stages"]:
            yield _measured(f"stage {stage['name']}", stage["wall"], 1e6, "µs")
            yield _measured(f"stage {stage['name']}, on a core", stage["cpu"], 1e6, "µs")
        for name, reading in loader["storage"].items():
            yield Number(f"storage {name}", reading["mb_per_s"], 2 * UNSPREAD, "MB/s", True)
    if step := report.get("step"):
        noise, per_image = spread(step["seconds"]), 1e6 / step["batch"]
        yield Number("step, an image", per_image * step["seconds"]["median"], noise, "µs")
        yield Number("step, MFU", 100 * step["mfu"], noise + UNSPREAD, "%", True)
        yield Number("step, memory", step["memory_gb"], 0.01, "GiB")
        for part in step["parts"]:
            seconds = part["forward"] + part["backward"]
            yield Number(f"part {part['name']}", per_image * seconds, noise + UNSPREAD, "µs")
    for row in report.get("kernels", {}).get("operators", []):
        yield _measured(f"operator {row['name']}", row["seconds"], 1e6, "µs")


def _measured(name: str, measured: dict[str, float], factor: float, unit: str) -> Number:
    return Number(name, measured["median"] * factor, spread(measured), unit)
