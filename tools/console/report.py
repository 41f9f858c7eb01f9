"""What the commands of evaluation share: recipe or config file, then options; a progress bar; a table of the result."""

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from patchmill.tools.console.progress import is_first
from patchmill.trainer.evaluate.report import Report


def print_report(report: Report) -> None:
    """Says how a run ended and where everything lies; on the first rank."""
    if not is_first():
        return
    if report.interrupted:
        print(
            f"stopped by {report.interrupted} at step {report.step} of {report.total_steps}; the same command goes on"
        )
        return
    print_results(report.run, report.results)


def print_results(run: Path, results: dict[str, Any]) -> None:
    """A table of a results.json."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("protocol", f"{results['protocol']}, {results['start']} weights")
    table.add_row("top-1", f"{results['top1']:.2%} of {results['test_samples']:,} images, {results['classes']} classes")
    if results["classes"] > 5:
        table.add_row("top-5", f"{results['top5']:.2%}")
    if results["unseen"]:
        table.add_row("not counted", f"{results['unseen']} images that could not be read: run `patchmill verify`")
    table.add_row("results", str(run / "results.json"))
    Console(file=sys.stdout).print(table)
