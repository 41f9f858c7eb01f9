"""Writes an encoder's features of a dataset to a file, one row per sample, for probing, search and clustering.

Each image is encoded once, unmasked, in the dataset's order; by default its centre crop without a flip.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from patchmill.pipeline.atomic import whole_file
from patchmill.pipeline.config import DataConfig, MaskConfig, ViewConfig
from patchmill.pipeline.loader import Loader, build_loader
from patchmill.tools import cli
from patchmill.tools.console.options import parse, require_data
from patchmill.tools.console.progress import progress_bar
from patchmill.trainer.checkpoints.infer import Hints
from patchmill.trainer.checkpoints.interop import load_encoder
from patchmill.trainer.engine.world import join_world
from patchmill.trainer.model.encoder import Encoder, Features

Tokens = Literal["cls", "mean", "patches"]
Columns = dict[str, NDArray]

_DTYPES = {"float32": "F32", "float16": "F16", "int64": "I64"}


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
    data: ViewConfig = field(default_factory=lambda: ViewConfig(crop="centre", flip=False))
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
    config = parse(FeaturesConfig, "patchmill features", argv)
    out = Path(config.out)
    if out.suffix not in (".safetensors", ".parquet"):
        raise ValueError(f"--out {out} must end in .safetensors or .parquet")
    require_data(config.data)
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
    """Writes the whole file, or none on an error; returns the indices of samples that could not be read."""
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
            # images repeat where the last batch is filled up and where one replaces a bad image: each is written once
            first = np.unique(sample_ids_B, return_index=True)[1]
            new = first[unseen[sample_ids_B[first]]]
            if len(new):
                rows.write(sample_ids_B[new], {name: value[new] for name, value in values.items()})
            unseen[sample_ids_B] = False
        missing = np.flatnonzero(unseen)
        rows.close(missing)
    return missing


def _feature_batches(encoder: Encoder, loader: Loader, config: FeaturesConfig) -> Iterator[tuple[np.ndarray, Columns]]:
    with progress_bar() as bar, torch.inference_mode():
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
        DataConfig(**vars(config.data), shuffle="none", last_batch="fill"),
        image_size=c.image_size,
        patch_size=c.patch_size,
        channels=c.channels,
        mask=MaskConfig(),
        seed=0,
        global_batch=config.batch_size,
        device=device,
    )


class SafetensorsRows:
    """A safetensors file with one tensor per column, filled row by row.

    Args:
        columns: shape of one row and dtype, by name.
    """

    def __init__(
        self, path: Path, num_rows: int, columns: dict[str, tuple[tuple[int, ...], str]], about: dict[str, str]
    ) -> None:
        header: dict[str, Any] = {"__metadata__": about}
        end = 0
        for name, (shape, dtype) in columns.items():
            start, end = end, end + num_rows * int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            header[name] = {"dtype": _DTYPES[dtype], "shape": [num_rows, *shape], "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        # not a memory map: on a full disk a write raises OSError, a map kills the process
        self._file = open(path, "wb")  # noqa: SIM115 (closed by close)
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._columns = columns
        self._starts = {name: 8 + len(text) + header[name]["data_offsets"][0] for name in columns}

    def write(self, sample_ids_B: NDArray[np.int64], columns: Columns) -> None:
        """Writes a batch into the rows of its samples."""
        for name, values in columns.items():
            row_bytes = values[0].nbytes
            for index, row in zip(sample_ids_B.tolist(), values, strict=True):
                self._file.seek(self._starts[name] + index * row_bytes)
                self._file.write(row.tobytes())

    def close(self, missing: NDArray[np.int64]) -> None:
        """Fills the rows of unreadable samples (NaN, label -1) and closes the file."""
        for name, (shape, dtype) in self._columns.items():
            rows = np.full((len(missing), *shape), -1 if dtype == "int64" else np.nan, dtype)
            if len(rows):
                self.write(missing, {name: rows})
        self._file.close()


class ParquetRows:
    """A Parquet file with a list column per feature, a row group per batch. Needs pyarrow."""

    def __init__(self, path: Path, columns: dict[str, tuple[tuple[int, ...], str]], about: dict[str, str]) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise ValueError("Parquet needs pyarrow: pip install pyarrow, or give --out FILE.safetensors") from error
        self._pyarrow = pyarrow
        fields = [("sample_id", pyarrow.int64())]
        for name, (shape, dtype) in columns.items():
            kind = pyarrow.from_numpy_dtype(np.dtype(dtype))
            fields.append((name, pyarrow.list_(kind, int(np.prod(shape))) if shape else kind))
        shapes = {f"shape.{name}": json.dumps(shape) for name, (shape, _) in columns.items() if shape}
        self._schema = pyarrow.schema(fields, metadata=about | shapes)
        self._writer = pyarrow.parquet.ParquetWriter(path, self._schema)

    def write(self, sample_ids_B: NDArray[np.int64], columns: Columns) -> None:
        """Appends a batch."""
        arrays = [self._pyarrow.array(sample_ids_B)]
        for values in columns.values():
            flat = self._pyarrow.array(values.reshape(-1))
            arrays.append(
                self._pyarrow.FixedSizeListArray.from_arrays(flat, values[0].size) if values.ndim > 1 else flat
            )
        self._writer.write_table(self._pyarrow.Table.from_arrays(arrays, schema=self._schema))

    def close(self, missing: NDArray[np.int64]) -> None:
        """Closes the file; unreadable samples have no row."""
        self._writer.close()


if __name__ == "__main__":
    sys.exit(cli.run("features", sys.argv[1:]))
