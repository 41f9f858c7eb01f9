"""Defines the colours and the figure that all charts of the project share. Imports matplotlib at the first chart."""

from pathlib import Path
from typing import Any

BLUE, AMBER, GREEN, RED, GREY = "#1f4e8c", "#c98a2b", "#2f7d4f", "#8c2f39", "#7a8594"
PALETTE = (BLUE, AMBER, GREEN, RED, GREY)
"""one colour per line, in this order"""
PALE_BLUE, INK = "#b9c7d9", "#282e36"
"""for what is in the background, and for text and frames"""
STAGES = ("#8fb3d9", AMBER, "#d9c28f", BLUE, "#5b8bc4", GREY, "#7fb59a", GREEN, "#6b5b95")
"""one colour per part of a stacked bar; red is left for the part that a chart points at"""
STROKES = ("-", "--", ":")
"""for the first, second and third round through the palette"""


def new_figure(size: tuple[float, float] = (8, 4.5), panels: int = 1) -> tuple[Any, Any]:
    """Returns a figure and its axes: one, or an array of panels stacked over a common x axis.

    Args:
        size: width and height in inches.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(panels, 1, figsize=size, dpi=120, layout="constrained", sharex=True)


def save_figure(figure: Any, path: Path) -> None:
    """Writes a figure as PNG and frees it."""
    from matplotlib import pyplot

    figure.savefig(path)
    pyplot.close(figure)


def line_style(number: int) -> dict[str, str]:
    """Colour and stroke of line `number`, from 0: every colour solid, then every colour dashed, then dotted."""
    return {"color": PALETTE[number % len(PALETTE)], "linestyle": STROKES[number // len(PALETTE) % len(STROKES)]}
