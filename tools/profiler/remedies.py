"""model, samples -> [profile_remedies] -> what would relieve the binding stage, and by how much.

Each remedy is the model once more with what it would change: more servers, or stages that cost less. What a stage would
cost is measured on samples of the dataset itself, taking turns with what it costs now (smaller images, another filter,
another decoder, another precision); a number of threads or cores is arithmetic. The gain is the ratio of two bounds.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from patchmill.pipeline.decode.cpu import CpuDecoder
from patchmill.pipeline.plan.feed import Feeder
from patchmill.pipeline.read.image import decode_image
from patchmill.tools.packing.normalise import Policy, normalise
from patchmill.tools.packing.strict_decode import Rejected
from patchmill.tools.profiler.bottleneck import CORES, THREADS, Model, Stage
from patchmill.tools.profiler.spans import open_loader
from patchmill.tools.profiler.timing import torch_threads
from patchmill.trainer.config.pretrain import PretrainConfig

WORTH = 1.03
"""gains below this are not worth a line"""
ROOM = 256 / 224
"""shorter side of smaller shards over the side of the crop, as ImageNet is usually prepared"""
SAMPLES = 48


@dataclass(frozen=True)
class Remedy:
    """One thing that could be done."""

    title: str
    how: str
    """the option or the command"""
    gain: float
    """predicted images per second over those of now"""
    images_per_s: float
    basis: str
    """measured, or arithmetic: where the changed costs come from"""


@dataclass(frozen=True)
class Trial:
    """A change whose costs were measured: stage -> cost over the cost of now."""

    title: str
    how: str
    factors: Mapping[str, float]
    core_factors: Mapping[str, float] | None = None
    """of the cores' time, where it changes otherwise than the clock's"""


def remedies(model: Model, trials: Sequence[Trial], repeats: int) -> list[Remedy]:
    """All that gains more than 3 %, best first."""
    now = model.images_per_s()
    cores, workers = max(1, round(model.servers[CORES])), int(model.servers.get(THREADS, 0))
    changed: list[tuple[str, str, str, Model]] = []
    for count in sorted({cores, 2 * workers, 4 * workers}):
        if count > workers > 0:
            how = f"--data.workers {count}"
            changed.append((f"{count} reader threads", how, "arithmetic", _servers(model, {THREADS: count})))
    more = {CORES: model.servers[CORES] + cores, THREADS: float(max(2 * cores, workers + cores))}
    title = f"{cores} more core{'s' if cores > 1 else ''}"
    changed.append((title, "another machine", "arithmetic", _servers(model, more)))
    halved = dict.fromkeys(("storage", "checks", "decode"), 0.5)
    title = f"{2 * repeats} crops of each decoded image"
    changed.append((title, f"--data.repeats {2 * repeats}", "arithmetic", scaled(model, halved)))
    changed.append(("reads that never wait", "shards on a local disk", "arithmetic", _no_wait(model)))
    for trial in trials:
        changed.append((trial.title, trial.how, "measured", scaled(model, trial.factors, trial.core_factors)))
    found = [
        Remedy(title, how, then.images_per_s() / now, then.images_per_s(), basis)
        for title, how, basis, then in changed
        if then.images_per_s() > WORTH * now
    ]
    best: dict[float, Remedy] = {}
    for remedy in found:  # eight threads that gain what four do are no remedy of their own
        best.setdefault(round(remedy.gain, 2) if remedy.how.startswith("--data.workers") else id(remedy), remedy)
    return sorted(best.values(), key=lambda remedy: -remedy.gain)


def scaled(model: Model, factors: Mapping[str, float], core_factors: Mapping[str, float] | None = None) -> Model:
    """The model with stages that cost `factor` times what they cost; of the cores, `core_factor` times."""

    def change(stage: Stage) -> Stage:
        of_cores = (core_factors or factors).get(stage.name, 1.0)
        holds = {
            name: seconds * (of_cores if name == CORES else factors.get(stage.name, 1.0))
            for name, seconds in stage.holds.items()
        }
        return dataclasses.replace(stage, holds=holds)

    return Model([change(stage) for stage in model.stages], model.servers)


def measure_trials(config: PretrainConfig, device: torch.device, seconds: float) -> list[Trial]:
    """Costs of changed decoding, each against the costs of now, on the same samples in turn; CPU decoder only."""
    with torch_threads(1), open_loader(config, device) as loader:
        feeder, decoder = loader.maker.feeder, loader.maker.decoder
        if not isinstance(decoder, CpuDecoder) or not isinstance(feeder, Feeder):
            return []
        side = round(min(decoder.size_hw) * ROOM)
        count = min(SAMPLES, feeder.num_samples)
        ids = np.random.default_rng(0).choice(feeder.num_samples, count, replace=False)
        samples = [data for data in feeder.store.read(ids) if isinstance(data, bytes)]
        before = _pile(feeder, samples, ids[: len(samples)], decoder)
        small = [_smaller(data, side) for data in samples]
        trials = []
        if sum(map(len, small)) < 0.9 * sum(map(len, samples)):
            after = _pile(feeder, small, ids[: len(samples)], decoder)
            decode, resize = _in_turn(before, after, seconds / 2)
            size = sum(map(len, small)) / sum(map(len, samples))
            factors = {"decode": decode, "resize": resize, "storage": size, "checks": size}
            how = f"patchmill shard --resize shorter-side --size {side}"
            trials.append(Trial(f"shards with a shorter side of {side}", how, factors))
    if config.data.interpolation == "bicubic":
        with torch_threads(1), open_loader(config, device, interpolation="bilinear") as loader:
            other = loader.maker.decoder
            assert isinstance(other, CpuDecoder)
            _, resize = _in_turn(before, _pile(feeder, samples, ids[: len(samples)], other), seconds / 2)
            trials.append(Trial("bilinear resize", "--data.interpolation bilinear", {"resize": resize}))
    return trials


Costs = tuple[Callable[[], object], Callable[[], object]]


def _pile(feeder: Feeder, samples: list[bytes], ids: np.ndarray, decoder: CpuDecoder) -> Costs:
    """(decode all samples, resize all their windows), as the loader would."""
    images = [decode_image(data, decoder.shape[3]) for data in samples]
    heights, widths = (np.array([image.shape[axis] for image in images]) for axis in (0, 1))
    repeats = np.zeros(len(ids), dtype=np.int64)
    windows = feeder.crop.windows(feeder.seed, 0, ids, heights, widths, repeats).tolist()
    flips = feeder.crop.flips(feeder.seed, 0, ids, repeats).tolist()
    out = torch.empty(decoder.shape[1:], dtype=torch.uint8)

    def decode() -> None:
        for data in samples:
            decode_image(data, decoder.shape[3])

    def resize() -> None:
        for image, window, flip in zip(images, windows, flips, strict=True):
            decoder._resize(image, window, flip, out)

    return decode, resize


def _in_turn(before: Costs, after: Costs, seconds: float) -> tuple[float, float]:
    """Costs of decoding and of resizing after the change over those before: medians of the ratios of neighbours."""
    ratios: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while len(ratios[0]) < 3 or time.perf_counter() < end:
        for found, old, new in zip(ratios, before, after, strict=True):
            first = _cpu_seconds(old)
            found.append(_cpu_seconds(new) / first)
    return statistics.median(ratios[0]), statistics.median(ratios[1])


def _cpu_seconds(work: Callable[[], object]) -> float:
    start = time.thread_time()
    work()
    return time.thread_time() - start


def _smaller(data: bytes, side: int) -> bytes:
    """What packing with a smaller shorter side would store."""
    try:
        return normalise(data, Policy(resize="shorter-side", size=side)).data
    except Rejected:
        return data


def _servers(model: Model, servers: Mapping[str, float]) -> Model:
    return Model(model.stages, {**model.servers, **servers})


def _no_wait(model: Model) -> Model:
    """Reading takes a thread for no longer than it takes a core."""

    def without_wait(stage: Stage) -> Stage:
        if stage.name != "storage":
            return stage
        return dataclasses.replace(stage, holds=dict.fromkeys((THREADS, CORES), stage.holds.get(CORES, 0.0)))

    return Model([without_wait(stage) for stage in model.stages], model.servers)
