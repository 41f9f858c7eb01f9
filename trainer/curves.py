"""metrics.jsonl, evaluations.jsonl -> [curves] -> PNG: the loss of a run, and the losses of several."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from patchmill.trainer.charts import AMBER, BLUE, GREEN, line_style, new_figure, save_figure

PALE_BLUE = "#b9c7d9"


def write_loss_curve(lines: Sequence[dict], path: Path, evaluations: Sequence[dict] = ()) -> None:
    """Writes a PNG of the loss over the steps of a run, raw and smoothed, with the learning rate beside it; below it
    the accuracies of `evaluations` (lines of evaluations.jsonl), where there are any."""
    steps, losses = _points(lines, "loss")
    window = max(1, len(losses) // 50)
    panels = 2 if evaluations else 1
    figure, column = new_figure((8, 1.5 + 3 * panels), panels)
    axes, last = (column[0], column[1]) if evaluations else (column, column)
    axes.plot(steps, losses, color=PALE_BLUE, linewidth=1, label="each step")
    axes.plot(steps, _smooth(losses, window), color=BLUE, linewidth=2, label=f"mean of {window} steps")
    axes.set(ylabel="loss (masked patches)", title="Pretraining loss")
    axes.grid(alpha=0.25)
    rate = axes.twinx()
    rate.plot(*_points(lines, "lr"), color=AMBER, linewidth=1, linestyle=":", label="learning rate")
    rate.set_ylabel("learning rate")
    axes.legend(handles=[*axes.get_lines(), *rate.get_lines()], loc="upper right")
    if evaluations:
        _draw_accuracies(last, evaluations)
    last.set_xlabel("step")
    save_figure(figure, path)


def compare_losses(runs: Mapping[str, Sequence[dict]], path: Path) -> None:
    """Writes a PNG of the smoothed losses of several runs over their epochs.

    Where each run has a reconstruction loss apart from other terms (U-MAE), that is drawn.

    Args:
        runs: name -> lines of metrics.jsonl; at least one line each.
    """
    figure, axes = new_figure()
    key = "reconstruction" if all("reconstruction" in lines[-1] for lines in runs.values()) else "loss"
    for number, (name, lines) in enumerate(runs.items()):
        epochs, losses = _points(lines, key, "epoch")
        style = line_style(number)
        axes.plot(epochs, _smooth(losses, max(1, len(losses) // 50)), label=f"{name}: {losses[-1]:.3f}", **style)
    axes.set(xlabel="epoch", ylabel=f"{key} (masked patches)", title="Pretraining loss, smoothed; last value")
    axes.set_yscale("log")
    for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter("{x:g}")
    axes.grid(alpha=0.25, which="both")
    axes.legend()
    save_figure(figure, path)


def _points(lines: Sequence[dict], key: str, over: str = "step") -> tuple[np.ndarray, np.ndarray]:
    """x and y of the lines that have a finite value."""
    kept = [(line[over], line[key]) for line in lines if line[key] is not None]
    return np.array([x for x, _ in kept]), np.array([y for _, y in kept])


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over a centred window; the ends are continued by their last value."""
    padded = np.pad(values, (window // 2, window - 1 - window // 2), "edge")
    return np.convolve(padded, np.ones(window) / window, "valid")


def _draw_accuracies(axes: Any, evaluations: Sequence[dict]) -> None:
    steps = [line["step"] for line in evaluations]
    for key, name, color in (("knn_top1", "kNN", BLUE), ("probe_top1", "linear probe", GREEN)):
        axes.plot(steps, [100 * line[key] for line in evaluations], color=color, marker="o", markersize=3, label=name)
    axes.set(ylabel="top-1 accuracy (%)", title="What the features are worth so far")
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right")
