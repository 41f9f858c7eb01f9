"""What the commands of evaluation share: recipe or config file, then options; a progress bar; a table of the result."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column, Table

from patchmill.trainer.config_file import read_toml
from patchmill.trainer.eval_report import Report
from patchmill.trainer.fit import Progress
from patchmill.trainer.recipes import find_recipe

Config = TypeVar("Config")


def parse(
    argv: list[str], kind: type[Config], recipes: Mapping[str, Callable[[], Config]], *, prog: str, text: str
) -> Config:
    """The config of a command line. Raises ValueError for what cannot be right."""
    first = argparse.ArgumentParser("patchmill", add_help=False, allow_abbrev=False)
    first.add_argument("--recipe")
    first.add_argument("--config")
    chosen, rest = first.parse_known_args(argv)
    if chosen.recipe and chosen.config:
        raise ValueError("--recipe and --config both give defaults; leave one out")
    name = chosen.recipe or next(iter(recipes))
    default = read_toml(chosen.config, kind) if chosen.config else find_recipe(recipes, name)()
    description = text.format(names=", ".join(recipes), default=next(iter(recipes)))
    return tyro.cli(
        tyro.conf.AvoidSubcommands[kind],  # type: ignore[valid-type, misc]
        prog=prog,
        description=description,
        default=default,
        args=rest,
    )


@contextmanager
def fit_bar(title: str) -> Iterator[Callable[[Progress], None]]:
    """A progress bar on the first rank; yields what draws it."""
    with Bar(
        TextColumn("[bold]{task.description}"),
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[line]}", table_column=Column(no_wrap=False)),  # this one gives way when narrow
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
        console=Console(stderr=True),
        disable=not is_first(),
    ) as bar:

        def draw(progress: Progress) -> None:
            if not bar.tasks:
                bar.add_task(title, line="")
            line = _line(progress.history)
            bar.update(bar.tasks[0].id, completed=progress.step, total=progress.total_steps, line=line)

        yield draw


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


def is_first() -> bool:
    """Whether this process is the first rank."""
    return os.environ.get("RANK", "0") == "0"


def _line(history: list[dict[str, float]]) -> str:
    if not history:
        return "first epoch"
    tested = [entry for entry in history if "top1" in entry]
    top1 = f"  top-1 {tested[-1]['top1']:.2%}" if tested else ""
    return f"epoch {history[-1]['epoch']:.0f}  loss {history[-1]['loss']:.4f}{top1}"
