"""Draws the charts of runs and evaluations as PNGs: loss, accuracy, confusion, partial fine-tuning and spectra."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from patchmill.trainer.draw.style import AMBER, BLUE, GREEN, PALE_BLUE, line_style, new_figure, save_figure

NAMED_CLASSES = 30
"""a confusion matrix of at most this many classes names them"""
NUMBERED_CLASSES = 12
"""a confusion matrix of at most this many classes has numbers in its cells"""


class SpectrumLike(Protocol):
    """A spectrum of features, as trainer/evaluate/spectrum.py measures it."""

    @property
    def effective_rank(self) -> float:
        """Number of directions that the features use."""

    @property
    def singular_values(self) -> Sequence[float]:
        """Largest first."""


def write_loss_curve(lines: Sequence[dict], path: Path, evaluations: Sequence[dict] = ()) -> None:
    """Writes a PNG of a run's loss over its steps, raw and smoothed, with the learning rate on a second axis.

    Args:
        lines: lines of metrics.jsonl.
        evaluations: lines of evaluations.jsonl; if there are any, a second panel shows their accuracies.
    """
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

    It shows the reconstruction loss where every run logs it apart from other terms (U-MAE), else the whole loss.

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


def write_curve(history: list[dict[str, float]], path: Path, title: str) -> None:
    """Writes a PNG of test accuracy and training loss over the epochs.

    Args:
        history: one entry per epoch with `epoch` and `loss`, and `top1` and `top5` (0 to 1) where it was tested.
    """
    figure, axes = new_figure()
    tested = [entry for entry in history if "top1" in entry]
    axes.plot([e["epoch"] for e in tested], [100 * e["top1"] for e in tested], color=BLUE, marker=".", label="top-1")
    axes.plot([e["epoch"] for e in tested], [100 * e["top5"] for e in tested], color=BLUE, alpha=0.4, label="top-5")
    axes.set(xlabel="epoch", ylabel="test accuracy (%)", title=title)
    axes.grid(alpha=0.25)
    axes.xaxis.get_major_locator().set_params(integer=True)
    loss = axes.twinx()
    loss.plot([e["epoch"] for e in history], [e["loss"] for e in history], color=AMBER, linestyle=":", label="loss")
    loss.set_ylabel("training loss")
    loss.ticklabel_format(axis="y", useOffset=False)
    axes.legend(handles=[*axes.get_lines(), *loss.get_lines()], loc="center right")
    save_figure(figure, path)


def write_confusion(confusion_AA: Tensor, classes: list[str], path: Path, title: str) -> None:
    """Writes a PNG of a confusion matrix; each row (true class) is in shares of its images."""
    shares = confusion_AA.double().numpy()
    shares = shares / np.maximum(shares.sum(1, keepdims=True), 1)
    figure, axes = new_figure((6.5, 5.5))
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="found", ylabel="true", title=title)
    if len(classes) <= NAMED_CLASSES:
        axes.set_xticks(range(len(classes)), classes, rotation=60, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(classes)), classes)
    if len(classes) <= NUMBERED_CLASSES:
        for row, column in np.ndindex(*shares.shape):
            shade = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{shares[row, column]:.0%}", ha="center", va="center", color=shade, fontsize=7)
    figure.colorbar(image, label="share of the true class")
    save_figure(figure, path)


def write_sweep(lines: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """Writes a PNG of top-1 accuracy over the number of tuned blocks, one line per name (He et al. 2021, Figure 9).

    Args:
        lines: name -> (blocks, top-1 from 0 to 1), in any order. Blocks are spaced evenly on the axis, as in the paper.
    """
    figure, axes = new_figure()
    ticks = sorted({blocks for points in lines.values() for blocks, _ in points})
    heights: dict[int, list[float]] = {}
    for number, (name, points) in enumerate(lines.items()):
        placed = sorted((ticks.index(blocks), 100 * top1) for blocks, top1 in points)
        axes.plot(*zip(*placed, strict=True), **line_style(number), marker="o", label=name)
        for x, y in placed:
            heights.setdefault(x, []).append(y)
    for x, found in heights.items():  # number only the best (above) and the worst (below): more would overlap
        for y, away in {max(found): 7, min(found): 7 if len(found) == 1 else -14}.items():
            axes.annotate(f"{y:.1f}", (x, y), textcoords="offset points", xytext=(0, away), ha="center", fontsize=8)
    axes.set_xticks(range(len(ticks)), [f"{blocks:g}" for blocks in ticks])
    axes.set(xlabel="blocks fine-tuned", ylabel="top-1 accuracy (%)", title="Partial fine-tuning")
    axes.margins(y=0.12)
    axes.grid(alpha=0.25)
    axes.legend()
    save_figure(figure, path)


def write_spectra(
    spectra: Sequence[tuple[str, SpectrumLike]], path: Path, title: str, *, in_order: bool = False
) -> None:
    """Writes a PNG of singular values (log scale) over their index; the legend gives each name's effective rank.

    Args:
        spectra: (name, spectrum), none without values; spectra of one name (seeds, say) share a colour.
        in_order: the names are stages of one run, drawn from light to dark.
    """
    figure, axes = new_figure()
    names = list(dict.fromkeys(name for name, _ in spectra))
    for number, name in enumerate(names):
        style = {"color": _blue(0.15 + 0.8 * (number + 1) / len(names))} if in_order else line_style(number)
        alike = [spectrum for other, spectrum in spectra if other == name]
        ranks = sorted(spectrum.effective_rank for spectrum in alike)
        label = f"{name}: effective rank {ranks[0]:.1f}" + (f" to {ranks[-1]:.1f}" if len(ranks) > 1 else "")
        for spectrum in alike:
            values = [value or np.nan for value in spectrum.singular_values]
            axes.plot(range(1, 1 + len(values)), values, **style, label=label)
            label = "_nolegend_"
    axes.set_yscale("log")
    # the last norm leaves one direction of pure rounding noise: on the axis it would flatten all other values
    lowest = min((s.singular_values[-2] for _, s in spectra if len(s.singular_values) > 1), default=0)
    if lowest > 0:
        axes.set_ylim(bottom=lowest / 2)
    axes.set(xlabel="principal axis", ylabel="singular value (features' std. deviation)", title=title)
    axes.margins(x=0.01)
    axes.grid(alpha=0.25)
    axes.legend()
    save_figure(figure, path)


def _draw_accuracies(axes: Any, evaluations: Sequence[dict]) -> None:
    steps = [line["step"] for line in evaluations]
    for key, name, color in (("knn_top1", "kNN", BLUE), ("probe_top1", "linear probe", GREEN)):
        axes.plot(steps, [100 * line[key] for line in evaluations], color=color, marker="o", markersize=3, label=name)
    axes.set(ylabel="top-1 accuracy (%)", title="What the features are worth so far")
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right")


def _points(lines: Sequence[dict], key: str, over: str = "step") -> tuple[np.ndarray, np.ndarray]:
    """x and y of the lines that have a finite value."""
    kept = [(line[over], line[key]) for line in lines if line[key] is not None]
    return np.array([x for x, _ in kept]), np.array([y for _, y in kept])


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over a centred window; beyond the ends the first and last value repeat."""
    padded = np.pad(values, (window // 2, window - 1 - window // 2), "edge")
    return np.convolve(padded, np.ones(window) / window, "valid")


def _blue(shade: float) -> Any:
    from matplotlib import colormaps

    return colormaps["Blues"](shade)
