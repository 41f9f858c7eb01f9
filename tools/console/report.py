"""Prints results as tables on stdout."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.table import Table

from patchmill.pipeline.read.manifest import QUARANTINE_NAME, Manifest
from patchmill.pipeline.read.urls import redact
from patchmill.tools.console.progress import is_first

if TYPE_CHECKING:  # at run time it would load torch, which most commands do without
    from patchmill.trainer.evaluate.report import Report


def show(*tables: RenderableType) -> None:
    """Prints tables on stdout."""
    Console().print(*tables)


def fact_table(title: str = "") -> Table:
    """An empty table of names, in bold, and values, which wrap."""
    table = Table(title=title or None, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    return table


def column_table(*names: str, right: tuple[str, ...] = (), title: str = "") -> Table:
    """An empty table with a header; columns in `right` hold numbers and align right."""
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False)
    for name in names:
        table.add_column(name, overflow="fold", justify="right" if name in right else "left")
    return table


def print_report(report: "Report") -> None:
    """Prints how a run ended and where its files are; on the first rank."""
    if not is_first():
        return
    if report.interrupted:
        steps = f"step {report.step} of {report.total_steps}"
        print(f"stopped by {report.interrupted} at {steps}; the same command continues this run")
        return
    print_results(report.run, report.results)


def print_results(run: Path, results: dict[str, Any]) -> None:
    """Prints a results.json as a table."""
    table = fact_table()
    table.add_row("protocol", f"{results['protocol']}, {results['start']} weights")
    table.add_row("top-1", f"{results['top1']:.2%} of {results['test_samples']:,} images, {results['classes']} classes")
    if results["classes"] > 5:
        table.add_row("top-5", f"{results['top5']:.2%}")
    if results["unseen"]:
        table.add_row("not counted", f"{results['unseen']} images that could not be read: run `patchmill verify`")
    table.add_row("results", str(run / "results.json"))
    show(table)


def print_packed(out: str, manifest: Manifest, seconds: float) -> None:
    """Prints what was packed into the dataset `out`, and how many images were left out."""
    size = sum(shard.bytes for shard in manifest.shards)
    widths, heights = manifest.statistics["width"], manifest.statistics["height"]
    table = fact_table(f"packed {redact(out)}")
    table.add_row("images", f"{manifest.num_samples:,} in {len(manifest.classes)} classes")
    table.add_row("shards", f"{len(manifest.shards)}, {size / 1e6:,.1f} MB")
    table.add_row("sizes", f"{widths['min']}..{widths['max']} wide, {heights['min']}..{heights['max']} high")
    listed = f" (see {QUARANTINE_NAME})" if manifest.quarantined else ""
    table.add_row("left out", f"{manifest.quarantined:,}{listed}")
    add_pixel_rows(table, manifest)
    table.add_row("time", f"{seconds:,.1f} s, {manifest.num_samples / max(seconds, 1e-3):,.0f} images/s")
    show(table)


def add_pixel_rows(table: Table, manifest: Manifest) -> None:
    """Adds mean and std of a dataset's pixels, per channel in 0..1 units."""
    table.add_row("mean", ", ".join(f"{value:.4f}" for value in manifest.mean))
    table.add_row("std", ", ".join(f"{value:.4f}" for value in manifest.std))
