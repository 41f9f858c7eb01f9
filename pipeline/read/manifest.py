"""Opens a packed dataset: reads and checks manifest.json and samples.npy.

A packed dataset is one folder (docs/data_format.md defines it completely):

    manifest.json       what was packed, how, and the checksum of each shard
    samples.npy         one fixed-size row a sample: place, checksum, size and label
    shard-000000.tar    plain WebDataset tar, readable by anything; with shard-000000.idx for DALI
    names.jsonl         the source name of each sample, one JSON string a line
    quarantine.jsonl    what was left out, and why

The sample table gives the shard, offset and size of sample i: any rank can read samples in any order without listing a
tar. Opening checks everything that does not require reading shards; `patchmill verify` checks the rest.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
SAMPLES_NAME = "samples.npy"
NAMES_NAME = "names.jsonl"
QUARANTINE_NAME = "quarantine.jsonl"


class ImageFormat(IntEnum):
    """How the bytes of a sample are encoded: the value of the `format` column."""

    JPEG = 0
    PNG = 1
    TIFF = 2


EXTENSIONS = {ImageFormat.JPEG: "jpg", ImageFormat.PNG: "png", ImageFormat.TIFF: "tif"}

# Packed little-endian: 33 bytes a row. A billion samples are 33 GB, of which a process reads only the rows it needs.
SAMPLE_DTYPE = np.dtype(
    [
        ("shard", "<u4"),  # index into Manifest.shards
        ("offset", "<u8"),  # of the image's first byte in the tar
        ("size", "<u4"),  # bytes of the image
        ("crc32", "<u4"),  # of those bytes (zlib.crc32)
        ("format", "u1"),  # ImageFormat
        ("width", "<u4"),  # pixels, in displayed orientation
        ("height", "<u4"),
        ("label", "<i4"),  # index into Manifest.classes; -1 unknown
    ]
)


def index_name(tar: str) -> str:
    """File name of the DALI index of a tar."""
    return tar.removesuffix(".tar") + ".idx"


@dataclass(frozen=True)
class ShardInfo:
    """One tar: its file name, samples in it, its size in bytes and the sha256 of the whole file (hex)."""

    name: str
    samples: int
    bytes: int
    sha256: str

    @property
    def index_name(self) -> str:
        """File name of the DALI index beside the tar."""
        return index_name(self.name)


def check_shard_name(name: object, where: str) -> str:
    """Returns a shard's name from a manifest if it is a plain file name that ends in .tar.

    The name becomes a path that is read, written and deleted: any other could point outside the folder, or at another
    file of the dataset.

    Raises:
        ValueError: any other name; the message contains `where` and the name.
    """
    if not isinstance(name, str) or name != Path(name).name or "\0" in name or not name.endswith(".tar"):
        raise ValueError(
            f"{where} names a shard {name!r}; expected a plain file name that ends in .tar. The dataset is damaged or "
            "malicious: restore it or pack it again"
        )
    return name


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json. Equal datasets have equal bytes: no times, hosts or paths.

    options: the packing options that shape the content. mean, std: per channel, 0..1 units, over decoded pixels.
    statistics: minimum, mean and maximum of width, height and size, and the integer sums behind mean and std.
    plan_sha256: of the packing plan.
    """

    format_version: int
    options: dict[str, Any]
    classes: list[str]
    num_samples: int
    shards: list[ShardInfo]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: int = 3
    quarantined: int = 0
    samples_sha256: str = ""
    plan_sha256: str = ""
    statistics: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps(asdict(self), indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = MANIFEST_NAME) -> "Manifest":
        """Parses the text of a manifest. Raises ValueError with `where` and what is wrong."""
        try:
            raw = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where} is not JSON ({error}): restore it, or rebuild it with `patchmill index --overwrite`"
            ) from None
        if not isinstance(raw, dict):
            raise ValueError(f"{where} is not a Patchmill manifest: rebuild it with `patchmill index --overwrite`")
        version = raw.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{where}: expected format_version {FORMAT_VERSION}, found {version!r}: pack again with "
                "`patchmill shard`, or rebuild the manifest with `patchmill index --overwrite`"
            )
        try:
            raw["shards"] = [ShardInfo(**shard) for shard in raw["shards"]]
            for shard in raw["shards"]:
                check_shard_name(shard.name, where)
            raw["mean"], raw["std"] = tuple(raw["mean"]), tuple(raw["std"])
            known = {f.name for f in fields(cls)}
            return cls(**{name: value for name, value in raw.items() if name in known})
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{where} lacks a field ({error}): rebuild it with `patchmill index --overwrite`"
            ) from None

    def fingerprint(self) -> str:
        """sha256 (hex) of the content: datasets with the same fingerprint have the same bytes in the same order."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


@dataclass(frozen=True)
class Dataset:
    """An opened dataset; `samples` is a read-only memory map of SAMPLE_DTYPE rows, one a sample."""

    root: Path
    manifest: Manifest
    samples: np.ndarray

    def __len__(self) -> int:
        return self.manifest.num_samples

    def shard_path(self, shard: int) -> Path:
        """Path of the tar with this index."""
        return self.root / self.manifest.shards[shard].name


def open_dataset(path: str | Path) -> Dataset:
    """Opens a packed dataset and checks everything that does not require reading a shard.

    Raises:
        FileNotFoundError: the folder or a shard is missing.
        ValueError: the files contradict each other. Both messages say how to mend it.
    """
    root = Path(path)
    manifest = read_manifest(root)
    in_shards = sum(shard.samples for shard in manifest.shards)
    if manifest.num_samples < 1 or in_shards != manifest.num_samples:
        raise ValueError(
            f"{root / MANIFEST_NAME} counts {manifest.num_samples} samples and its shards {in_shards}: "
            "rebuild it with `patchmill index --overwrite`"
        )
    samples = open_samples(root / SAMPLES_NAME, manifest.num_samples)
    check_shard_files(root, manifest)
    return Dataset(root, manifest, samples)


def read_manifest(root: Path) -> Manifest:
    """Parses the manifest in a dataset's folder. The errors tell apart a missing, an empty and an unpacked folder."""
    if not root.exists():
        raise FileNotFoundError(f"no dataset at {root}: {_missing_hint(root)}")
    if not root.is_dir():
        raise ValueError(f"{root} is a file: give the folder that holds {MANIFEST_NAME}{_file_hint(root)}")
    manifest_path = root / MANIFEST_NAME
    if not manifest_path.is_file():
        raise ValueError(f"{root} has no {MANIFEST_NAME}: {_folder_hint(root)}")
    return Manifest.from_json(manifest_path.read_text("utf-8"), str(manifest_path))


def open_samples(path: Path, num_samples: int) -> np.ndarray:
    """Maps samples.npy read-only. Raises ValueError when it is missing, cut, or of another type or length."""
    remedy = "restore it, or rebuild it with `patchmill index --overwrite`"
    if not path.is_file():
        raise ValueError(f"{path} is missing: {remedy}")
    try:
        samples = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged or cut short ({error}): {remedy}") from None
    if samples.dtype != SAMPLE_DTYPE or samples.shape != (num_samples,):
        raise ValueError(
            f"{path}: expected ({num_samples},) rows of {SAMPLE_DTYPE.itemsize} bytes, found {samples.shape} of "
            f"{samples.dtype.itemsize}: {remedy}"
        )
    return samples


def check_shard_files(root: Path, manifest: Manifest) -> None:
    """Checks that every shard exists with the size in the manifest: a cut tar is found now, not in epoch 3."""
    for shard in manifest.shards:
        path = root / shard.name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing ({shard.samples} samples): restore it or pack again")
        size = path.stat().st_size
        if size != shard.bytes:
            raise ValueError(
                f"{path}: expected {shard.bytes} bytes as in {MANIFEST_NAME}, found {size}: restore it, pack again, "
                "or, if you changed it on purpose, rebuild the manifest with `patchmill index --overwrite`"
            )


def _missing_hint(root: Path) -> str:
    partial = root.with_name(root.name + ".partial")
    if partial.is_dir():
        return f"{partial} holds an unfinished run; give `patchmill shard` the same command again to finish it"
    return "make one with `patchmill shard IMAGES DATASET`"


def _file_hint(path: Path) -> str:
    if path.suffix == ".tar":
        return " (for tars made elsewhere run `patchmill index FOLDER` once)"
    return ""


def _folder_hint(root: Path) -> str:
    datasets = sorted(child.parent.name for child in root.glob(f"*/{MANIFEST_NAME}"))
    if datasets:
        return f"it holds the datasets {', '.join(datasets)}; give one of them, such as {root / datasets[0]}"
    if next(root.glob("*.tar"), None) is not None:
        return (
            f"it holds tars; run `patchmill index {root}` once to make the manifest, the indexes and the sample table"
        )
    if next(root.iterdir(), None) is None:
        return "it is empty; pack images with `patchmill shard IMAGES DATASET`"
    return f"if it holds images, pack them with `patchmill shard {root} DATASET` and give DATASET"
