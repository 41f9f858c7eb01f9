"""Reads labelled datasets: training batches, and test images each exactly once on any number of ranks.

The loader fills the last batch with images that came before, and a bad image's slot with another image. `each_once`
marks those rows, so no image counts twice and no unreadable image counts at all.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from patchmill.pipeline.batch import Batch
from patchmill.pipeline.config import DataConfig, EpochConfig, MaskConfig, ReadConfig
from patchmill.pipeline.loader import Loader, build_loader
from patchmill.pipeline.plan.order import EpochOrder, SequentialOrder
from patchmill.pipeline.read.manifest import open_dataset
from patchmill.trainer.config.evaluate import TestConfig
from patchmill.trainer.config.model import ModelConfig
from patchmill.trainer.engine.world import World


class Labelled(NamedTuple):
    """A dataset in which every sample has a class."""

    path: str
    classes: list[str]
    num_samples: int


def open_labelled(path: str, option: str) -> Labelled:
    """Opens a dataset and checks that every sample has a class.

    Args:
        option: the command-line option that names the dataset.
    Raises:
        ValueError, FileNotFoundError: what is wrong and how to mend it.
    """
    if not path:
        raise ValueError(f"no data: give --{option} DIR, a folder that `patchmill shard` wrote from class folders")
    dataset = open_dataset(path)
    classes, labels = dataset.manifest.classes, dataset.samples["label"]
    unknown = int((labels < 0).sum())
    if len(classes) < 2 or unknown:
        what = f"{unknown} samples without a label" if unknown else f"{len(classes)} classes"
        raise ValueError(f"{path} (--{option}) has {what}: pack a folder of class folders with `patchmill shard`")
    return Labelled(path, classes, len(labels))


def training_loader(
    data: EpochConfig, model: ModelConfig, world: World, *, seed: int, global_batch: int, quarantine: Path
) -> Loader:
    """Shuffled, cropped and flipped batches as `data` says; the last batch of an epoch is dropped, as published.

    Raises:
        ValueError: what the loader refuses.
    """
    every = vars(data) | {"quarantine_path": data.quarantine_path or str(quarantine)}
    return _loader(DataConfig(**every), model, world, seed, global_batch)


def each_once(
    data: ReadConfig,
    path: str,
    crop_fraction: float,
    model: ModelConfig,
    world: World,
    batch: int,
    *,
    most: int | None = None,
) -> Iterator[tuple[Batch, Tensor]]:
    """Yields every sample of a dataset once, centre-cropped: this rank's batches, and which rows count (bool [B]).

    Args:
        data: how to read and decode; its path is not used, nor any option beyond `ReadConfig`.
        batch: images at a time over all ranks; rounded up to a multiple of their number.
        most: at most this many samples (rounded up to whole batches), always the same random ones.
    """
    batch = -(-batch // world.size) * world.size
    read = {each.name: getattr(data, each.name) for each in dataclasses.fields(ReadConfig)} | {"path": path}
    shuffle: Literal["none", "global"] = "none" if most is None else "global"
    plain = DataConfig(
        **read, shuffle=shuffle, crop="centre", crop_fraction=crop_fraction, flip=False, last_batch="fill"
    )
    with _loader(plain, model, world, 0, batch) as loader:
        count = loader.num_samples
        steps = loader.steps_per_epoch if most is None else min(loader.steps_per_epoch, -(-most // batch))
        order = SequentialOrder(count) if most is None else EpochOrder(count, seed=0)
        local = batch // world.size
        for step, found in zip(range(steps), loader, strict=False):
            position_B = step * batch + world.rank * local + np.arange(local)
            wanted_B = order.indices(0, position_B % count)
            # a bad sample's slot holds another image; a slot past the end repeats an earlier one
            counts_B = torch.from_numpy(position_B < count).to(world.device)
            yield found, counts_B & (found.sample_ids == torch.from_numpy(wanted_B).to(world.device))


def class_columns(test: TestConfig, here: list[str], learnt: list[str]) -> list[list[int]] | None:
    """Maps each class of the test data to the model's classes that mean it; None when the two lists are equal.

    Without a class map, every test class must be a learnt one (ImageNet-A, -R, -C and Sketch keep ImageNet's names).

    Raises:
        ValueError: an unknown class, or a file that is not a class map.
    """
    if not test.class_map:
        if here == learnt:
            return None
        missing = [name for name in here if name not in set(learnt)]
        if missing:
            raise ValueError(
                f"class {missing[0]!r} of {test.path} is not one of the {len(learnt)} learnt classes (nor are "
                f"{len(missing) - 1} more): give --test.class-map FILE (with `patchmill evaluate`: --class-map), a "
                "JSON object from class names in the test data to learnt ones"
            )
        table: dict[str, str | list[str]] = {name: name for name in here}
    else:
        table = _read_class_map(test.class_map)
    place = {name: number for number, name in enumerate(learnt)}
    columns = []
    for name in here:
        meant = table.get(name)
        names = [meant] if isinstance(meant, str) else meant or []
        unknown = [each for each in names if each not in place]
        if not names or unknown:
            what = f"names {unknown[0]!r}, which the model has not learnt," if unknown else "has nothing"
            raise ValueError(f"class map {test.class_map} {what} for class {name!r} of {test.path}; correct that entry")
        columns.append([place[each] for each in names])
    return columns


def to_test_classes(logits_BA: Tensor, columns: list[list[int]] | None) -> Tensor:
    """Scores of the test data's classes, [B, T]: the best logit among the model's classes that mean each."""
    if columns is None:
        return logits_BA
    return torch.stack([logits_BA[:, each].amax(1) for each in columns], 1)


def _read_class_map(path: str) -> dict[str, str | list[str]]:
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise OSError(f"cannot read class map {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"class map {path} is not JSON ({error})") from error
    values = table.values() if isinstance(table, dict) else [None]
    if not all(isinstance(name, str) for value in values for name in (value if isinstance(value, list) else [value])):
        raise ValueError(f"class map {path} must be an object from class names to a name or a list of names")
    return table


def _loader(data: DataConfig, model: ModelConfig, world: World, seed: int, global_batch: int) -> Loader:
    return build_loader(
        data,
        image_size=model.image_size,
        patch_size=model.patch_size,
        channels=model.channels,
        mask=MaskConfig(),
        seed=seed,
        global_batch=global_batch,
        rank=world.rank,
        world_size=world.size,
        device=world.device,
    )
