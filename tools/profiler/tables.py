"""report -> [profile_tables] -> the terminal: the verdict, what it rests on, and what would help."""

from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table

from patchmill.tools.profiler.bottleneck import rounded

BAR = 24


def show(report: dict[str, Any], console: Console) -> None:
    """Prints a report."""
    for name, draw in (("kernels", _kernels), ("step", _step), ("train", _train), ("loader", _loader), ("plan", _plan)):
        if name in report:
            console.print(draw(report[name]), "")
    if "model" in report:
        console.print(_supplies(report), "")
    if report.get("remedies"):
        console.print(_remedies(report["remedies"]), "")
    if "verdict" in report:
        certain = report["verdict"]["certain"]
        console.print(Panel(f"[bold]{report['verdict']['sentence']}", border_style="green" if certain else "yellow"))


def _loader(loader: dict[str, Any]) -> Group:
    title = f"loader: decoder {loader['decoder']}, {loader['workers']} workers, batch {loader['batch']}"
    table = _table(title, "stage", "", "µs an image", "spread", "CPU µs", "in the loader")
    longest = max(stage["wall"]["median"] for stage in loader["stages"])
    for stage in loader["stages"]:
        wall = stage["wall"]
        together = "" if stage["together"] is None else f"{stage['together'] * 1e6:,.0f}"
        table.add_row(
            stage["name"],
            bar(wall["median"] / longest),
            f"{wall['median'] * 1e6:,.1f}",
            _spread(wall),
            f"{stage['cpu']['median'] * 1e6:,.1f}",
            together,
        )
    together = loader["together"]
    facts = _facts()
    rate = together["images_per_s"]
    facts.add_row("together", f"{rate['median']:,.0f} images/s (quartiles {rate['low']:,.0f} to {rate['high']:,.0f})")
    facts.add_row(
        "", f"{together['images_per_cpu_s']:,.0f} images per CPU-second, {together['mb_per_s']:,.0f} MB/s of files"
    )
    facts.add_row(
        "between batches",
        f"{together['interval_p50_ms']:.1f} ms; p95 {together['interval_p95_ms']:.1f}, "
        f"p99 {together['interval_p99_ms']:.1f}; {together['queue_mean']:.1f} of {together['queue_size']} lay ready",
    )
    for name, reading in loader["storage"].items():
        facts.add_row(f"storage, {name}", _reading(reading))
    if loader["explained"] is not None:
        facts.add_row("explained", f"{loader['explained']:.1%} of the wall time of the stages' inline pass")
    for name in dict.fromkeys(setting["name"] for setting in loader["sweep"]):
        points = [setting for setting in loader["sweep"] if setting["name"] == name]
        rates = ", ".join(f"{point['value']:g}: {point['images_per_s']['median']:,.0f}" for point in points)
        facts.add_row(f"sweep of {name}", f"{rates} images/s")
    return Group(table, facts)


def _reading(reading: dict[str, Any]) -> str:
    text = f"{reading['mb_per_s']:,.0f} MB/s = {reading['images_per_s']:,.0f} images/s; a read "
    text += f"{reading['p50_ms']:.2f} ms, p99 {reading['p99_ms']:.2f}"
    cached = reading["from_cache"]
    return text + ("" if cached is None else f" ({cached:.0%} from the page cache)")


def _step(step: dict[str, Any]) -> Group:
    seconds = step["seconds"]
    facts = _facts()
    rate = step["batch"] / seconds["median"]
    facts.add_row("step", f"{seconds['median'] * 1e3:,.1f} ms, batch {step['batch']}: {rate:,.1f} images/s")
    facts.add_row("spread", _spread(seconds))
    facts.add_row("MFU", f"{step['mfu']:.1%} of {step['ceiling_flops'] / 1e12:.2f} TFLOP/s ({step['ceiling']})")
    facts.add_row("memory", f"{step['memory_gb']:.2f} GiB at most")
    table = _table("parts of the step", "part", "", "forward", "backward", "of the step")
    parts = sorted(step["parts"], key=lambda part: -(part["forward"] + part["backward"]))
    longest = parts[0]["forward"] + parts[0]["backward"] if parts else 1.0
    for part in parts:
        both = part["forward"] + part["backward"]
        table.add_row(
            part["name"],
            bar(both / longest),
            f"{part['forward'] * 1e3:,.2f} ms",
            f"{part['backward'] * 1e3:,.2f} ms" if part["backward"] else "",
            f"{both / step['profiled_seconds']:.1%}",
        )
    facts.add_row("explained", f"{step['explained']:.1%} of the profiled step lies in these parts")
    return Group(table, facts)


def _train(train: dict[str, Any]) -> Group:
    facts = _facts()
    seconds = train["step_seconds"]
    facts.add_row("training", f"{train['images_per_s']:,.1f} images/s over {train['steps']} steps of {train['batch']}")
    facts.add_row("a step", f"{seconds['median'] * 1e3:,.1f} ms ({_spread(seconds)}), p99 {train['p99_ms']:,.1f}")
    facts.add_row(
        "data wait", f"{train['data_wait']:.1%} of the time; {train['overlap']:.1%} of the loader's is hidden"
    )
    facts.add_row("update", f"{train['update_share']:.1%}; metrics {train['meters_share']:.2%}")
    facts.add_row("slow steps", train["slow_steps"] or "none")
    if len(train["ranks"]) > 1:
        own = ", ".join(f"{1e3 * rank['own_seconds']:,.1f}" for rank in train["ranks"])
        facts.add_row("ranks", f"their own ms a step before they meet: {own}")
    facts.add_row("explained", f"{train['explained']:.1%} of the wall time of the loop")
    return Group("[bold]the training loop", facts)


def _kernels(kernels: dict[str, Any]) -> Table:
    title = f"operators ({kernels['backend']}, batch {kernels['batch']}) against a copy of "
    table = _table(title + f"{kernels['copy_gb_per_s']:,.1f} GB/s", "operator", "", "µs", "MB moved", "of the copy")
    for row in kernels["operators"]:
        share = row["of_copy"]
        table.add_row(
            row["name"], bar(share), f"{row['seconds']['median'] * 1e6:,.0f}", f"{row['mb']:,.1f}", f"{share:.0%}"
        )
    return table


def _plan(plan: dict[str, Any]) -> Group:
    table = _table("what if", "", "", "")
    table.show_header = False
    for line in plan["lines"]:
        table.add_row(line["what"], line["value"], f"[dim]{line['basis']}")
    return Group(table)


def _supplies(report: dict[str, Any]) -> Table:
    table = _table("what each resource could serve", "resource", "", "images/s", "most of it")
    model = report["model"]
    most = max(model["supplies"].values())
    for resource, rate in model["supplies"].items():
        held = {stage["name"]: stage["holds"].get(resource, 0.0) for stage in model["stages"]}
        name = max(held, key=lambda stage: held[stage])
        style = "bold" if resource == report["verdict"]["resource"] else ""
        share = held[name] / sum(held.values())
        servers = model["servers"][resource]
        count = f"{round(servers, 1):g} {resource}" if servers != 1 else resource
        table.add_row(count, bar(rate / most), rounded(rate), f"{name} ({share:.0%})", style=style)
    return table


def _remedies(remedies: list[dict[str, Any]]) -> Table:
    table = _table("what would help (predicted gain)", "remedy", "gain", "how")
    for remedy in remedies:
        table.add_row(remedy["title"], f"x{remedy['gain']:.2f}", remedy["how"])
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        words = number == 0 or column in ("", "how", "most of it")
        table.add_column(column, justify="left" if words else "right", no_wrap=number == 0)
    return table


def _facts() -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    return table


def _spread(measured: dict[str, Any]) -> str:
    half = (measured["high"] - measured["low"]) / 2
    return f"±{half / measured['median']:.0%}" if measured["median"] else ""


def bar(share: float) -> str:
    """A bar of up to 24 characters, one at least."""
    return "█" * max(1, round(BAR * min(share, 1.0)))
