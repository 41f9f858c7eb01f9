"""Images per second and per CPU-second of packing: `python -m benchmarks.bench_shard IMAGES`.

IMAGES is a folder or a .zip of JPEGs; it is listed many times over, so that a run lasts some seconds. Every contender
is a process of its own on the same cores, started anew each time (imports and worker start count). They take turns for
several rounds, so that whatever else the machine does falls on all of them. CPU time is that of the process and all
that it started. Last: planning of a list of a million files.
"""

import argparse
import io
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import simplejpeg
from PIL import Image

from benchmarks.pages import results_folder
from patchmill.tools.packing.listing import list_folder
from patchmill.tools.packing.normalise import Policy
from patchmill.tools.packing.pack_dataset import pack_dataset
from patchmill.tools.packing.plan import PackOptions
from patchmill.tools.profiler.machine import commit, processor, today, versions

SHARD_MB = 64
SIDE, QUALITY = 224, 90
MILLION = 1_000_000


def labelled_files(folder: Path) -> list[tuple[Path, int]]:
    """(path, class) of every image, as an ImageFolder loop lists them."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    return [(path, label) for label, folder in enumerate(classes) for path in sorted(folder.iterdir())]


def plain(folder: Path, out: Path) -> None:
    """The loop of the webdataset documentation, with a strict decode before each write."""
    write_shards(out, ((file.read_bytes(), label) for file, label in labelled_files(folder)), decode=True)


def write_shards(out: Path, samples: Iterator[tuple[bytes, int]], decode: bool) -> None:
    """`webdataset.ShardWriter` over (JPEG, label)."""
    import webdataset

    out.mkdir(parents=True)
    with webdataset.ShardWriter(f"{out}/%06d.tar", maxsize=SHARD_MB * 2**20, verbose=0) as writer:
        for i, (data, label) in enumerate(samples):
            if decode:
                simplejpeg.decode_jpeg(data)
            writer.write({"__key__": f"{i:08d}", "jpg": data, "cls": label})


def decode_only(folder: Path, out: Path) -> None:
    """The ceiling: two processes read and strictly decode, and write nothing."""
    halves(folder, out, decode_files)


def decode_files(files: list[tuple[Path, int]], out: Path) -> None:
    """Reads and strictly decodes."""
    for file, _ in files:
        simplejpeg.decode_jpeg(file.read_bytes())


def halves(folder: Path, out: Path, work: Callable[[list[tuple[Path, int]], Path], None]) -> None:
    """Gives every other file to each of two processes."""
    files = labelled_files(folder)
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(work, [files[0::2], files[1::2]], [out / "0", out / "1"]))


def pillow_resize(folder: Path, out: Path) -> None:
    """Two processes of the usual Pillow loop: open, convert, resize, save, write."""
    halves(folder, out, resize_files)


def resize_files(files: list[tuple[Path, int]], out: Path) -> None:
    """Pillow's bicubic resize of the shorter side, as torchvision does it."""

    def resized() -> Iterator[tuple[bytes, int]]:
        for file, label in files:
            with Image.open(file) as image:
                picture = image.convert("RGB")
            scale = SIDE / min(picture.size)
            if scale < 1:
                size = round(picture.width * scale), round(picture.height * scale)
                picture = picture.resize(size, Image.Resampling.BICUBIC)
            encoded = io.BytesIO()
            picture.save(encoded, "JPEG", quality=QUALITY)
            yield encoded.getvalue(), label

    write_shards(out, resized(), decode=False)


def patchmill(folder: Path, out: Path, workers: int = 2, policy: Policy | None = None) -> None:
    """What `patchmill shard` does, everything included: listing, plan, checks, checksums, index, manifest."""
    options = PackOptions(shard_size_mb=SHARD_MB, policy=policy or Policy())
    pack_dataset(list_folder(folder), out, options, workers=workers)


CONTENDERS: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    "plain": ("plain ShardWriter loop, strict decode", plain),
    "ceiling": ("decode only, 2 processes", decode_only),
    "one": ("patchmill shard, 1 worker", lambda folder, out: patchmill(folder, out, workers=1)),
    "two": ("patchmill shard, 2 workers", patchmill),
    "pillow": (f"Pillow resize to {SIDE}, 2 processes", pillow_resize),
    "resize": (
        f"patchmill shard --resize shorter-side --size {SIDE}, 2 workers",
        lambda folder, out: patchmill(folder, out, policy=Policy(resize="shorter-side", size=SIDE, quality=QUALITY)),
    ),
}

PAIRS = [("two", "plain"), ("one", "plain"), ("two", "ceiling"), ("resize", "pillow")]
"""which are compared"""


def prepare(source: Path, folder: Path, copies: int) -> int:
    """Class folders of links to the images, each `copies` times; returns their number."""
    if source.suffix == ".zip":
        with zipfile.ZipFile(source) as archive:
            archive.extractall(folder / "unpacked")
        source = folder / "unpacked"
    files = sorted(path for path in source.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        raise SystemExit(f"no JPEGs in {source}")
    for copy in range(copies):
        for number, path in enumerate(files):
            target = folder / "images" / f"{number % 10}" / f"{copy:03d}-{number:05d}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path.resolve())
    return len(files) * copies


def measure(name: str, folder: Path, out: Path) -> dict[str, float]:
    """Wall seconds, CPU seconds and the largest process's memory (MB) of one run in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.bench_shard", "--run", name, str(folder / "images"), str(out)]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    result = subprocess.run([sys.executable, "-c", WITH_PEAK, *command[1:]], check=True, capture_output=True, text=True)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    shutil.rmtree(out, ignore_errors=True)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": wall, "cpu": cpu, "peak": float(result.stdout.split()[-1]) / 1024}


WITH_PEAK = """
import resource, subprocess, sys
subprocess.run([sys.executable, *sys.argv[1:]], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""

PLAN = """
import resource, sys, time
from pathlib import Path
from patchmill.tools.packing.plan import PackOptions, make_plan
from patchmill.tools.packing.listing import list_folder
started = time.perf_counter()
listing = list_folder(Path(sys.argv[1]))
listed = time.perf_counter()
plan = make_plan(listing, PackOptions())
planned = time.perf_counter()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(f"{len(listing):,} files: listed in {listed - started:.1f} s, planned in {planned - listed:.1f} s, "
      f"peak memory {peak:.0f} MB")
"""


def plan_a_million(folder: Path) -> str:
    """Lists and plans a million empty files in a thousand folders."""
    for number in range(MILLION // 1000):
        (folder / f"n{number:08d}").mkdir(parents=True)
        for i in range(1000):
            os.close(os.open(folder / f"n{number:08d}" / f"n{number:08d}_{i:06d}.JPEG", os.O_CREAT | os.O_WRONLY))
    return subprocess.run([sys.executable, "-c", PLAN, str(folder)], check=True, capture_output=True, text=True).stdout


def report(command: str, images: int, megabytes: float, runs: dict[str, list[dict[str, float]]], plan: str) -> str:
    """The Markdown page: medians over the rounds, and ratios within each round."""
    lines = [
        f"# Packing speed, {today()}",
        "",
        f"Command: `{command}`; commit {commit()}.",
        "",
        f"{images:,} JPEGs, {megabytes:,.0f} MB; {os.cpu_count()} processors ({processor()}), "
        f"{versions('simplejpeg', 'pillow', 'webdataset')}. {len(next(iter(runs.values())))} rounds, the contenders "
        "taking turns; medians.",
        "",
        "| contender | images/s | images/CPU-s | largest process, MB |",
        "|---|---|---|---|",
    ]
    for name, rounds in runs.items():
        wall, cpu, peak = (statistics.median(run[key] for run in rounds) for key in ("wall", "cpu", "peak"))
        lines.append(f"| {CONTENDERS[name][0]} | {images / wall:,.0f} | {images / cpu:,.0f} | {peak:,.0f} |")
    pairs = [pair for pair in PAIRS if runs.keys() >= set(pair)]
    lines += ["", "| ratio, within a round | images/s | images/CPU-s |", "|---|---|---|"]
    for ours, theirs in pairs:
        both = [ratios(runs[theirs], runs[ours], key) for key in ("wall", "cpu")]
        lines.append(f"| {CONTENDERS[ours][0]} / {CONTENDERS[theirs][0]} | {both[0]} | {both[1]} |")
    if plan:
        lines += ["", f"Planning, nothing decoded: {plan.strip()}."]
    return "\n".join([*lines, ""])


def ratios(theirs: list[dict[str, float]], ours: list[dict[str, float]], key: str) -> str:
    """Median and range of theirs / ours."""
    values = [a[key] / b[key] for a, b in zip(theirs, ours, strict=True)]
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("images", type=Path, help="folder or .zip of JPEGs")
    parser.add_argument("out", nargs="?", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--copies", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, help="these contenders, and no planning")
    args = parser.parse_args()
    if args.run:
        CONTENDERS[args.run][1](args.images, args.out)
        return
    command = f"python -m benchmarks.bench_shard {args.images.name} --copies {args.copies} --rounds {args.rounds}"
    chosen: list[str] = args.only or [*CONTENDERS]
    if args.only:
        command += f" --only {' '.join(chosen)}"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        images = prepare(args.images, folder, args.copies)
        megabytes = sum(file.stat().st_size for file, _ in labelled_files(folder / "images")) / 1e6
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
        for name in chosen * args.rounds:
            runs[name].append(measure(name, folder, folder / "out"))
            print(name, runs[name][-1], file=sys.stderr)
        page = report(command, images, megabytes, runs, "" if args.only else plan_a_million(folder / "million"))
    print(page)
    (results_folder() / f"{'_'.join(['shard', *(args.only or [])])}_cpu_{today()}.md").write_text(page)


if __name__ == "__main__":
    main()
