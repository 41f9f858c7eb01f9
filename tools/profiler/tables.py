"""Turns a report into tables, for the terminal and the page, and prints them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich import table as rich_table
from rich.console import Console
from rich.panel import Panel

from patchmill.tools.profiler.bottleneck import counted, rounded

BAR = 24
"""characters of the longest bar"""


@dataclass(frozen=True)
class Table:
    """Text in rows.

    Attributes:
        columns: their names; those that begin with * hold numbers.
        bars: shares of the longest, one a row; empty for none. Only the terminal draws them.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    bars: Sequence[float] = ()


def tables(report: dict[str, Any]) -> Iterator[Table]:
    """Yields what a report has, the conclusions last."""
    for name, make in (("kernels", _kernels), ("step", _step), ("train", _train), ("loader", _loader), ("plan", _plan)):
        if name in report:
            yield from make(report[name])
    if "model" in report:
        yield _supplies(report["model"])
    if report.get("remedies"):
        rows = [(r["title"], f"x{r['gain']:.2f}", rounded(r["images_per_s"]), r["how"], r["basis"])
                for r in report["remedies"]]  # fmt: skip
        yield Table("what would help (predicted)", ("remedy", "*gain", "*images/s", "how", "its costs are"), rows)


def show(report: dict[str, Any], console: Console) -> None:
    """Prints a report, and its verdict last."""
    for table in tables(report):
        console.print(draw(table), "")
    if "verdict" in report:
        style = "green" if report["verdict"]["certain"] else "yellow"
        console.print(Panel(f"[bold]{report['verdict']['sentence']}", border_style=style))


def draw(table: Table) -> rich_table.Table:
    """Draws a table for the terminal."""
    drawn = rich_table.Table(
        title=table.title or None, title_justify="left", title_style="bold", box=None, pad_edge=False
    )
    drawn.show_header = any(table.columns)
    for number, column in enumerate(table.columns):
        drawn.add_column(column.lstrip("*"), justify="right" if "*" in column else "left", no_wrap=number == 0)
        if number == 0 and table.bars:
            drawn.add_column()
    for number, (first, *others) in enumerate(table.rows):
        bar = ["█" * max(1, round(BAR * min(table.bars[number], 1.0)))] if table.bars else []
        drawn.add_row(first, *bar, *others)
    return drawn


def _loader(loader: dict[str, Any]) -> Iterator[Table]:
    title = f"loader: decoder {loader['decoder']}, {loader['workers']} workers, batch {loader['batch']}"
    rows = [
        (
            stage["name"],
            _micro(stage["wall"]["median"]),
            f"{_micro(stage['wall']['low'])} to {_micro(stage['wall']['high'])}",
            _micro(stage["cpu"]["median"]),
            "" if stage["together"] is None else _micro(stage["together"]),
        )
        for stage in loader["stages"]
    ]
    columns = ("stage", "*µs an image", "*quartiles", "*on a core", "*in the running loader")
    yield Table(title, columns, rows, _shares([stage["wall"]["median"] for stage in loader["stages"]]))
    together = loader["together"]
    rate = together["images_per_s"]
    facts = [
        ("together", f"{rate['median']:,.0f} images/s (quartiles {rate['low']:,.0f} to {rate['high']:,.0f})"),
        ("", f"{together['images_per_cpu_s']:,.0f} images per CPU-second, {together['mb_per_s']:,.0f} MB/s of files"),
        (
            "between batches",
            f"{together['interval_p50_ms']:.1f} ms; p95 {together['interval_p95_ms']:.1f}, "
            f"p99 {together['interval_p99_ms']:.1f}; {together['queue_mean']:.1f} of {together['queue_size']} ready",
        ),
    ]
    for name, reading in loader["storage"].items():
        cached = "" if reading["from_cache"] is None else f" ({reading['from_cache']:.0%} from the page cache)"
        rates = f"{reading['mb_per_s']:,.0f} MB/s = {reading['images_per_s']:,.0f} images/s; a read "
        facts.append((f"storage, {name}", f"{rates}{reading['p50_ms']:.2f} ms, p99 {reading['p99_ms']:.2f}{cached}"))
    if loader["explained"] is not None:
        facts.append(("explained", f"{loader['explained']:.1%} of the wall time of the stages alone"))
    for name in dict.fromkeys(setting["name"] for setting in loader["sweep"]):
        points = [setting for setting in loader["sweep"] if setting["name"] == name]
        rates = ", ".join(f"{point['value']:g}: {point['images_per_s']['median']:,.0f}" for point in points)
        facts.append((f"sweep of {name}", f"{rates} images/s"))
    yield Table("the whole loader", ("", ""), facts)


def _step(step: dict[str, Any]) -> Iterator[Table]:
    seconds, parts = step["seconds"], step["parts"]
    rate = step["batch"] / seconds["median"]
    both = [part["forward"] + part["backward"] for part in parts]
    rows = [
        (part["name"], _milli(part["forward"]), _milli(part["backward"]) if part["backward"] else "",
         f"{total / step['profiled_seconds']:.1%}")
        for part, total in zip(parts, both, strict=True)
    ]  # fmt: skip
    yield Table("parts of the step", ("part", "*forward", "*backward", "*of the step"), rows, _shares(both))
    facts = [
        ("time", f"{_milli(seconds['median'])}{_spread(seconds)}, batch {step['batch']}: {rate:,.1f} images/s"),
        ("MFU", f"{step['mfu']:.1%} of {step['ceiling_flops'] / 1e12:.2f} TFLOP/s ({step['ceiling']})"),
        ("memory", f"{step['memory_gb']:.2f} GiB at most"),
        ("explained", f"{step['explained']:.1%} of the profiled step is in these parts"),
    ]
    yield Table("the step", ("", ""), facts)


def _train(train: dict[str, Any]) -> Iterator[Table]:
    seconds, wait = train["step_seconds"], f"{train['data_wait']:.1%} of the time"
    if train.get("host_wait", train["data_wait"]) != train["data_wait"]:  # a GPU: the host waits there for the device
        wait += f" ({train['host_wait']:.1%} for the host, which runs ahead)"
    facts = [
        ("rate", f"{train['images_per_s']:,.1f} images/s over {train['steps']} steps of {train['batch']}"),
        ("a step", f"{_milli(seconds['median'])}{_spread(seconds)}, p99 {train['p99_ms']:,.1f} ms"),
        ("data wait", f"{wait}; {train['overlap']:.1%} of the loader's work is hidden"),
        ("update", f"{train['update_share']:.1%}; metrics {train['meters_share']:.2%}"),
        ("slow steps", train["slow_steps"] or "none"),
        ("explained", f"{train['explained']:.1%} of the wall time of the loop"),
    ]
    if len(train["ranks"]) > 1:
        own = ", ".join(_milli(rank["own_seconds"]) for rank in train["ranks"])
        facts.append(("ranks", f"time a step before they meet: {own}"))
    yield Table("the training loop", ("", ""), facts)


def _kernels(kernels: dict[str, Any]) -> Iterator[Table]:
    title = f"operators ({kernels['backend']}, batch {kernels['batch']}) against a copy of "
    rows = [(row["name"], _micro(row["seconds"]["median"]), f"{row['mb']:,.1f}", f"{row['of_copy']:.0%}")
            for row in kernels["operators"]]  # fmt: skip
    columns = ("operator", "*µs", "*MB moved", "*of the copy")
    yield Table(
        f"{title}{kernels['copy_gb_per_s']:,.1f} GB/s", columns, rows, [row["of_copy"] for row in kernels["operators"]]
    )


def _plan(plan: dict[str, Any]) -> Iterator[Table]:
    rows = [(line["what"], line["value"], line["basis"]) for line in plan["lines"]]
    yield Table("what if", ("", "", "measured or assumed"), rows)


def _supplies(model: dict[str, Any]) -> Table:
    """The resource that binds first."""
    rows = []
    for resource, rate in model["supplies"].items():
        held = {stage["name"]: stage["holds"].get(resource, 0.0) for stage in model["stages"]}
        name = max(held, key=lambda stage: held[stage])
        most = f"{name} ({held[name] / sum(held.values()):.0%})"
        rows.append((counted(resource, model["servers"][resource]), rounded(rate), most))
    columns = ("resource", "*images/s", "most of it")
    return Table("what each resource could serve", columns, rows, _shares(list(model["supplies"].values())))


def _shares(values: list[float]) -> list[float]:
    return [value / max(values) for value in values]


def _micro(seconds: float) -> str:
    return f"{1e6 * seconds:,.1f}"


def _milli(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f} ms"


def _spread(measured: dict[str, float]) -> str:
    return f" (±{spread(measured):.0%})" if measured["median"] else ""


def spread(measured: dict[str, float]) -> float:
    """Returns half of the interquartile range over the median."""
    return (measured["high"] - measured["low"]) / 2 / measured["median"] if measured["median"] else 0.0
