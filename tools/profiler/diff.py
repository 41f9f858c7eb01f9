"""two reports -> [patchmill profile diff] -> ratios, and whether they are more than noise: was the change one?"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from patchmill.tools.profiler.report import read

UNSPREAD = 0.05
"""taken for the spread of numbers that were measured once"""


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
    all: Annotated[bool, tyro.conf.arg(help="Parts and stages too that are the same within noise.")] = False


@dataclass(frozen=True)
class Number:
    """One number that two reports may share."""

    value: float
    spread: float
    """half of the interquartile range over the median"""
    unit: str
    more_is_better: bool


@dataclass(frozen=True)
class Change:
    """What became of a number."""

    name: str
    before: float
    after: float
    unit: str
    ratio: float
    """after over before"""
    verdict: str
    """better, worse, or within noise"""


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
        console.print(_table(shown))
    same = len(changes) - len(shown)
    if same:
        console.print(f"[dim]{same} more are the same within noise (--all shows them)")
    for name, report in (("A", a), ("B", b)):
        if "verdict" in report:
            console.print(f"[bold]{name}[/] {report['verdict']['sentence']}")
    return 0


def compare(a: dict[str, Any], b: dict[str, Any]) -> list[Change]:
    """Every number that both reports have, in the order of the report."""
    before, after = dict(_numbers(a)), dict(_numbers(b))
    changes = []
    for name in before.keys() & after.keys():
        old, new = before[name], after[name]
        if old.value <= 0:
            continue
        ratio = new.value / old.value
        noise = old.spread + new.spread
        if abs(ratio - 1) <= noise:
            verdict = "within noise"
        else:
            verdict = "better" if (ratio > 1) == old.more_is_better else "worse"
        changes.append(Change(name, old.value, new.value, old.unit, ratio, verdict))
    places = {name: place for place, name in enumerate(before)}
    return sorted(changes, key=lambda change: places[change.name])


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """What besides the change differs, so that a ratio may not be its work."""
    lines = [
        f"{name} differs: {a['machine'].get(name)} | {b['machine'].get(name)}"
        for name in ("hardware", "versions")
        if a["machine"].get(name) != b["machine"].get(name)
    ]
    lines += [
        f"{name} was measured while {report['noise']}" for name, report in (("A", a), ("B", b)) if report["noise"]
    ]
    for section in ("loader", "step", "train", "kernels"):
        sizes = [report.get(section, {}).get("batch") for report in (a, b)]
        if None not in sizes and sizes[0] != sizes[1]:
            lines.append(f"{section} was measured with batches of {sizes[0]} and {sizes[1]}")
    return lines


def _numbers(report: dict[str, Any]) -> Iterator[tuple[str, Number]]:
    if "train" in report:
        train = report["train"]
        yield "training, a step", _measured(train["step_seconds"], 1e3, "ms")
        yield "training, images/s", Number(train["images_per_s"], _spread(train["step_seconds"]), "", True)
    if "loader" in report:
        loader = report["loader"]
        together = loader["together"]
        spread = _spread(together["images_per_s"])
        yield "loader, images/s", Number(together["images_per_s"]["median"], spread, "", True)
        yield "loader, images per CPU-second", Number(together["images_per_cpu_s"], UNSPREAD, "", True)
        yield "loader, p99 between batches", Number(together["interval_p99_ms"], 2 * spread + UNSPREAD, "ms", False)
        for stage in loader["stages"]:
            yield f"stage {stage['name']}", _measured(stage["wall"], 1e6, "µs")
            yield f"stage {stage['name']}, on a core", _measured(stage["cpu"], 1e6, "µs")
        for name, reading in loader["storage"].items():
            yield f"storage {name}", Number(reading["mb_per_s"], 2 * UNSPREAD, "MB/s", True)
    if "step" in report:
        step = report["step"]
        spread = _spread(step["seconds"])
        per_image = step["seconds"]["median"] / step["batch"]
        yield "step, an image", Number(1e6 * per_image, spread, "µs", False)
        yield "step, MFU", Number(100 * step["mfu"], spread + UNSPREAD, "%", True)
        yield "step, memory", Number(step["memory_gb"], 0.01, "GiB", False)
        for part in step["parts"]:
            seconds = (part["forward"] + part["backward"]) / step["batch"]
            yield f"part {part['name']}", Number(1e6 * seconds, spread + UNSPREAD, "µs", False)
    if "kernels" in report:
        for row in report["kernels"]["operators"]:
            yield f"operator {row['name']}", _measured(row["seconds"], 1e6, "µs")


def _measured(measured: dict[str, float], factor: float, unit: str) -> Number:
    return Number(measured["median"] * factor, _spread(measured), unit, False)


def _spread(measured: dict[str, float]) -> float:
    return (measured["high"] - measured["low"]) / 2 / measured["median"] if measured["median"] else 0.0


def _table(changes: list[Change]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("", "A", "B", "B / A", ""):
        table.add_column(column, justify="left" if not column else "right")
    styles = {"better": "green", "worse": "red", "within noise": "dim"}
    for change in changes:
        values = [f"{value:,.4g} {change.unit}".rstrip() for value in (change.before, change.after)]
        table.add_row(change.name, *values, f"{change.ratio:.3f}", f"[{styles[change.verdict]}]{change.verdict}")
    return table
