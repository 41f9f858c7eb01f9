"""Draws the charts of a report: resources, remedies, stages, sweep, step times, parts, roofline, kernels.

Each chart is a function that draws on one pair of axes; the page (SVG) and the PNGs show the same pictures. A chart
whose data the report lacks is not drawn.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from patchmill.tools.profiler.bottleneck import STEP, counted, rounded
from patchmill.trainer.draw.style import AMBER, BLUE, GREEN, INK, PALE_BLUE, RED, STAGES

WIDTH = 6.4
"""inches of every chart"""
WIDEST = 5.0
"""end of the axis of resources, in binding rates"""
Report = dict[str, Any]
Draw = Callable[[Report, Any], None]


def charts(report: Report) -> dict[str, tuple[str, Draw, float]]:
    """Returns the charts that a report has data for, in reading order: (caption, function, inches) by name."""
    step, loader, train, model = (report.get(name) or {} for name in ("step", "loader", "train", "model"))
    supplies, gains, taken = model.get("supplies", ()), report.get("remedies", ()), step.get("parts", ())
    every = {
        "resources": (supplies, "What each resource could serve, by the stages that hold it. The lowest binds.",
                      resources, 1.3 + 0.42 * len(supplies)),
        "remedies": (gains, "Predicted gains.", remedies, 0.8 + 0.42 * len(gains)),
        "waterfall": (loader, "One image in the loader: one thread, nothing else running.", waterfall, 2.9),
        "sweep": (loader, "The whole loader under other settings: medians and quartiles.", sweep, 2.7),
        "steps": (train, "Each step of the training loop, in order.", steps, 2.4),
        "histogram": (train, "Step times of the training loop.", histogram, 2.4),
        "parts": (taken, "One update by the model's parts.", parts, 0.8 + 0.27 * len(taken)),
        "roofline": (step.get("roofline"),
                     "Forward passes under the device's roof; a dot's area is its share of the time.", roofline, 3.9),
        "kernels": (report.get("kernels"), "Our operators against a copy of as many bytes.", kernels, 2.6),
    }  # fmt: skip
    return {name: (caption, draw, height) for name, (data, caption, draw, height) in every.items() if data}


def svg(report: Report, draw: Draw, height: float) -> str:
    """Returns one chart as an SVG element."""
    text = io.StringIO()
    _render(report, draw, height, text, "svg")
    return text.getvalue()[text.getvalue().index("<svg") :]


def write_pngs(report: Report, folder: Path) -> list[Path]:
    """Writes all charts; returns their paths."""
    paths = []
    for name, (_, draw, height) in charts(report).items():
        paths.append(folder / f"{name}.png")
        _render(report, draw, height, paths[-1], "png")
    return paths


def _render(report: Report, draw: Draw, height: float, to: Any, kind: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": "patchmill", "font.size": 9, "font.family": "sans-serif",
        "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": INK, "axes.axisbelow": True,
    }  # fmt: skip
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(WIDTH, height), dpi=120, layout="constrained")
        draw(report, axes)
        figure.savefig(to, format=kind, metadata={"Date": None} if kind == "svg" else None)
        pyplot.close(figure)


def resources(report: Report, axes: Any) -> None:
    """Images per second of each resource, split by the stages that hold it; the binding one on top."""
    model, supplies = report["model"], report["model"]["supplies"]
    held = {name: sum(stage["holds"].get(name, 0.0) for stage in model["stages"]) for name in supplies}
    binding, most = min(supplies.values()), max(supplies.values())
    end = min(WIDEST * binding, 1.02 * most)
    layers = []
    for number, stage in enumerate(model["stages"]):
        colour = RED if stage["name"] == STEP else STAGES[number % len(STAGES)]
        widths = [min(rate, end) * stage["holds"].get(name, 0.0) / held[name] for name, rate in supplies.items()]
        layers.append((stage["name"], colour, [width if width > 0.004 * end else 0.0 for width in widths]))
    names = [counted(name, model["servers"][name]) for name in supplies]
    notes = [rounded(rate) for rate in supplies.values()]
    _bars(axes, names, layers, notes, "images per second" + ("; long bars are cut" if most > end else ""), line=binding)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=5, frameon=False, fontsize=8, borderpad=0)


def remedies(report: Report, axes: Any) -> None:
    """Predicted gains, best on top."""
    rows = report["remedies"]
    kinds = (("measured", GREEN), ("arithmetic", BLUE))
    layers = [(kind, colour, [row["gain"] * (row["basis"] == kind) for row in rows]) for kind, colour in kinds]
    label = "times the images per second of now; green: from costs measured here"
    _bars(axes, [row["title"] for row in rows], layers, [f"x{row['gain']:.2f}" for row in rows], label, line=1)


def waterfall(report: Report, axes: Any) -> None:
    """Stages one after the other; light: on the clock, dark: of it on a core."""
    rows = report["loader"]["stages"]
    wall = [1e6 * row["wall"]["median"] for row in rows]
    cpu = [min(1e6 * row["cpu"]["median"], each) for row, each in zip(rows, wall, strict=True)]
    waits = [whole - busy for whole, busy in zip(wall, cpu, strict=True)]
    layers = [("on a core", BLUE, cpu), ("waiting, or other programs", PALE_BLUE, waits)]
    notes = [f"{each:,.0f}" if each >= 10 else f"{each:.1f}" for each in wall]
    starts = [sum(wall[:row]) for row in range(len(wall))]
    _bars(axes, [row["name"] for row in rows], layers, notes, "microseconds an image", starts=starts)
    axes.legend(frameon=False, fontsize=8, loc="upper right")


def sweep(report: Report, axes: Any) -> None:
    """Images per second of every setting tried, in groups."""
    place, ticks, labels = 0.0, [], []
    settings = report["loader"]["sweep"]
    for group, name in enumerate(dict.fromkeys(setting["name"] for setting in settings)):
        for setting in (each for each in settings if each["name"] == name):
            rate = setting["images_per_s"]
            axes.bar(place, rate["median"], color=(BLUE, AMBER, GREEN)[group % 3], width=0.7)
            axes.vlines(place, rate["low"], rate["high"], color=INK, linewidth=1.5)
            ticks.append(place)
            labels.append(f"{setting['value']:g}\n{name}")
            place += 1
        place += 0.6
    together = report["loader"]["together"]["images_per_s"]["median"]
    axes.axhline(together, color=RED, linewidth=1, linestyle="--", label=f"as configured: {together:,.0f}")
    axes.set_xticks(ticks, labels)
    axes.set_ylabel("images per second")
    axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0)


def steps(report: Report, axes: Any) -> None:
    """Every step's time in order, with its data wait."""
    train = report["train"]
    numbers = range(len(train["every_step"]))
    for name, colour, label in (("every_step", PALE_BLUE, "step"), ("every_wait", AMBER, "waiting for data")):
        times = [1e3 * seconds for seconds in train[name]]
        axes.fill_between(numbers, times, color=colour, step="mid", label=label, linewidth=0)
    axes.set(xlabel="step", ylabel="milliseconds", xlim=(0, max(1, len(numbers) - 1)))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8, loc="upper right", ncols=2)


def histogram(report: Report, axes: Any) -> None:
    """Step times."""
    train = report["train"]
    axes.hist([1e3 * seconds for seconds in train["every_step"]], bins=40, color=BLUE)
    median = 1e3 * train["step_seconds"]["median"]
    axes.axvline(median, color=AMBER, label=f"median {median:,.1f} ms")
    axes.axvline(train["p99_ms"], color=RED, linestyle="--", label=f"p99 {train['p99_ms']:,.1f} ms")
    axes.set(xlabel="milliseconds a step", ylabel="steps")
    axes.legend(frameon=False, fontsize=8)


def parts(report: Report, axes: Any) -> None:
    """Forward and backward time of each part."""
    rows, whole = report["step"]["parts"], report["step"]["profiled_seconds"]
    kinds = (("forward", BLUE, "forward, or all"), ("backward", AMBER, "backward"))
    layers = [(label, colour, [1e3 * row[name] for row in rows]) for name, colour, label in kinds]
    notes = [f"{(row['forward'] + row['backward']) / whole:.1%}" for row in rows]
    _bars(axes, [row["name"] for row in rows], layers, notes, "milliseconds an update")
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def roofline(report: Report, axes: Any) -> None:
    """FLOP/s over FLOPs per byte under the roof of the device; a dot's area is its share of the forward pass."""
    step = report["step"]
    peak, copy = step["ceiling_flops"] / 1e9, step["copy_bytes"] / 1e9
    points = [point for point in step["roofline"] if point["flops"] > 0]
    values = [point["flops"] / point["bytes"] for point in points]
    low, high = min([peak / copy / 4, *values]) / 4, max([4 * peak / copy, *values]) * 2
    ridge = peak / copy
    longest = sorted(points, key=lambda point: -point["seconds"])[:6]
    named = sorted(longest, key=lambda point: point["flops"] / point["bytes"])
    axes.plot([low, ridge, high], [low * copy, peak, peak], color=INK, linewidth=1.5)
    axes.text(high, peak * 1.08, f"{peak:,.0f} GFLOP/s ({step['ceiling']})", ha="right", fontsize=8)
    axes.text(low * 1.1, low * copy * 1.8, f"copy: {copy:,.1f} GB/s", fontsize=8, rotation=28)
    for point, value in zip(points, values, strict=True):
        rate = point["flops"] / point["seconds"] / 1e9
        size = 20 + 900 * point["seconds"] / sum(each["seconds"] for each in points)
        axes.scatter(value, rate, s=size, color=BLUE, alpha=0.55, linewidths=0)
        if point in named:
            below = named.index(point) % 2
            place = {"xytext": (-6, -12) if below else (6, 6), "ha": "right" if below else "left"}
            axes.annotate(point["name"], (value, rate), textcoords="offset points", fontsize=8, **place)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte that eager operators read and write", ylabel="GFLOP/s")
    axes.grid(alpha=0.2, which="both")


def kernels(report: Report, axes: Any) -> None:
    """Each operator's bytes per second over the copy's."""
    rows = report["kernels"]["operators"]
    shares = [100 * row["of_copy"] for row in rows]
    notes = [
        f"{share:.0f} %, {1e6 * row['seconds']['median']:,.0f} µs" for share, row in zip(shares, rows, strict=True)
    ]
    label = f"% of a copy ({report['kernels']['copy_gb_per_s']:,.1f} GB/s)"
    _bars(axes, [row["name"] for row in rows], [("", BLUE, shares)], notes, label, line=100)


def _bars(
    axes: Any,
    names: list[str],
    layers: list[tuple[str, str, list[float]]],
    notes: list[str],
    label: str,
    *,
    starts: list[float] | None = None,
    line: float | None = None,
) -> None:
    """Draws horizontal bars from top to bottom, each with a note to its right.

    Args:
        layers: (name, colour, width in each row), put end to end.
        starts: where each bar begins; unset: at 0.
        line: a value to mark.
    """
    ends = starts or [0.0] * len(names)
    for name, colour, widths in layers:
        if any(widths):
            axes.barh(range(len(names)), widths, left=ends, color=colour, height=0.65, label=name)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    for row, (end, note) in enumerate(zip(ends, notes, strict=True)):
        axes.annotate(note, (end, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    if line is not None:
        axes.axvline(line, color=RED, linewidth=1, linestyle="--")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlim=(0, 1.18 * max(*ends, line or 0.0)), xlabel=label)
    axes.invert_yaxis()
