"""Draws the charts of a report: resources, remedies, stages, sweep, step times, parts, roofline, kernels.

Each chart is a function that draws on one pair of axes; the page (SVG) and the PNGs show the same pictures. A chart
whose data the report lacks is not drawn.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from patchmill.tools.profiler.bottleneck import STEP, counted, rounded
from patchmill.trainer.draw.style import AMBER, BLUE, GREEN, INK, PALE_BLUE, RED, STAGES, new_figure, save_figure

SIZE = 6.4, 2.4
"""inches of a chart; some need more height"""
WIDEST = 5.0
"""end of the axis of resources, in binding rates"""
NAMED = 6
"""the parts that take longest have names on the roofline"""
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "patchmill", "font.size": 9, "font.family": "sans-serif",
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": INK, "axes.axisbelow": True,
    "legend.frameon": False, "legend.fontsize": 8,
}  # fmt: skip
Report = dict[str, Any]


def write_charts(report: Report, folder: Path) -> list[tuple[str, str]]:
    """Writes the charts that a report has data for as PNGs; returns (caption, SVG element) of each."""
    from matplotlib import rc_context

    found = []
    for section, draw, caption in CHARTS:
        if not report.get(section):
            continue
        with rc_context(STYLE):
            figure, axes = new_figure(SIZE)
            draw(report, axes)
            text = io.StringIO()
            figure.savefig(text, format="svg", metadata={"Date": None})
            save_figure(figure, folder / f"{draw.__name__}.png")
        found.append((caption, text.getvalue()[text.getvalue().index("<svg") :]))
    return found


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


def remedies(report: Report, axes: Any) -> None:
    """Predicted gains, best on top."""
    rows = report["remedies"]
    kinds = (("measured", GREEN), ("arithmetic", BLUE))
    layers = [(kind, colour, [row["gain"] * (row["basis"] == kind) for row in rows]) for kind, colour in kinds]
    notes = [f"x{row['gain']:.2f}" for row in rows]
    label = "times the images per second of now; green: from costs measured here"
    _bars(axes, [row["title"] for row in rows], layers, notes, label, line=1)


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


def sweep(report: Report, axes: Any) -> None:
    """Images per second of every setting tried, in groups, with quartiles."""
    settings = report["loader"]["sweep"]
    rates = [each["images_per_s"] for each in settings]
    groups = dict.fromkeys(each["name"] for each in settings)
    layers = [
        (group, colour, [each["images_per_s"]["median"] * (each["name"] == group) for each in settings])
        for group, colour in zip(groups, (BLUE, AMBER, GREEN), strict=False)
    ]
    names = [f"{each['name']} {each['value']:g}: {each['images_per_s']['median']:,.0f}" for each in settings]
    together = report["loader"]["together"]["images_per_s"]["median"]
    label = f"images per second; black: quartiles, dashed: as configured ({together:,.0f})"
    _bars(axes, names, layers, [""] * len(rates), label, line=together)
    axes.hlines(range(len(rates)), [rate["low"] for rate in rates], [rate["high"] for rate in rates], color=INK)
    axes.set_xlim(0, 1.05 * max(together, *(rate["high"] for rate in rates)))


def steps(report: Report, axes: Any) -> None:
    """Every step's time in order, with its data wait."""
    train = report["train"]
    numbers = range(len(train["every_step"]))
    for name, colour, label in (("every_step", PALE_BLUE, "step"), ("every_wait", AMBER, "waiting for data")):
        times = [1e3 * seconds for seconds in train[name]]
        axes.fill_between(numbers, times, color=colour, step="mid", label=label, linewidth=0)
    axes.set(xlabel="step", ylabel="milliseconds", xlim=(0, max(1, len(numbers) - 1)))
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper right", ncols=2)


def histogram(report: Report, axes: Any) -> None:
    """Step times."""
    train = report["train"]
    axes.hist([1e3 * seconds for seconds in train["every_step"]], bins=40, color=BLUE)
    median = 1e3 * train["step_seconds"]["median"]
    axes.axvline(median, color=AMBER, label=f"median {median:,.1f} ms")
    axes.axvline(train["p99_ms"], color=RED, linestyle="--", label=f"p99 {train['p99_ms']:,.1f} ms")
    axes.set(xlabel="milliseconds a step", ylabel="steps")
    axes.legend()


def parts(report: Report, axes: Any) -> None:
    """Forward and backward time of each part."""
    rows, whole = report["step"]["parts"], report["step"]["profiled_seconds"]
    kinds = (("forward", BLUE, "forward, or all"), ("backward", AMBER, "backward"))
    layers = [(label, colour, [1e3 * row[name] for row in rows]) for name, colour, label in kinds]
    notes = [f"{(row['forward'] + row['backward']) / whole:.1%}" for row in rows]
    _bars(axes, [row["name"] for row in rows], layers, notes, "milliseconds an update")


def roofline(report: Report, axes: Any) -> None:
    """FLOP/s over FLOPs per byte under the roof of the device; a dot's area is its share of the forward pass."""
    step = report["step"]
    peak, copy = step["ceiling_flops"] / 1e9, step["copy_bytes"] / 1e9
    points = sorted((point for point in step["roofline"] if point["flops"] > 0), key=lambda point: -point["seconds"])
    values = [point["flops"] / point["bytes"] for point in points]
    ridge = peak / copy
    low, high = min([ridge / 4, *values]) / 4, max([4 * ridge, *values]) * 2
    axes.plot([low, ridge, high], [low * copy, peak, peak], color=INK, linewidth=1.5)
    axes.text(high, peak * 1.08, f"{peak:,.0f} GFLOP/s ({step['ceiling']})", ha="right", fontsize=8)
    axes.text(low * 1.1, low * copy * 1.8, f"copy: {copy:,.1f} GB/s", fontsize=8, rotation=28)
    for number, (point, value) in enumerate(zip(points, values, strict=True)):
        rate = point["flops"] / point["seconds"] / 1e9
        size = 20 + 900 * point["seconds"] / sum(each["seconds"] for each in points)
        axes.scatter(value, rate, s=size, color=BLUE, alpha=0.55, linewidths=0)
        if number < NAMED:
            below = sorted(values[:NAMED]).index(value) % 2  # neighbours are named on different sides
            place = {"xytext": (-6, -12) if below else (6, 6), "ha": "right" if below else "left"}
            axes.annotate(point["name"], (value, rate), textcoords="offset points", fontsize=8, **place)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte that eager operators read and write", ylabel="GFLOP/s")
    axes.grid(alpha=0.2, which="both")
    axes.figure.set_figheight(3.9)


def kernels(report: Report, axes: Any) -> None:
    """Each operator's bytes per second over the copy's."""
    rows = report["kernels"]["operators"]
    notes = [f"{row['of_copy']:.0%}, {1e6 * row['seconds']['median']:,.0f} µs" for row in rows]
    label = f"% of a copy ({report['kernels']['copy_gb_per_s']:,.1f} GB/s)"
    layers = [("operators", BLUE, [100 * row["of_copy"] for row in rows])]
    _bars(axes, [row["name"] for row in rows], layers, notes, label, line=100)


def _bars(
    axes: Any,
    names: Sequence[str],
    layers: Sequence[tuple[str, str, list[float]]],
    notes: Sequence[str],
    label: str,
    *,
    starts: list[float] | None = None,
    line: float = 0.0,
) -> None:
    """Draws horizontal bars from top to bottom, each with a note to its right.

    Args:
        layers: (name, colour, width in each row), put end to end.
        starts: where each bar begins; unset: at 0.
        line: a value to mark; 0: none.
    """
    ends = starts or [0.0] * len(names)
    for name, colour, widths in layers:
        if any(widths):
            axes.barh(range(len(names)), widths, left=ends, color=colour, height=0.65, label=name)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    for row, (end, note) in enumerate(zip(ends, notes, strict=True)):
        axes.annotate(note, (end, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    if line:
        axes.axvline(line, color=RED, linewidth=1, linestyle="--")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlim=(0, 1.18 * max(*ends, line)), xlabel=label)
    axes.invert_yaxis()
    if len(layers) > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=5, borderpad=0)
    axes.figure.set_figheight(1.2 + 0.3 * len(names))


CHARTS: tuple[tuple[str, Callable[[Report, Any], None], str], ...] = (
    ("model", resources, "What each resource could serve, by the stages that hold it. The lowest binds."),
    ("remedies", remedies, "Predicted gains."),
    ("loader", waterfall, "One image in the loader: one thread, nothing else running."),
    ("loader", sweep, "The whole loader under other settings: medians and quartiles."),
    ("train", steps, "Each step of the training loop, in order."),
    ("train", histogram, "Step times of the training loop."),
    ("step", parts, "One update by the model's parts."),
    ("step", roofline, "Forward passes under the device's roof; a dot's area is its share of the time."),
    ("kernels", kernels, "Our operators against a copy of as many bytes."),
)
"""sections of a report, what draws them (the PNG's name too) and captions, in reading order"""
