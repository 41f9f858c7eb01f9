"""What the commands of evaluation share: recipe or config file, then options; a progress bar; a table of the result."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column

from patchmill.trainer.evaluate.fit import Progress


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


def is_first() -> bool:
    """Whether this process is the first rank."""
    return os.environ.get("RANK", "0") == "0"


def _line(history: list[dict[str, float]]) -> str:
    if not history:
        return "first epoch"
    tested = [entry for entry in history if "top1" in entry]
    top1 = f"  top-1 {tested[-1]['top1']:.2%}" if tested else ""
    return f"epoch {history[-1]['epoch']:.0f}  loss {history[-1]['loss']:.4f}{top1}"
