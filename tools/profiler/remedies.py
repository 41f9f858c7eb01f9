"""Predicts what would relieve the binding stage, and by how much.

Each remedy is the model with a change: more servers, or cheaper stages. The cost of a changed stage is measured on
samples of the dataset, taking turns with what it costs now (smaller images, another filter, another precision); more
threads or cores are arithmetic. The gain is the ratio of two bounds.
"""

import dataclasses
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
from patchmill.tools.profiler.timing import steps_in_turns, torch_threads
from patchmill.trainer.config.pretrain import PretrainConfig

WORTH = 1.03
"""smaller gains are left out"""
ROOM = 256 / 224
"""shorter side of smaller shards over the side of the crop, as ImageNet is usually prepared"""
SAMPLES = 48


@dataclass(frozen=True)
class Remedy:
    """One possible change."""

    title: str
    how: str
    """the option or the command"""
    gain: float
    """predicted images per second over those of now"""
    images_per_s: float
    basis: str
    """of the changed costs: measured, or arithmetic"""


@dataclass(frozen=True)
class Trial:
    """A change whose costs were measured: stage -> cost over today's cost."""

    title: str
    how: str
    factors: Mapping[str, float]
    core_factors: Mapping[str, float] | None = None
    """of the cores' time, where it differs from the clock's"""


def remedies(model: Model, trials: Sequence[Trial], repeats: int) -> list[Remedy]:
    """Returns all that gains more than 3 %, best first."""
    now = model.images_per_s()
    cores, workers = max(1, round(model.servers[CORES])), int(model.servers.get(THREADS, 0))
    found: list[Remedy] = []

    def consider(title: str, how: str, then: Model, basis: str = "arithmetic") -> None:
        rate = then.images_per_s()
        # eight threads that gain what four do are not another remedy
        same = how.startswith("--data.workers") and any(round(each.gain - rate / now, 2) == 0 for each in found)
        if rate > WORTH * now and not same:
            found.append(Remedy(title, how, rate / now, rate, basis))

    def more(servers: Mapping[str, float]) -> Model:
        return Model(model.stages, {**model.servers, **servers})

    for count in sorted({cores, 2 * workers, 4 * workers}):
        if count > workers > 0:
            consider(f"{count} reader threads", f"--data.workers {count}", more({THREADS: count}))
    twice = more({CORES: model.servers[CORES] + cores, THREADS: float(max(2 * cores, workers + cores))})
    consider(f"{cores} more core{'s' if cores > 1 else ''}", "another machine", twice)
    halved = dict.fromkeys(("storage", "checks", "decode"), 0.5)
    consider(f"{2 * repeats} crops of each decoded image", f"--data.repeats {2 * repeats}", scaled(model, halved))
    unwaiting = [
        dataclasses.replace(stage, holds=dict.fromkeys((THREADS, CORES), stage.holds.get(CORES, 0.0)))
        if stage.name == "storage"  # reading then holds a thread only for as long as a core
        else stage
        for stage in model.stages
    ]
    consider("reads that never wait", "shards on a local disk", Model(unwaiting, model.servers))
    for trial in trials:
        consider(trial.title, trial.how, scaled(model, trial.factors, trial.core_factors), "measured")
    return sorted(found, key=lambda remedy: -remedy.gain)


def scaled(model: Model, factors: Mapping[str, float], core_factors: Mapping[str, float] | None = None) -> Model:
    """Multiplies the costs of stages; of the cores by `core_factors` where given."""

    def change(stage: Stage) -> Stage:
        of_cores = (core_factors or factors).get(stage.name, 1.0)
        holds = {
            name: seconds * (of_cores if name == CORES else factors.get(stage.name, 1.0))
            for name, seconds in stage.holds.items()
        }
        return dataclasses.replace(stage, holds=holds)

    return Model([change(stage) for stage in model.stages], model.servers)


def measure_trials(config: PretrainConfig, device: torch.device, seconds: float) -> list[Trial]:
    """Measures changed decoding against today's, on the same samples in turn; CPU decoder only."""
    with torch_threads(1), open_loader(config, device) as loader:
        feeder, decoder = loader.maker.feeder, loader.maker.decoder
        if not isinstance(decoder, CpuDecoder) or not isinstance(feeder, Feeder):
            return []
        side = round(min(decoder.size_hw) * ROOM)
        count = min(SAMPLES, feeder.num_samples)
        ids = np.random.default_rng(0).choice(feeder.num_samples, count, replace=False)
        read = dict(zip(ids.tolist(), feeder.store.read(ids), strict=True))
        samples = {index: data for index, data in read.items() if isinstance(data, bytes)}
        small = {index: _smaller(data, side) for index, data in samples.items()}
        size = sum(map(len, small.values())) / sum(map(len, samples.values()))
        before, trials = _pile(feeder, samples, decoder), []
        if size < 0.9:
            after = _pile(feeder, small, decoder)
            decode, resize = (_in_turn(*both, seconds / 4) for both in zip(before, after, strict=True))
            factors = {"decode": decode, "resize": resize, "storage": size, "checks": size}
            how = f"patchmill shard --resize shorter-side --size {side}"
            trials.append(Trial(f"shards with a shorter side of {side}", how, factors))
    if config.data.interpolation == "bicubic":
        with torch_threads(1), open_loader(config, device, interpolation="bilinear") as loader:
            other = loader.maker.decoder
            assert isinstance(other, CpuDecoder)
            resize = _in_turn(before[1], _pile(feeder, samples, other)[1], seconds / 4)
            trials.append(Trial("bilinear resize", "--data.interpolation bilinear", {"resize": resize}))
    return trials


Work = Callable[[], object]


def _pile(feeder: Feeder, samples: Mapping[int, bytes], decoder: CpuDecoder) -> tuple[Work, Work]:
    """Returns two functions: decode all samples, and resize all their windows, as the loader would."""
    ids, channels = np.array(list(samples)), decoder.shape[3]
    images = [decode_image(data, channels) for data in samples.values()]
    heights, widths = (np.array([image.shape[axis] for image in images]) for axis in (0, 1))
    repeats = np.zeros(len(ids), dtype=np.int64)
    windows = feeder.crop.windows(feeder.seed, 0, ids, heights, widths, repeats).tolist()
    flips = feeder.crop.flips(feeder.seed, 0, ids, repeats).tolist()
    out = torch.empty(decoder.shape[1:], dtype=torch.uint8)

    def decode() -> None:
        for data in samples.values():
            decode_image(data, channels)

    def resize() -> None:
        for image, window, flip in zip(images, windows, flips, strict=True):
            decoder.cut(image, window, flip, out)

    return decode, resize


def _in_turn(before: Work, after: Work, seconds: float) -> float:
    """Returns the CPU seconds of work over those before."""
    (_, old), (_, new) = steps_in_turns({"before": before, "after": after}, torch.device("cpu"), seconds).values()
    return new / old


def _smaller(data: bytes, side: int) -> bytes:
    """Returns what packing with a smaller shorter side would store."""
    try:
        return normalise(data, Policy(resize="shorter-side", size=side)).data
    except Rejected:
        return data
