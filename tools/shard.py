"""images -> [patchmill shard] -> a dataset: the command line of packing and what a person sees of it.

The work is pack_dataset.py; what a source may be is sources.py, what becomes of an image normalise.py.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from patchmill.pipeline.manifest import QUARANTINE_NAME, Manifest
from patchmill.tools.pack_dataset import MAX_BAD_FRACTION, Run, pack_dataset
from patchmill.tools.plan import PackOptions
from patchmill.tools.sources import list_folder


@dataclass(frozen=True)
class ShardArgs:
    """Packs images into WebDataset shards with an index, a manifest and checksums.

    Example: patchmill shard photos/ shards/
    """

    images: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="IN")]
    """Class folders (the ImageFolder layout) or a flat folder of images."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """The dataset's folder; it appears when all is packed. The same command resumes an interrupted run."""
    shard_size_mb: float = 256.0
    """Size of a shard in MiB, by the sizes of the sources."""
    seed: int = 0
    """Of the global shuffle."""
    workers: int = 0
    """Processes; 0 is one per processor. The output does not depend on it."""
    max_bad_fraction: float = MAX_BAD_FRACTION
    """Stop when more than this fraction of the images is damaged."""


def main(argv: list[str]) -> int:
    """Runs the command; 0 when the dataset is whole."""
    args = tyro.cli(ShardArgs, args=argv, prog="patchmill shard")
    started = time.monotonic()
    listing = list_folder(args.images)
    screen = Console(stderr=True)
    for note in listing.notes:
        screen.print(f"note: {note}", style="yellow", highlight=False)
    with PackingBar(screen) as bar:
        manifest = pack_dataset(
            listing,
            args.out,
            PackOptions(seed=args.seed, shard_size_mb=args.shard_size_mb),
            workers=args.workers,
            max_bad_fraction=args.max_bad_fraction,
            on_progress=bar.show,
        )
    assert manifest is not None
    summarise(args.out, manifest, time.monotonic() - started)
    return 0


class PackingBar(Bar):
    """Images done, images/s, MB/s, time left, bad images."""

    def __init__(self, screen: Console) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
        )
        super().__init__(*columns, TimeRemainingColumn(), console=screen, transient=True)
        self.bar: TaskID | None = None
        self.since = time.monotonic()
        self.before = (0, 0)

    def show(self, run: Run) -> None:
        """Draws the state of the run; rates count from the first call, so that resumed shards do not flatter them."""
        if self.bar is None:
            self.bar = self.add_task("packing", total=run.total_images, completed=run.images, rate="")
            self.since, self.before = time.monotonic(), (run.images, run.bytes)
        seconds = max(time.monotonic() - self.since, 1e-3)
        images, megabytes = (run.images - self.before[0]) / seconds, (run.bytes - self.before[1]) / seconds / 1e6
        rate = f"{images:,.0f} images/s  {megabytes:,.1f} MB/s  {run.bad} bad"
        self.update(self.bar, completed=run.images, rate=rate)


def summarise(out: Path, manifest: Manifest, seconds: float) -> None:
    """Prints what was packed, where it lies and what was left out."""
    size = sum(shard.bytes for shard in manifest.shards)
    widths, heights = manifest.statistics["width"], manifest.statistics["height"]
    table = Table(title=f"packed {out}", title_justify="left", show_header=False)
    table.add_row("images", f"{manifest.num_samples:,} in {len(manifest.classes)} classes")
    table.add_row("shards", f"{len(manifest.shards)}, {size / 1e6:,.1f} MB")
    table.add_row("sizes", f"{widths['min']}..{widths['max']} wide, {heights['min']}..{heights['max']} high")
    table.add_row(
        "left out", f"{manifest.quarantined:,}" + (f" (see {QUARANTINE_NAME})" if manifest.quarantined else "")
    )
    table.add_row("mean", ", ".join(f"{value:.4f}" for value in manifest.mean))
    table.add_row("std", ", ".join(f"{value:.4f}" for value in manifest.std))
    table.add_row("time", f"{seconds:,.1f} s, {manifest.num_samples / max(seconds, 1e-3):,.0f} images/s")
    Console(file=sys.stdout).print(table)
