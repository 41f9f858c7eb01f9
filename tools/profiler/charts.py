"""report -> [profile_pictures] -> charts: stages, resources, step times, parts, roofline, sweep, kernels, remedies.

Each chart is a function of a report that draws on one pair of axes, so that the page (SVG) and the PNGs are the same
picture. A chart whose data the report lacks is not drawn.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from patchmill.tools.profiler.bottleneck import rounded
from patchmill.trainer.draw.style import AMBER, BLUE, GREEN, INK, PALE_BLUE, RED, STAGES

WIDTH = 6.4
"""inches of every chart"""
WIDEST = 5.0
"""times the binding rate, where the axis of the resources ends"""
Report = dict[str, Any]
Draw = Callable[[Report, Any], None]


def charts(report: Report) -> dict[str, tuple[str, Draw, float]]:
    """Name -> (caption, how to draw it, height in inches) of the charts a report has data for, in reading order."""
    step, loader, train = report.get("step"), report.get("loader"), report.get("train")
    found: dict[str, tuple[str, Draw, float]] = {}
    if "model" in report:
        caption = "What each resource could serve, by the stages that hold it. The lowest binds."
        found["resources"] = caption, resources, 1.3 + 0.42 * len(report["model"]["supplies"])
    if report.get("remedies"):
        found["remedies"] = "Predicted gain of what could be done.", remedies, 0.8 + 0.42 * len(report["remedies"])
    if loader:
        found["waterfall"] = "An image's way through the loader: one thread, nothing else running.", waterfall, 2.9
        found["sweep"] = "The whole loader under other settings: medians and quartiles.", sweep, 2.7
    if train:
        found["steps"] = "Each step of the training loop, in order.", steps, 2.4
        found["histogram"] = "Step times of the training loop.", histogram, 2.4
    if step and step["parts"]:
        found["parts"] = "One update by the model's parts.", parts, 0.8 + 0.27 * len(step["parts"])
    if step and step["roofline"]:
        caption = "Forward passes under the roof of this device; a dot's area is its share of the time."
        found["roofline"] = caption, roofline, 3.9
    if "kernels" in report:
        found["kernels"] = "Our operators against a copy of as many bytes.", kernels, 2.6
    return found


def svg(report: Report, draw: Draw, height: float) -> str:
    """One chart as an SVG element, for a page."""
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
        "svg.fonttype": "none",
        "svg.hashsalt": "patchmill",
        "font.size": 9,
        "font.family": "sans-serif",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": INK,
        "axes.axisbelow": True,
    }
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(WIDTH, height), dpi=120, layout="constrained")
        draw(report, axes)
        figure.savefig(to, format=kind, metadata={"Date": None} if kind == "svg" else None)
        pyplot.close(figure)


def resources(report: Report, axes: Any) -> None:
    """Images per second of each resource, split by the stages that hold it; the binding one on top."""
    model = report["model"]
    names = list(model["supplies"])
    colours = _colours([stage["name"] for stage in model["stages"]])
    end = min(WIDEST * model["supplies"][names[0]], 1.02 * max(model["supplies"].values()))
    drawn: set[str] = set()
    for row, resource in enumerate(names):
        rate, left = model["supplies"][resource], 0.0
        held = {stage["name"]: stage["holds"].get(resource, 0.0) for stage in model["stages"]}
        for name, seconds in held.items():
            width = min(rate, end) * seconds / sum(held.values())
            if width > 0.004 * end:
                label = None if name in drawn else name
                axes.barh(row, width, left=left, color=colours[name], height=0.62, label=label)
                drawn.add(name)
            left += width
        _beside(axes, left, row, rounded(rate), bold=row == 0)
    axes.axvline(model["supplies"][names[0]], color=RED, linewidth=1, linestyle="--")
    counts = {name: round(count, 1) for name, count in model["servers"].items()}
    labels = [name if counts[name] == 1 else f"{counts[name]:g} {name}" for name in names]
    axes.set_yticks(range(len(names)), labels)
    axes.set_xlim(0, 1.14 * end)
    axes.invert_yaxis()
    axes.set_xlabel("images per second" + ("; long bars are cut" if max(model["supplies"].values()) > end else ""))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=5, frameon=False, fontsize=8, borderpad=0)


def remedies(report: Report, axes: Any) -> None:
    """Predicted gains, best on top."""
    rows = report["remedies"]
    for row, remedy in enumerate(rows):
        axes.barh(row, remedy["gain"], color=GREEN if remedy["basis"] == "measured" else BLUE, height=0.62)
        _beside(axes, remedy["gain"], row, f"x{remedy['gain']:.2f}", bold=True)
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_yticks(range(len(rows)), [remedy["title"] for remedy in rows])
    axes.set_xlim(0, 1.15 * max(remedy["gain"] for remedy in rows))
    axes.invert_yaxis()
    axes.set_xlabel("times the images per second of now; green: from costs measured here")


def waterfall(report: Report, axes: Any) -> None:
    """Stages one after the other; light: on the clock, dark: of it on a core."""
    left = 0.0
    stages = report["loader"]["stages"]
    for row, stage in enumerate(stages):
        wall, cpu = stage["wall"]["median"] * 1e6, stage["cpu"]["median"] * 1e6
        axes.barh(
            row, wall, left=left, color=PALE_BLUE, height=0.7, label="waiting, or other programs" if row == 0 else None
        )
        axes.barh(row, min(cpu, wall), left=left, color=BLUE, height=0.7, label="on a core" if row == 0 else None)
        _beside(axes, left + wall, row, f"{wall:,.0f}" if wall >= 10 else f"{wall:.1f}")
        left += wall
    axes.set_yticks(range(len(stages)), [stage["name"] for stage in stages])
    axes.set_xlim(0, 1.1 * left)
    axes.invert_yaxis()
    axes.set_xlabel("microseconds an image")
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
    axes.fill_between(
        numbers, [1e3 * s for s in train["every_step"]], color=PALE_BLUE, step="mid", label="step", linewidth=0
    )
    axes.fill_between(
        numbers, [1e3 * s for s in train["every_wait"]], color=AMBER, step="mid", label="waiting for data", linewidth=0
    )
    axes.set(xlabel="step", ylabel="milliseconds", xlim=(0, max(1, len(train["every_step"]) - 1)))
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
    rows = report["step"]["parts"]
    for row, part in enumerate(rows):
        forward, backward = 1e3 * part["forward"], 1e3 * part["backward"]
        axes.barh(row, forward, color=BLUE, height=0.66, label="forward, or all" if row == 0 else None)
        axes.barh(row, backward, left=forward, color=AMBER, height=0.66, label="backward" if row == 0 else None)
        share = (part["forward"] + part["backward"]) / report["step"]["profiled_seconds"]
        _beside(axes, forward + backward, row, f"{share:.1%}")
    axes.set_yticks(range(len(rows)), [part["name"] for part in rows])
    axes.set_xlim(0, 1.12e3 * max(part["forward"] + part["backward"] for part in rows))
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds an update")
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
    for row, operator in enumerate(rows):
        share = 100 * operator["of_copy"]
        axes.barh(row, share, color=BLUE, height=0.62)
        _beside(axes, share, row, f"{share:.0f} %, {1e6 * operator['seconds']['median']:,.0f} µs")
    axes.axvline(100, color=RED, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(rows)), [operator["name"] for operator in rows])
    axes.set_xlim(0, max(115.0, *(125 * operator["of_copy"] for operator in rows)))
    axes.invert_yaxis()
    axes.set_xlabel(f"% of a copy ({report['kernels']['copy_gb_per_s']:,.1f} GB/s)")


def _beside(axes: Any, x: float, row: int, text: str, *, bold: bool = False) -> None:
    """A number to the right of a bar."""
    weight = "bold" if bold else "normal"
    axes.annotate(text, (x, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8, fontweight=weight)


def _colours(names: list[str]) -> dict[str, str]:
    return {name: STAGES[number % len(STAGES)] for number, name in enumerate(names)} | {"step": RED}
