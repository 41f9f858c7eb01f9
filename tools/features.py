"""patchmill features: checkpoint + shards -> a file of features, one row per sample, for probing, search, clustering.

Every image is seen once, whole: centre crop, no flip, no mask, in the dataset's order.
"""

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from patchmill.pipeline.data_config import DataConfig
from patchmill.pipeline.loader import Loader, build_loader
from patchmill.pipeline.masks import MaskConfig
from patchmill.tools import cli
from patchmill.tools.feature_files import Columns, ParquetRows, SafetensorsRows
from patchmill.tools.whole import whole_file
from patchmill.trainer.encoder import Encoder, Features
from patchmill.trainer.interop import load_encoder
from patchmill.trainer.model_shape import Hints
from patchmill.trainer.world import join_world

Tokens = Literal["cls", "mean", "patches"]


@dataclass(frozen=True)
class FeaturesConfig:
    """Writes what a checkpoint's encoder makes of every image of a dataset.

    Example:
        patchmill features --checkpoint runs/b16 --data.path shards/ --out features.safetensors
        patchmill features --checkpoint mae_pretrain_vit_base.pth --data.path shards/ --out f.parquet --tokens cls
    """

    checkpoint: str
    """run folder (newest checkpoint), or a file or folder of any format that `patchmill import` reads"""
    out: str
    """.safetensors (row i is sample i of the dataset) or .parquet (with a sample_id column)"""
    data: DataConfig = field(default_factory=lambda: DataConfig(crop="centre", flip=False))
    tokens: tuple[Tokens, ...] = ("cls", "mean")
    """cls: the class token; mean: the average of the patches; patches: all of them (L x D numbers an image)"""
    dtype: Literal["float32", "float16"] = "float32"
    """of the numbers in the file"""
    image_size: int | tuple[int, int] | None = None
    """pixels, when not those of the training: positions are interpolated as published"""
    batch_size: int = 64
    """images at a time"""
    bf16: bool = False
    """compute in bfloat16: faster on a GPU, about two decimal digits"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    source: Hints = field(default_factory=Hints)


def main(argv: list[str]) -> int:
    """Runs the command."""
    config = cli.parse(FeaturesConfig, "features", argv)
    out = Path(config.out)
    if out.suffix not in (".safetensors", ".parquet"):
        raise ValueError(f"--out {out} must end in .safetensors or .parquet")
    if not config.data.path:
        raise ValueError("no data: give --data.path DIR, a folder that `patchmill shard` wrote")
    if config.data.path.startswith("pipe:") or config.data.path.split("?")[0].endswith(".tar"):
        raise ValueError(
            "a stream of tars has no numbered samples: run `patchmill index` on their folder and give that"
        )
    if not config.tokens or config.batch_size < 1:
        raise ValueError("--tokens needs at least one of cls, mean, patches, and --batch-size at least 1")
    device = join_world(config.device).device
    encoder = load_encoder(config.checkpoint, image_size=config.image_size, hints=config.source).to(device)
    with _open_loader(config, encoder, device) as loader:
        missing = write_features(encoder, loader, config, out)
    print(f"wrote {out}: {loader.num_samples - len(missing)} images, {', '.join(config.tokens)}")
    if len(missing):
        print(f"{len(missing)} images could not be read, the first is sample {missing[0]}: run `patchmill verify`")
    return 0


def write_features(encoder: Encoder, loader: Loader, config: FeaturesConfig, out: Path) -> np.ndarray:
    """Writes the file, whole or not at all, and returns the indices of samples that could not be read."""
    c = encoder.config
    shapes = {"cls": (c.embed_dim,), "mean": (c.embed_dim,), "patches": (c.num_patches, c.embed_dim)}
    columns: dict[str, tuple[tuple[int, ...], str]] = {"label": ((), "int64")}
    columns |= {name: (shapes[name], config.dtype) for name in dict.fromkeys(config.tokens)}
    about = {"dataset": loader.fingerprint["dataset"], "image_size": f"{c.image_hw[0]} {c.image_hw[1]}"}
    unseen = np.ones(loader.num_samples, dtype=bool)
    with whole_file(out) as path:
        rows: SafetensorsRows | ParquetRows
        if out.suffix == ".parquet":
            rows = ParquetRows(path, columns, about)
        else:
            rows = SafetensorsRows(path, loader.num_samples, columns, about)
        for sample_ids_B, values in _feature_batches(encoder, loader, config):
            # the last batch is filled up, and a bad image's slot filled, with images that have a row already
            first = np.unique(sample_ids_B, return_index=True)[1]
            new = first[unseen[sample_ids_B[first]]]
            if len(new):
                rows.write(sample_ids_B[new], {name: value[new] for name, value in values.items()})
            unseen[sample_ids_B] = False
        missing = np.flatnonzero(unseen)
        rows.close(missing)
    return missing


def _feature_batches(encoder: Encoder, loader: Loader, config: FeaturesConfig) -> Iterator[tuple[np.ndarray, Columns]]:
    with _progress() as bar, torch.inference_mode():
        for batch in bar.track(_one_epoch(loader), total=loader.steps_per_epoch, description="features"):
            with torch.autocast(batch.images.device.type, dtype=torch.bfloat16, enabled=config.bf16):
                features = encoder(batch.images)
            columns: Columns = {"label": batch.labels.cpu().numpy()}
            for name in config.tokens:
                columns[name] = _pick(features, name).float().cpu().numpy().astype(config.dtype)
            yield batch.sample_ids.cpu().numpy(), columns


def _pick(features: Features, tokens: Tokens) -> torch.Tensor:
    if tokens == "cls":
        return features.cls_token
    return features.patches.float().mean(1) if tokens == "mean" else features.patches


def _one_epoch(loader: Loader) -> Iterator:
    for _, batch in zip(range(loader.steps_per_epoch), loader, strict=False):
        yield batch


def _open_loader(config: FeaturesConfig, encoder: Encoder, device: torch.device) -> Loader:
    c = encoder.config
    return build_loader(
        dataclasses.replace(config.data, shuffle="none", last_batch="fill", repeats=1),
        image_size=c.image_size,
        patch_size=c.patch_size,
        channels=c.channels,
        mask=MaskConfig(),
        seed=0,
        global_batch=config.batch_size,
        device=device,
    )


def _progress() -> Progress:
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("batches, left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


if __name__ == "__main__":
    sys.exit(cli.run("features", sys.argv[1:]))
