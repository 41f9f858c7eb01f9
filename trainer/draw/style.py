"""numbers -> [charts] -> PNG: the colours and the frame that all charts share; matplotlib is imported by the first."""

from pathlib import Path
from typing import Any

BLUE, AMBER, GREEN, RED, GREY = "#1f4e8c", "#c98a2b", "#2f7d4f", "#8c2f39", "#7a8594"
PALETTE = (BLUE, AMBER, GREEN, RED, GREY)
"""one colour a line, in this order"""
STROKES = ("-", "--", ":")
"""of the first, second and third round through the palette"""


def new_figure(size: tuple[float, float] = (8, 4.5), panels: int = 1) -> tuple[Any, Any]:
    """A figure of so many inches, and its axes: one, or an array of panels below each other with one x axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(panels, 1, figsize=size, dpi=120, layout="constrained", sharex=True)


def save_figure(figure: Any, path: Path) -> None:
    """Writes the PNG and forgets the figure."""
    from matplotlib import pyplot

    figure.savefig(path)
    pyplot.close(figure)


def line_style(number: int) -> dict[str, str]:
    """Colour and stroke of the line of that number, from 0."""
    return {"color": PALETTE[number % len(PALETTE)], "linestyle": STROKES[number // len(PALETTE) % len(STROKES)]}
