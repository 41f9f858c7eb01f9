"""Images per second and per CPU-second of loaders: `python -m benchmarks.bench_loader IMAGES`.

IMAGES is a folder or a .zip of JPEGs. Every loader runs in a process of its own on the same cores, and they take turns
for several rounds, so that whatever else the machine does falls on all of them. CPU time is that of the process and all
that it started. Then: index reads with checks, Python work for each sample, and memory over many epochs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from benchmarks.loaders import BATCH, LOADERS
from benchmarks.pages import results_folder
from patchmill.pipeline.config import MaskConfig
from patchmill.pipeline.decode import cpu as decode_cpu
from patchmill.pipeline.loader import DataConfig, Loader, build_loader
from patchmill.pipeline.plan.feed import Feeder
from patchmill.pipeline.read.manifest import open_dataset
from patchmill.pipeline.read.shards import ShardReader
from patchmill.tools.packing.beton import write_beton
from patchmill.tools.packing.listing import list_folder
from patchmill.tools.packing.pack_dataset import pack_dataset
from patchmill.tools.packing.plan import PackOptions
from patchmill.tools.profiler.machine import commit, processor, today, versions

COPIES = 8  # of a small sample, so that an epoch is not over at once; the packer stores each
WARM_UP_IMAGES = 512
PEAK_EPOCHS = 20
PACKAGES = ("torch", "numpy", "pillow", "simplejpeg", "nvidia-dali-cuda130", "webdataset", "ffcv")


def prepare(source: Path, data: Path) -> int:
    """Lays the images out for every loader: images/, shards/, images.beton; returns their number."""
    if source.suffix == ".zip":
        with zipfile.ZipFile(source) as archive:
            archive.extractall(data / "unpacked")
        source = data / "unpacked"
    files = sorted(path for path in source.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        raise SystemExit(f"no JPEGs in {source}")
    copies = COPIES if len(files) * COPIES < 10_000 else 1
    for copy in range(copies):
        for number, path in enumerate(files):
            target = data / "images" / f"{number % 10}" / f"{copy}-{number:07d}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path.resolve())
    pack_dataset(list_folder(data / "images"), data / "shards", PackOptions(shard_size_mb=16))
    write_beton(open_dataset(data / "shards"), data / "images.beton")
    return len(files) * copies


def cpu_seconds() -> float:
    """User and system time of this process and of all its living descendants."""
    ticks, parents = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        parents[int(path.parent.name)] = int(fields[1])
        ticks[int(path.parent.name)] = int(fields[11]) + int(fields[12])
    ours = {os.getpid()}
    while more := {child for child, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return sum(ticks[process] for process in ours) / os.sysconf("SC_CLK_TCK")


def measure(name: str, data: Path, workers: int, seconds: float) -> dict[str, float]:
    """Images per second and per CPU-second of a loader after a warm-up."""
    images = LOADERS[name](data, workers)
    for _ in range(WARM_UP_IMAGES // BATCH):
        next(images)
    start, cpu, count = time.perf_counter(), cpu_seconds(), 0
    while time.perf_counter() - start < seconds:
        count += len(next(images))
    wall = time.perf_counter() - start
    return {"per_second": count / wall, "per_cpu_second": count / (cpu_seconds() - cpu)}


def compare(data: Path, workers: int, seconds: float, rounds: int) -> dict[str, list[dict[str, float]]]:
    """All loaders in turn, `rounds` times, each run in a new process."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in LOADERS}
    for turn in range(rounds):
        for name in LOADERS:
            command = [sys.executable, "-m", "benchmarks.bench_loader", str(data), "--only", name]
            command += ["--workers", str(workers), "--seconds", str(seconds)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {turn + 1}: {name}: {results[name][-1]}", flush=True)
    return results


def open_ours(data: Path, batch: int, flip: bool = True) -> Loader:
    """This project's loader on the CPU."""
    return build_loader(
        DataConfig(path=str(data / "shards"), decoder="cpu", flip=flip),
        image_size=224, patch_size=16, channels=3, mask=MaskConfig(), seed=0, global_batch=batch,
    )  # fmt: skip


def reads_per_second(data: Path, count: int = 40_000) -> float:
    """Samples per CPU-second that one thread reads by index and checks (size, crc32, markers); page cache warm."""
    reader = ShardReader(open_dataset(data / "shards"))
    ids = np.random.default_rng(0).integers(0, reader.num_samples, (count // BATCH, BATCH))
    for batch in ids[:20]:
        reader.read(batch)
    start = time.thread_time()
    for batch in ids:
        reader.read(batch)
    return ids.size / (time.thread_time() - start)


def python_microseconds(data: Path, batch: int = 256, batches: int = 40) -> float:
    """CPU time for each sample of all that is not read, checked, decoded or resized: planning, draws, bookkeeping."""
    with open_ours(data, batch, flip=False) as loader:
        feeder, decoder = loader.maker.feeder, loader.maker.decoder
        assert isinstance(decoder, decode_cpu.CpuDecoder)
        assert isinstance(feeder, Feeder)
        plan = feeder.plan(0, 0)
        image = np.zeros((int(plan.heights_B.max()), int(plan.widths_B.max()), 3), np.uint8)
        images = torch.empty(decoder.shape, dtype=torch.uint8)

        def read(ids: np.ndarray) -> list[bytes]:
            return [b""] * len(ids)

        def decode(*_: object) -> np.ndarray:
            return image

        def resize(*_: object, out: torch.Tensor) -> None:
            del out

        with (
            mock.patch.object(feeder.store, "read", read),
            mock.patch.object(decode_cpu, "decode_image", decode),
            mock.patch.object(decoder, "resize", resize),
        ):
            start = time.thread_time()
            for step in range(batches):
                plan = feeder.plan(0, step % feeder.steps_per_epoch)
                for lo in range(0, batch, decode_cpu.CHUNK):
                    decoder._decode(plan, images, lo)
            return (time.thread_time() - start) / (batch * batches) * 1e6


def memory_growth(data: Path, epochs: int) -> list[float]:
    """Resident megabytes of this process after each epoch."""
    sizes = []
    with open_ours(data, BATCH) as loader:
        for _ in range(epochs):
            for _ in range(loader.steps_per_epoch):
                next(loader)
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            sizes.append(resident / 1e6)
    return sizes


def report(arguments: argparse.Namespace, images: int, data: Path) -> str:
    """The whole comparison as Markdown."""
    size = sum(path.stat().st_size for path in (data / "images").rglob("*.jpg")) / images / 1e3
    results = compare(data, arguments.workers, arguments.seconds, arguments.rounds)
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in results.items()
    }
    base = medians["Pillow + DataLoader"]
    rows = [
        f"| {name} | {m['per_second']:.0f} | {m['per_cpu_second']:.0f} | {m['per_second'] / base['per_second']:.2f} | "
        f"{m['per_cpu_second'] / base['per_cpu_second']:.2f} | "
        + ", ".join(f"{run['per_cpu_second']:.0f}" for run in results[name])
        + " |"
        for name, m in medians.items()
    ]
    memory = memory_growth(data, PEAK_EPOCHS)
    lines = [
        "# Loaders on the CPU",
        "",
        f"`python -m benchmarks.bench_loader {Path(arguments.source).name} --workers {arguments.workers} "
        f"--seconds {arguments.seconds:g} --rounds {arguments.rounds}`",
        "",
        f"Commit {commit()}. {processor()}, {len(os.sched_getaffinity(0))} cores; {versions(*PACKAGES)}.",
        f"Data: {images} JPEGs ({images // COPIES} different ones), {size:.0f} KB on average, page cache warm. "
        f"Random-resized crop to 224 (area 0.2 to 1), flip, uint8, batches of {BATCH}, {arguments.workers} workers.",
        "Medians, and ratios against Pillow + DataLoader; the last column: each round's images per CPU-second.",
        "",
        "| loader | images/s | images/CPU-s | ratio | CPU ratio | rounds |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
        *rows,
        "",
        f"Index reads with size, crc32 and marker checks, one thread: {reads_per_second(data):,.0f} samples/s.",
        f"Python work for each sample (planning, draws, bookkeeping): {python_microseconds(data):.1f} microseconds.",
        f"Resident memory after epochs 1, 5, 10, 15 and {PEAK_EPOCHS}: "
        + ", ".join(f"{memory[i - 1]:.0f}" for i in (1, 5, 10, 15, PEAK_EPOCHS))
        + " MB.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder or .zip of JPEGs")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=LOADERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(
            json.dumps(measure(arguments.only, Path(arguments.source), arguments.workers, arguments.seconds)),
            flush=True,
        )
        os._exit(0)  # the peers' workers have nothing to save
    with tempfile.TemporaryDirectory() as folder:
        images = prepare(Path(arguments.source), Path(folder))
        text = report(arguments, images, Path(folder))
    print(text)
    (results_folder() / f"loader_cpu_{today()}.md").write_text(text)


if __name__ == "__main__":
    main()
