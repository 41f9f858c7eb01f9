"""DALI on the GPU: `python -m benchmarks.bench_dali_gpu [--images FOLDER_OR_ZIP]` (`make gpu-loader`).

Asks, in this order, and writes the page anew after each answer:

1. Does the hardware JPEG decoder answer?
2. How far are nvJPEG's pixels from TurboJPEG's, through the whole loader?
3. From JPEG tars to trained batches: images/s and data wait of a ViT-B/16 step, against the step on a batch that lies
   ready. Data wait is what the training stream waited; the host's time in `next` is apart (see pipeline/waits.py).
4. The loader alone, by the share of images that the hardware decoder gets.
5. The decoder alone, from memory: by that share, by threads, by batch, window against whole image, chroma upsampling.
6. Memory of device and process over time.

Without --images it makes JPEGs of 500 x 375 pixels from scikit-image's photographs. Needs DALI and simplejpeg
(docs/gpu.md says how they come to a machine without network). With --device cpu all but the engine runs on DALI's CPU
backend.
"""

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch

from benchmarks.dali_decode import Setting, Work, first_batch, images_per_second
from benchmarks.pages import markdown_table, write_page
from benchmarks.pictures import training_images
from benchmarks.steps import MASK, RECIPES, our_update
from patchmill.pipeline.decode import dali as decode_dali
from patchmill.pipeline.decode.jpeg_engine import find_jpeg_engine
from patchmill.pipeline.loader import DataConfig, Loader, build_loader
from patchmill.pipeline.plan.feed import Feeder
from patchmill.tools.packing.listing import list_folder
from patchmill.tools.packing.pack_dataset import pack_dataset
from patchmill.tools.packing.plan import PackOptions
from patchmill.tools.profiler import machine, timing
from patchmill.trainer.model.mae import MaskedAutoencoder
from patchmill.trainer.recipes.pretrain import get_recipe

LEAST_IMAGES = 8192
LOADS = (0.0, 0.35, 0.5, 0.65, 0.8, 0.9, 1.0)
FRACTION_AIM, LOADER_AIM = 0.97, 15_000
PACKAGES = ("torch", "triton", "numpy", "nvidia-dali-cuda130", "nvidia-nvimgcodec-cu13", "nvidia-nvjpeg", "simplejpeg")

DecoderName = Literal["cpu", "dali"]


class Page:
    """Answers so far."""

    def __init__(self, facts: dict[str, str], device: torch.device) -> None:
        self.facts, self.lines = facts, dict[str, tuple[str, ...]]()
        self.data: dict[str, Any] = {}
        self.name = f"dali_{device.type}_{machine.today()}"

    def add(self, key: str, value: Any, *lines: str) -> None:
        """Adds an answer, or replaces it by one with more rows, and writes the page."""
        self.data[key], self.lines[key] = value, lines
        print("\n".join(lines), flush=True)
        every = [line for lines in self.lines.values() for line in (*lines, "")]
        write_page(self.name, "DALI, from JPEG tars to the step", self.facts, every, self.data)


def prepare(source: str, folder: Path, least: int) -> tuple[Path, str]:
    """Packs the images (each as often as it takes to have `least`); returns the dataset and what it holds."""
    if source.endswith(".zip"):
        with zipfile.ZipFile(source) as archive:
            archive.extractall(folder / "unpacked")
        source = str(folder / "unpacked")
    elif not source:
        source = str(photographs(folder / "photographs"))
    files = sorted(path for path in Path(source).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        raise SystemExit(f"no JPEGs in {source}")
    copies = -(-least // len(files))
    for copy in range(copies):
        for number, path in enumerate(files):
            target = folder / "images" / str(number % 10) / f"{copy}-{number:07d}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path.resolve())
    pack_dataset(list_folder(folder / "images"), folder / "shards", PackOptions(shard_size_mb=64))
    size = statistics.fmean(path.stat().st_size for path in files) / 1e3
    return folder / "shards", f"{len(files)} JPEGs of {size:.0f} kB on average, {copies} times each, page cache warm"


def photographs(folder: Path) -> Path:
    """JPEGs of ImageNet's usual size and weight, from scikit-image's photographs."""
    import simplejpeg

    folder.mkdir()
    pixels, _ = training_images(120, 500)
    for number, image in enumerate(pixels.numpy()):
        data = simplejpeg.encode_jpeg(np.ascontiguousarray(image[:375]), 92, "RGB", "420")
        (folder / f"{number:03d}.jpg").write_bytes(data)
    return folder


def open_loader(
    data: Path, options: argparse.Namespace, batch: int, decoder: Literal["cpu", "dali"] = "dali"
) -> Loader:
    """The loader as a ViT-B/16 run has it."""
    config = get_recipe(RECIPES[options.model]).model
    return build_loader(
        DataConfig(path=str(data), decoder=decoder, workers=options.workers, timeout_seconds=60.0),
        image_size=config.image_size, patch_size=config.patch_size, channels=config.channels, mask=MASK, seed=0,
        global_batch=batch, device=options.device,
    )  # fmt: skip


def loader_rate(loader: Loader, device: torch.device, seconds: float) -> float:
    """Images/s that a loader delivers to somebody who does nothing with them."""
    with loader:
        for _ in range(4):
            batch = next(loader)
        timing.wait_for(device)
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            batch = next(loader)
            count += len(batch.images)
        timing.wait_for(device)
        return count / (time.perf_counter() - start)


@contextmanager
def engine_use() -> Iterator[list[int]]:
    """Samples of the JPEG decoder's utilisation in percent while it is entered; empty where NVML cannot tell."""
    samples: list[int] = []
    stop = threading.Event()
    try:
        import pynvml

        pynvml.nvmlInit()
        device = pynvml.nvmlDeviceGetHandleByIndex(0)
        pynvml.nvmlDeviceGetJpgUtilization(device)
    except (ImportError, AttributeError, OSError) as error:
        print(f"NVML: {error}")
        yield samples
        return
    except pynvml.NVMLError as error:
        print(f"NVML: {error}")
        yield samples
        return

    def watch() -> None:
        while not stop.wait(0.2):
            samples.append(int(pynvml.nvmlDeviceGetJpgUtilization(device)[0]))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


def ask_engine(page: Page, work: Work, options: argparse.Namespace) -> None:
    """Does it answer? By nvJPEG, by NVML while it should be busy, and by the time it takes."""
    found = find_jpeg_engine()
    answer = [f"**The JPEG engine:** {found.verdict}."]
    rates = {}
    if options.device.type == "cuda":
        for load in (0.0, 1.0):
            with engine_use() as use:
                rates[load] = images_per_second(work, options.setting(load=load), options.seconds, True)
            busy = f"{max(use)} % at most" if use else "unknown"
            answer.append(f"With hw_decoder_load={load:g}: {rates[load]:,.0f} images/s, engine in use: {busy}.")
    page.add("engine", {**found._asdict(), "images_per_s_by_load": rates}, *answer)


def ask_pixels(page: Page, data: Path, options: argparse.Namespace) -> None:
    """The same first batch through both decoders."""
    images = {}
    for decoder in ("cpu", "dali"):
        with open_loader(data, options, options.batch, decoder) as loader:
            images[decoder] = next(loader).images.cpu().int()
    levels = (images["dali"] - images["cpu"]).abs().float()
    rows = {"mean": levels.mean().item(), "99 %": levels.flatten().kthvalue(int(0.99 * levels.numel())).values.item()}
    rows["most"] = levels.max().item()
    text = ", ".join(f"{name} {value:.2f}" for name, value in rows.items())
    page.add("pixels", rows, f"**Pixels**, decoder=dali against decoder=cpu, in grey levels of 255: {text}.")


def ask_end_to_end(page: Page, data: Path, options: argparse.Namespace) -> None:
    """Images/s and data wait of training from the tars, and of the step on a batch that lies ready."""
    config, batch = get_recipe(RECIPES[options.model]).model, options.batch
    rows, found = [], {}
    header = [f"{RECIPES[options.model]}, batch {batch}", "step alone, images/s", "from tars", "of it"]
    header += ["data wait", "host in `next`"]
    on_gpu = options.device.type == "cuda"
    for launch in ("blocks compiled", "blocks compiled, one CUDA graph") if on_gpu else ("eager",):
        torch.manual_seed(0)
        model = MaskedAutoencoder(config).to(options.device)
        step = our_update(model, options.device, "blocks" if on_gpu else "no", "graph" in launch)
        with open_loader(data, options, batch) as loader:
            ready = next(loader)
        for _ in range(5):
            step(ready)
        alone = _steps_per_second(lambda: step(ready), options) * batch  # noqa: B023 (called at once)
        for decoder in ("dali", "cpu"):
            with open_loader(data, options, batch, decoder) as loader:
                for _ in range(5):
                    step(next(loader))
                timing.wait_for(options.device)
                before, start = loader.waits.total(), time.perf_counter()
                rate = _steps_per_second(lambda: step(next(loader)), options) * batch  # noqa: B023
                took = time.perf_counter() - start
                wait, host = ((new - old) / took for new, old in zip(loader.waits.total(), before, strict=True))
            row = [f"{launch}, decoder={decoder}", f"{alone:.0f}", f"{rate:.0f}", f"{rate / alone:.1%}"]
            rows.append([*row, f"{wait:.2%}", f"{host:.2%}"])
            found[f"{launch}, {decoder}"] = {
                "step_alone": alone,
                "images_per_s": rate,
                "data_wait": wait,
                "host_in_next": host,
            }
            table = markdown_table(header, rows)
            page.add("end_to_end", found, f"**From JPEG tars** (aim: {FRACTION_AIM:.0%}):", "", *table)


def _steps_per_second(step: Callable[[], object], options: argparse.Namespace) -> float:
    """Over about `seconds`, in turns of ten steps so that the host runs ahead of the device."""
    timing.wait_for(options.device)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < 2 * options.seconds:
        for _ in range(options.turn):
            step()
        timing.wait_for(options.device)
        count += options.turn
    return count / (time.perf_counter() - start)


def ask_loader(page: Page, data: Path, options: argparse.Namespace) -> None:
    """The loader alone, by the hardware decoder's share; and the CPU decoder beside it."""
    rates: dict[str, float] = {}

    def measure(name: str, decoder: DecoderName) -> None:
        loader = open_loader(data, options, options.batch, decoder)
        rates[name] = loader_rate(loader, options.device, options.seconds)
        rows = [[name, f"{rate:.0f}"] for name, rate in rates.items()]
        table = markdown_table([f"loader alone, batch {options.batch}, {options.workers} workers", "images/s"], rows)
        page.add("loader", rates, f"**The loader alone** (aim: {LOADER_AIM:,} images/s):", "", *table)

    measure("cpu", "cpu")
    for load in LOADS if options.device.type == "cuda" else LOADS[:1]:
        with mock.patch.object(decode_dali, "HARDWARE_SHARE", load):
            measure(f"dali, share {load:g}", "dali")


def ask_decoder(page: Page, work: Work, options: argparse.Namespace) -> None:
    """The decoder alone, one switch at a time."""
    on_gpu = options.device.type == "cuda"
    settings = {f"share {load:g}": options.setting(load=load) for load in LOADS if on_gpu}
    settings |= {f"{n} threads": options.setting(threads=n) for n in (2, 4, 8, 16) if n <= options.workers}
    settings |= {f"batch {n}": options.setting(batch=n) for n in (64, 128, 512, 1024) if n <= 4 * options.batch}
    settings |= {
        "whole image, then cut": options.setting(window=False),
        "chroma as libjpeg": options.setting(fancy=True),
    }
    base = options.setting()
    head = f"decoder alone; unless said: share {base.load:g}, {base.threads} threads, batch {base.batch}, window"
    rates: dict[str, float] = {}
    for name, each in settings.items():
        rates[name] = images_per_second(work, each, options.seconds, on_gpu)
        rows = [[name, f"{rate:.0f}"] for name, rate in rates.items()]
        page.add("decoder", rates, *markdown_table([head, "images/s"], rows))
    plain, fancy = (first_batch(work, options.setting(fancy=fancy), on_gpu).int() for fancy in (False, True))
    apart = (plain - fancy).abs().float().mean().item()
    page.add("chroma_mean_levels", apart, f"Chroma upsampling changes pixels by {apart:.2f} grey levels on average.")


def ask_memory(page: Page, data: Path, options: argparse.Namespace) -> None:
    """What the device and the process hold, ten times over a run of the loader."""
    seen = []
    with open_loader(data, options, options.batch) as loader:
        for _ in range(10):
            start = time.perf_counter()
            while time.perf_counter() - start < options.seconds / 2:
                next(loader)
            free, total = torch.cuda.mem_get_info() if options.device.type == "cuda" else (0, 0)
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            seen.append({"device_mb": (total - free) / 1e6, "process_mb": resident / 1e6})
    parts = [f"{name.split('_')[0]} {', '.join(f'{each[name]:.0f}' for each in seen)} MB" for name in seen[0]]
    page.add("memory", seen, f"**Memory** over {5 * options.seconds:g} s of loading: {'; '.join(parts)}.")


def main(argv: list[str]) -> int:
    """Asks one question after the other; a part that fails is named and costs no other its answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", default=os.environ.get("IMAGES", ""), help="folder or .zip of JPEGs")
    parser.add_argument("--model", choices=RECIPES, default="b16")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--least", type=int, default=LEAST_IMAGES, help="images to pack")
    parser.add_argument("--turn", type=int, default=10, help="steps between two looks at the clock")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    options.setting = lambda **more: Setting(**{"batch": min(256, options.batch), "threads": options.workers} | more)
    facts = {
        "command": f"python -m benchmarks.bench_dali_gpu {' '.join(argv)}",
        **timing.environment(str(options.device)),
    }
    facts["versions"] = machine.versions(*PACKAGES)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        data, facts["data"] = prepare(options.images, Path(folder), options.least)
        with open_loader(data, options, options.setting().batch) as loader:
            assert isinstance(loader.maker.feeder, Feeder)
            work = Work(loader.maker.feeder)
        page = Page(facts, options.device)
        for ask, what in (
            (ask_engine, work),
            (ask_pixels, data),
            (ask_end_to_end, data),
            (ask_loader, data),
            (ask_decoder, work),
            (ask_memory, data),
        ):
            try:
                ask(page, what, options)  # type: ignore[arg-type]
            except (RuntimeError, OSError, ValueError, ImportError) as error:
                failed += 1
                page.add(f"{ask.__name__} failed", str(error), f"**{ask.__name__} failed:** {str(error)[:2000]}")
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
