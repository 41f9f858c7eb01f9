"""Draws progress bars on stderr, from the first rank only."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

if TYPE_CHECKING:  # at run time it would load torch, which most commands do without
    from patchmill.trainer.evaluate.fit import Progress as FitProgress

Item = TypeVar("Item")


def is_first() -> bool:
    """Whether this process is the first rank (torchrun sets RANK); also before the ranks have met."""
    return os.environ.get("RANK", "0") == "0"


def progress_bar(*, transient: bool = False) -> Progress:
    """A bar: title, count, bar, the task's field `line`, time taken, time left. Silent on every rank but the first.

    Args:
        transient: clears the bar when it ends.
    """
    return Progress(
        TextColumn("[bold]{task.description}"),
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        _LineColumn(table_column=Column(no_wrap=False)),  # this one gives way on a narrow terminal
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
        console=Console(stderr=True),
        transient=transient,
        disable=not is_first(),
    )


def track(items: Iterable[Item], title: str, total: int) -> Iterator[Item]:
    """Yields the items under a bar that disappears at the end."""
    with progress_bar(transient=True) as bar:
        yield from bar.track(items, total=total, description=title)


@contextmanager
def fit_bar(title: str) -> Iterator[Callable[["FitProgress"], None]]:
    """A bar for training a classifier; yields the function that draws its state."""
    with progress_bar() as bar:

        def draw(progress: "FitProgress") -> None:
            if not bar.tasks:  # not before: a mistake that ends the command leaves no empty bar behind
                bar.add_task(title)
            line = _fit_line(progress.history)
            bar.update(bar.tasks[0].id, completed=progress.step, total=progress.total_steps, line=line)

        yield draw


class _LineColumn(ProgressColumn):
    """The task's field `line`; empty for a task without one."""

    def render(self, task: Task) -> Text:
        return Text(task.fields.get("line", ""))


def _fit_line(history: Sequence[dict[str, float]]) -> str:
    if not history:
        return "first epoch"
    tested = [entry for entry in history if "top1" in entry]
    top1 = f"  top-1 {tested[-1]['top1']:.2%}" if tested else ""
    return f"epoch {history[-1]['epoch']:.0f}  loss {history[-1]['loss']:.4f}{top1}"
