"""Packs images into a dataset of WebDataset shards: options, progress bar, summary.

packing/pack_dataset.py does the work, packing/open_source.py knows the kinds of sources, and packing/normalise.py
decides how each image is stored.
"""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import Progress, TaskID

from patchmill.pipeline.read.manifest import open_dataset
from patchmill.pipeline.read.urls import is_url, redact
from patchmill.tools.console.options import parse
from patchmill.tools.console.progress import progress_bar
from patchmill.tools.console.report import print_packed
from patchmill.tools.packing.beton import write_beton
from patchmill.tools.packing.list_tables import Columns
from patchmill.tools.packing.listing import Listing
from patchmill.tools.packing.normalise import REENCODE_QUALITY, Policy
from patchmill.tools.packing.open_source import list_source, staging_folder
from patchmill.tools.packing.pack_dataset import MAX_BAD_FRACTION, Run, pack_dataset
from patchmill.tools.packing.plan import PackOptions
from patchmill.tools.packing.splits import split_listing
from patchmill.tools.packing.workers import pack_on_ray


@dataclass(frozen=True)
class ShardArgs:
    """Packs images into WebDataset shards with an index, a manifest and checksums.

    Example:
        patchmill shard photos/ shards/
        patchmill shard imagenet.zip shards/ --splits train val --resize shorter-side --size 512
        patchmill shard list.csv s3://bucket/shards --workers 16
    """

    images: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="IN")]
    """Class folders (ImageFolder) or a flat folder; .zip, .tar, .tar.gz; tars of a WebDataset ("train-{000..146}.tar");
    .csv, .jsonl, .parquet with a path column; Hugging Face Parquet; .npy, .npz; .beton. Tars and Parquet by URL too."""
    out: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
    """The dataset's folder or URL; it appears when all is packed. The same command resumes an interrupted run."""
    shard_size_mb: float = 256.0
    """Size of a shard in MiB, by the sizes of the sources."""
    seed: int = 0
    """Seed of the global shuffle."""
    workers: int = 0
    """Processes; 0 is one per processor. The output does not depend on it."""
    encode: Literal["keep", "jpeg"] = "keep"
    """keep: undamaged baseline JPEGs and plain PNGs stay byte for byte. jpeg: everything becomes JPEG."""
    quality: int = REENCODE_QUALITY
    """JPEG quality of images that are encoded again."""
    resize: Literal["none", "shorter-side", "longest-side", "border"] = "none"
    """Which side to shrink to --size (never enlarged); border: the longest, then padded with black to a square."""
    size: int = 0
    """Pixels of that side."""
    min_size: int = 1
    """Leave out images with a side shorter than this."""
    max_pixels: int = 100_000_000
    """Reject images whose header gives more pixels than this."""
    alpha: Literal["drop", "keep"] = "drop"
    """What to do with an alpha channel."""
    dedupe: bool = False
    """Leave out images with the same bytes as another one."""
    max_samples: int = 0
    """Pack a random subset of this many; 0 packs all."""
    splits: tuple[str, ...] = ()
    """Separate datasets under OUT: top folders (train val) or shares (train:0.9 val:0.1)."""
    path_column: str = ""
    """Column of a list with the file's path (or the image); unset: the first usual name."""
    label_column: str = ""
    """Column of a list with the label; unset: the first usual name."""
    caption_column: str = ""
    """Column of a list with a caption; unset: the first usual name."""
    max_bad_fraction: float = MAX_BAD_FRACTION
    """Stop when more than this fraction of the images is damaged."""
    format: Literal["webdataset", "beton"] = "webdataset"
    """beton: one file for FFCV instead (needs the extra ffcv)."""
    engine: Literal["processes", "ray"] = "processes"
    """Who packs: processes of this machine, or ray: the cluster at RAY_ADDRESS, or a local one."""
    part: str = ""
    """I/N packs every N-th shard starting with I (0 to N - 1); `patchmill merge OUT` then finishes the dataset."""


def main(argv: list[str]) -> int:
    """Runs the command."""
    args = parse(ShardArgs, "patchmill shard", argv)
    options, part = pack_options(args), parse_part(args.part)
    if args.format == "beton" and (args.splits or args.part or is_url(args.out)):
        raise ValueError("--format beton writes one local file: leave out --splits and --part")
    if args.format == "beton" and Path(args.out).is_dir():
        raise ValueError(
            f"{args.out} is a folder and --format beton writes a file: give a name such as {args.out.rstrip('/')}.beton"
        )
    screen = Console(stderr=True)
    staging = staging_folder(args.out)
    columns = Columns(args.path_column, args.label_column, args.caption_column)
    with screen.status("listing the images"):
        listing = list_source(args.images, columns, staging)
    for note in listing.notes if not args.splits else ():
        screen.print(f"note: {note}", style="yellow", highlight=False)
    pieces = split_listing(listing, args.splits) if args.splits else {"": listing}
    try:
        for name, piece in pieces.items():
            pack_piece(piece, f"{args.out.rstrip('/')}/{name}" if name else args.out, options, args, part)
    except KeyboardInterrupt:
        screen.print("the same command resumes this run", highlight=False)
        raise
    if part[1] == 1:
        shutil.rmtree(staging, ignore_errors=True)
    return 0


def pack_piece(listing: Listing, out: str, options: PackOptions, args: ShardArgs, part: tuple[int, int]) -> None:
    """Packs one listing under a progress bar and prints a summary."""
    started = time.monotonic()
    shards = out if args.format == "webdataset" else f"{out}.shards"
    with progress_bar(transient=True) as bar:
        packing = PackingBar(bar)
        manifest = pack_dataset(
            listing,
            shards,
            options,
            workers=args.workers,
            max_bad_fraction=args.max_bad_fraction,
            part=part,
            engine=pack_on_ray if args.engine == "ray" else None,
            on_progress=packing.show,
        )
    if manifest is None:
        print(f"part {args.part} is packed; when all are: patchmill merge {redact(out)}")
        return
    if packing.task is None:
        print(f"{redact(out)} was already packed by the same command")
    if args.format == "beton":
        write_beton(open_dataset(shards), Path(out))
        shutil.rmtree(shards)
    print_packed(out, manifest, time.monotonic() - started)


def pack_options(args: ShardArgs) -> PackOptions:
    """The options that shape the content. Raises ValueError for wrong ones."""
    policy = Policy(args.encode, args.quality, args.resize, args.size, args.min_size, args.max_pixels, args.alpha)
    if args.workers < 0:
        raise ValueError(f"--workers {args.workers} must not be negative (0 is one per processor)")
    if not 0 <= args.max_bad_fraction <= 1:
        raise ValueError(f"--max-bad-fraction {args.max_bad_fraction} is not between 0 and 1")
    return PackOptions(args.seed, args.shard_size_mb, args.dedupe, args.max_samples, policy)


def parse_part(text: str) -> tuple[int, int]:
    """Parses I/N: "3/8" gives (3, 8), an empty text (0, 1)."""
    if not text:
        return 0, 1
    part, slash, parts = text.partition("/")
    if not (slash and part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise ValueError(f"--part {text}: give I/N with I from 0 to N - 1, as in 0/8")
    return int(part), int(parts)


class PackingBar:
    """Draws a packing run on a bar: images done and left, images/s, MB/s, bad images."""

    def __init__(self, bar: Progress) -> None:
        self.bar = bar
        self.task: TaskID | None = None
        """None until the first call: a dataset that was packed before never draws"""
        self.since = time.monotonic()
        self.before = (0, 0)

    def show(self, run: Run) -> None:
        """Draws the state of the run. Rates count from the first call: shards of an earlier run do not raise them."""
        if self.task is None:
            self.task = self.bar.add_task("packing", total=run.total_images, completed=run.images)
            self.since, self.before = time.monotonic(), (run.images, run.bytes)
        seconds = max(time.monotonic() - self.since, 1e-3)
        images, megabytes = (run.images - self.before[0]) / seconds, (run.bytes - self.before[1]) / seconds / 1e6
        line = f"{images:,.0f} images/s  {megabytes:,.1f} MB/s  {run.bad} bad"
        self.bar.update(self.task, completed=run.images, line=line)
