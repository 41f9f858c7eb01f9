"""Turns a report into tables, for the terminal and the page, and prints them."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from patchmill.tools.profiler.bottleneck import counted, rounded
from patchmill.tools.profiler.timing import spread

BAR = 24
"""characters of the longest bar"""


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], bars: Sequence[float] = ()) -> Table:
    """Makes a table of text.

    Args:
        columns: their names; those that begin with * hold numbers. A column of bars is added after the first.
        bars: values to compare, one a row; empty for none.
    """
    made = Table(title=title or None, title_justify="left", title_style="bold", box=None, pad_edge=False)
    made.show_header = any(columns)
    for column in columns:
        made.add_column(column.lstrip("*"), justify="right" if "*" in column else "left", no_wrap=not made.columns)
        if bars and len(made.columns) == 1:
            made.add_column()
    for number, (first, *others) in enumerate(rows):
        bar = ["█" * max(1, round(BAR * bars[number] / max(bars)))] if bars else []
        made.add_row(escape(first), *bar, *map(escape, others))
    return made


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
        yield table("what would help (predicted)", ("remedy", "*gain", "*images/s", "how", "its costs are"), rows)


def show(report: dict[str, Any], console: Console) -> None:
    """Prints a report, and its verdict last."""
    for each in tables(report):
        console.print(each, "")
    if "verdict" in report:
        style = "green" if report["verdict"]["certain"] else "yellow"
        console.print(Panel(f"[bold]{report['verdict']['sentence']}", border_style=style))


def _loader(loader: dict[str, Any]) -> Iterator[Table]:
    title = f"loader: decoder {loader['decoder']}, {loader['workers']} workers, batch {loader['batch']}"
    rows = []
    for stage in loader["stages"]:
        wall = stage["wall"]
        together = "" if stage["together"] is None else _micro(stage["together"])
        quartiles = f"{_micro(wall['low'])} to {_micro(wall['high'])}"
        rows.append((stage["name"], _micro(wall["median"]), quartiles, _micro(stage["cpu"]["median"]), together))
    columns = ("stage", "*µs an image", "*quartiles", "*on a core", "*in the running loader")
    yield table(title, columns, rows, [stage["wall"]["median"] for stage in loader["stages"]])
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
    yield table("the whole loader", ("", ""), facts)


def _step(step: dict[str, Any]) -> Iterator[Table]:
    rows, both = [], [part["forward"] + part["backward"] for part in step["parts"]]
    for part, total in zip(step["parts"], both, strict=True):
        backward = _milli(part["backward"]) if part["backward"] else ""
        rows.append((part["name"], _milli(part["forward"]), backward, f"{total / step['profiled_seconds']:.1%}"))
    yield table("parts of the step", ("part", "*forward", "*backward", "*of the step"), rows, both)
    rate = step["batch"] / step["seconds"]["median"]
    facts = [
        ("time", f"{_step_time(step['seconds'])}, batch {step['batch']}: {rate:,.1f} images/s"),
        ("MFU", f"{step['mfu']:.1%} of {step['ceiling_flops'] / 1e12:.2f} TFLOP/s ({step['ceiling']})"),
        ("memory", f"{step['memory_gb']:.2f} GiB at most"),
        ("explained", f"{step['explained']:.1%} of the profiled step is in these parts"),
    ]
    yield table("the step", ("", ""), facts)


def _train(train: dict[str, Any]) -> Iterator[Table]:
    wait = f"{train['data_wait']:.1%} of the time"
    if train.get("host_wait", train["data_wait"]) != train["data_wait"]:  # a GPU: the host waits there for the device
        wait += f" ({train['host_wait']:.1%} for the host, which runs ahead)"
    facts = [
        ("rate", f"{train['images_per_s']:,.1f} images/s over {train['steps']} steps of {train['batch']}"),
        ("a step", f"{_step_time(train['step_seconds'])}, p99 {train['p99_ms']:,.1f} ms"),
        ("data wait", f"{wait}; {train['overlap']:.1%} of the loader's work is hidden"),
        ("update", f"{train['update_share']:.1%}; metrics {train['meters_share']:.2%}"),
        ("slow steps", train["slow_steps"] or "none"),
        ("explained", f"{train['explained']:.1%} of the wall time of the loop"),
    ]
    if len(train["ranks"]) > 1:
        own = ", ".join(_milli(rank["own_seconds"]) for rank in train["ranks"])
        facts.append(("ranks", f"time a step before they meet: {own}"))
    yield table("the training loop", ("", ""), facts)


def _kernels(kernels: dict[str, Any]) -> Iterator[Table]:
    title = (
        f"operators ({kernels['backend']}, batch {kernels['batch']}) against a copy of "
        f"{kernels['copy_gb_per_s']:,.1f} GB/s"
    )
    rows = [(row["name"], _micro(row["seconds"]["median"]), f"{row['mb']:,.1f}", f"{row['of_copy']:.0%}")
            for row in kernels["operators"]]  # fmt: skip
    shares = [row["of_copy"] for row in kernels["operators"]]
    yield table(title, ("operator", "*µs", "*MB moved", "*of the copy"), rows, shares)


def _plan(plan: dict[str, Any]) -> Iterator[Table]:
    rows = [(line["what"], line["value"], line["basis"]) for line in plan["lines"]]
    yield table("what if", ("", "", "measured or assumed"), rows)


def _supplies(model: dict[str, Any]) -> Table:
    """The resource that binds first."""
    rows = []
    for resource, rate in model["supplies"].items():
        held = {stage["name"]: stage["holds"].get(resource, 0.0) for stage in model["stages"]}
        name = max(held, key=lambda stage: held[stage])
        most = f"{name} ({held[name] / sum(held.values()):.0%})"
        rows.append((counted(resource, model["servers"][resource]), rounded(rate), most))
    columns = ("resource", "*images/s", "most of it")
    return table("what each resource could serve", columns, rows, list(model["supplies"].values()))


def _micro(seconds: float) -> str:
    return f"{1e6 * seconds:,.1f}"


def _milli(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f} ms"


def _step_time(measured: dict[str, Any]) -> str:
    return f"{_milli(measured['median'])} (±{spread(measured):.0%})"
