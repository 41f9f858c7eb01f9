"""Opens whatever data.path names as a feeder of planned steps.

folder, or URL of a folder    packed dataset: every promise holds
file.beton                    FFCV's file: every promise but checksums
tars: {000..146}.tar          plain WebDataset stream: no global order, resumes on as many ranks only (stream.py)
"""

import hashlib
from pathlib import Path
from typing import Any

from patchmill.pipeline.config import DataConfig
from patchmill.pipeline.observe import Observer
from patchmill.pipeline.plan.feed import AnyFeeder, CropConfig, Feeder, SampleStore
from patchmill.pipeline.plan.order import EpochOrder, Order, SequentialOrder, WindowOrder
from patchmill.pipeline.plan.spec import BatchSpec
from patchmill.pipeline.plan.stream import StreamFeeder, count_samples
from patchmill.pipeline.read.beton import BetonReader
from patchmill.pipeline.read.manifest import open_dataset
from patchmill.pipeline.read.quarantine import Quarantine
from patchmill.pipeline.read.remote import ShardCache, open_remote_dataset
from patchmill.pipeline.read.shards import ShardReader
from patchmill.pipeline.read.urls import expand_braces, is_url, redact

GIB = 1 << 30


def open_feeder(config: DataConfig, spec: BatchSpec, observer: Observer) -> tuple[AnyFeeder, dict[str, Any]]:
    """Opens the data.

    Returns:
        The feeder, and everything that its order depends on, by name: a run resumes only where all of it is the same.

    Raises:
        ValueError, OSError: what is wrong, and how to mend it.
    """
    if not config.path:
        raise ValueError("data.path is not set: give a folder that `patchmill shard` wrote")
    crop = CropConfig(
        config.crop, config.crop_rule, config.scale, config.ratio, config.crop_fraction, config.flip, spec.aspect
    )
    if config.path.startswith("pipe:") or redact(config.path).endswith(".tar"):
        return _open_stream(config, crop, spec, observer)
    store, shards, cache = _open_store(config, observer)
    if spec.channels != store.channels and not {spec.channels, store.channels} <= {1, 3, 4}:
        raise ValueError(
            f"{redact(config.path)} holds images of {store.channels} channels; the model takes {spec.channels}"
        )
    if config.last_batch == "drop" and store.num_samples * spec.repeats < spec.global_batch:
        raise ValueError(
            f"{redact(config.path)} has {store.num_samples} samples, which do not fill one global batch of "
            f"{spec.global_batch}: use a smaller batch, or data.last_batch=fill"
        )
    shuffle = config.shuffle if config.shuffle != "auto" else "window" if cache else "global"
    order = _order(shuffle, config.window_shards, shards, store.num_samples, spec.seed)
    if cache is not None:
        cache.require_room(config.window_shards if isinstance(order, WindowOrder) else len(shards))
    feeder = Feeder(
        store,
        order,
        crop,
        _quarantine(config, store.num_samples),
        spec,
        fill_last=config.last_batch == "fill",
        want=cache.want if cache else None,
        observer=observer,
    )
    fingerprint = {
        "dataset": store.fingerprint,
        **_named(spec),
        "shuffle": shuffle,
        "window_shards": config.window_shards if shuffle == "window" else 0,
        "last_batch": config.last_batch,
    }
    return feeder, fingerprint


def _open_store(config: DataConfig, observer: Observer) -> tuple[SampleStore, list[int], ShardCache | None]:
    """Returns (store, samples in each shard, cache of a remote dataset)."""
    if is_url(config.path):
        folder = Path(config.cache_dir or "~/.cache/patchmill").expanduser()
        dataset, cache = open_remote_dataset(config.path, folder, int(config.cache_limit_gib * GIB))
        reader = ShardReader(dataset, cache, observer)
        return reader, reader.shard_samples, cache
    if config.path.endswith(".beton"):
        beton = BetonReader(Path(config.path))
        return beton, [beton.num_samples], None
    reader = ShardReader(open_dataset(config.path), observer=observer)
    return reader, reader.shard_samples, None


def _open_stream(
    config: DataConfig, crop: CropConfig, spec: BatchSpec, observer: Observer
) -> tuple[StreamFeeder, dict[str, Any]]:
    urls = expand_braces(config.path)
    if any(url.startswith("pipe:") for url in urls) and not config.allow_pipe:
        raise ValueError("pipe: URLs run shell commands: if you trust them, allow them with data.allow_pipe")
    samples = config.samples_per_epoch or count_samples(urls)
    if not 1 <= spec.channels <= 4:
        raise ValueError(f"plain tars hold images of 1 to 4 channels; the model takes {spec.channels}: pack them first")
    feeder = StreamFeeder(
        urls,
        crop,
        _quarantine(config, samples),
        spec,
        samples_per_epoch=samples,
        shuffle_buffer=1 if config.shuffle == "none" else config.shuffle_buffer,
        shuffle_shards=config.shuffle != "none",
        timeout_seconds=config.timeout_seconds,
        observer=observer,
    )
    names = "\n".join(redact(url) for url in urls)
    fingerprint = {
        "dataset": hashlib.sha256(names.encode()).hexdigest(),
        **_named(spec),
        "samples_per_epoch": samples,
        "shuffle_buffer": feeder.shuffle_buffer,
        "world_size": spec.world_size,
    }
    return feeder, fingerprint


def _named(spec: BatchSpec) -> dict[str, int]:
    """What the order of every kind of data depends on."""
    return {"seed": spec.seed, "global_batch": spec.global_batch, "repeats": spec.repeats}


def _quarantine(config: DataConfig, num_samples: int) -> Quarantine:
    path = Path(config.quarantine_path) if config.quarantine_path else None
    return Quarantine(path, num_samples, config.max_bad_fraction)


def _order(shuffle: str, window_shards: int, shard_samples: list[int], num_samples: int, seed: int) -> Order:
    if shuffle == "global":
        return EpochOrder(num_samples, seed)
    if shuffle == "window":
        return WindowOrder(shard_samples, seed, window_shards)
    return SequentialOrder(num_samples)
