"""Defines every option about data: what is read, how an image is cropped and coloured, in which order images come.

Each class adds options to the one before it. A command takes the smallest class that holds all it obeys: scoring a
dataset needs `ReadConfig`, pretraining the whole `DataConfig`. Option names are the same everywhere (`--data.path`).
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

MaskKind = Literal["random", "block", "grid", "square"]
KINDS: tuple[MaskKind, ...] = get_args(MaskKind)


@dataclass(frozen=True)
class ReadConfig:
    """Where the data are, and how images are read and decoded."""

    path: str = ""
    """folder of a packed dataset (`patchmill shard` makes one), local or a URL (http, https, s3, gs, hf);
    a .beton file of FFCV; or plain WebDataset tars without a manifest: `{000..146}.tar` after a path or a URL"""
    decoder: Literal["auto", "cpu", "dali", "resident"] = "auto"
    """auto is DALI on a GPU where it is installed, else the CPU;
    resident decodes a small dataset of one image size once and keeps it on the device (CIFAR)"""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """how images are resized; both are antialiased"""
    workers: int = 0
    """threads that read and decode; 0 is one for each core"""
    prefetch_batches: int = 2
    """batches in work, and batches ready, ahead of the step"""
    max_bad_fraction: float = 0.001
    """share of the dataset that may be bad before the run stops"""
    timeout_seconds: float = 600.0
    """longest wait for a batch before it is an error"""
    cache_dir: str = ""
    """folder for copies of remote shards; empty is ~/.cache/patchmill"""
    cache_limit_gib: float = 64.0
    """size of these copies; the least recently used go first"""

    def __post_init__(self) -> None:
        check_choices(self, "data")
        _at_least_one(self, "prefetch_batches")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"data.max_bad_fraction must be in [0, 1], got {self.max_bad_fraction}")
        if self.workers < 0:
            raise ValueError(f"data.workers must be 0 (one for each core) or more, got {self.workers}")


@dataclass(frozen=True)
class ViewConfig(ReadConfig):
    """Where the data are, and how a sample becomes an image: crop, flip, colour."""

    crop: Literal["random", "fixed", "centre"] = "random"
    """random: random-resized crop; fixed: fixed size at a random place; centre: fixed size in the middle"""
    crop_rule: Literal["torchvision", "tf"] = "torchvision"
    """of random crops: torchvision as in the published PyTorch pretraining, tf as in the published linear probe"""
    scale: tuple[float, float] = (0.2, 1.0)
    """of random crops: range of the area's share"""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """of random crops: range of width / height"""
    crop_fraction: float = 0.875
    """of fixed and centre crops: share of the shorter side"""
    flip: bool = True
    """mirror half of the images left to right"""
    colour_jitter: float = 0.0
    """brightness, contrast and saturation vary by up to this share; 0 is none"""
    quarantine_path: str = ""
    """file that lists bad samples; empty writes none"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"data.scale must be a range within (0, 1], got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"data.ratio must be a range of positive numbers, got {self.ratio}")
        if not 0 < self.crop_fraction <= 1:
            raise ValueError(f"data.crop_fraction must be in (0, 1], got {self.crop_fraction}")
        if not 0 <= self.colour_jitter <= 1:
            raise ValueError(f"data.colour_jitter must be in [0, 1], got {self.colour_jitter}")


@dataclass(frozen=True)
class EpochConfig(ViewConfig):
    """Where the data are, how a sample becomes an image, and in which order images come."""

    shuffle: Literal["auto", "global", "window", "none"] = "auto"
    """global mixes the whole dataset; window mixes only within windows of shards; none keeps the stored order;
    auto is window for remote data, else global"""
    window_shards: int = 8
    """shards of a window"""
    last_batch: Literal["drop", "fill"] = "drop"
    """drop leaves out what does not fill a batch (other samples each epoch);
    fill completes the last batch with the epoch's first samples"""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_one(self, "window_shards")


@dataclass(frozen=True)
class DataConfig(EpochConfig):
    """Everything about the data: reading, crops, order, repeats, and plain tars."""

    repeats: int = 1
    """crops and masks drawn from each decoded image; an epoch then has `repeats` times as many images"""
    samples_per_epoch: int = 0
    """of plain tars that have no .idx files to count by"""
    shuffle_buffer: int = 1000
    """of plain tars: samples held in memory to be mixed"""
    allow_pipe: bool = False
    """let `pipe:` URLs of plain tars run shell commands"""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_one(self, "repeats", "shuffle_buffer")


@dataclass(frozen=True)
class MaskConfig:
    """How patches are masked."""

    kind: MaskKind = "random"
    """random (the paper's default), block (one or more rectangles, as BEiT), grid (keeps one of four) or square (one
    square at a random place, as SimMIM)"""
    ratio: float = 0.75
    """share of patches that are masked; K = int(L * (1 - ratio)). Grid masks ignore it: theirs is about 0.75.
    The side of a square is rounded to the nearest whole number"""
    cell: int = 1
    """patches on a side of the squares that are masked or kept together, for every kind (SimMIM masks 32 px at a time:
    2 patches of 16). L above is then the number of cells"""

    def __post_init__(self) -> None:
        check_choices(self, "mask")
        if not 0.0 <= self.ratio < 1.0:
            raise ValueError(f"mask.ratio must be in [0, 1), got {self.ratio}")
        if self.cell < 1:
            raise ValueError(f"mask.cell must be at least 1, got {self.cell}")

    def cells(self, grid_hw: tuple[int, int]) -> tuple[int, int]:
        """Cells down and across. Raises ValueError where they do not fill the grid of patches."""
        rows, columns = grid_hw
        if rows % self.cell or columns % self.cell:
            raise ValueError(
                f"mask.cell {self.cell} does not divide the grid of {rows} x {columns} patches; take a divisor of both"
            )
        return rows // self.cell, columns // self.cell

    def square_side(self, grid_hw: tuple[int, int]) -> int:
        """Of square masks: cells on a side."""
        rows, columns = self.cells(grid_hw)
        return min(round(math.sqrt(self.ratio * rows * columns)), rows, columns)

    def kept(self, grid_hw: tuple[int, int]) -> int:
        """K: patches that are kept of an image with that grid. Raises ValueError as `cells`."""
        rows, columns = self.cells(grid_hw)
        if self.kind == "grid":
            kept = -(-rows // 2) * -(-columns // 2)
        elif self.kind == "square":
            kept = rows * columns - self.square_side(grid_hw) ** 2
        else:
            kept = kept_patches(rows * columns, self.ratio)
        return kept * self.cell**2


def kept_patches(num_patches: int, mask_ratio: float) -> int:
    """K = int(L * (1 - ratio)) as published, rounding of the floating-point product included."""
    return int(num_patches * (1 - mask_ratio))


def check_choices(config: Any, section: str) -> None:
    """Checks the fields of a dataclass that have a Literal type.

    Args:
        section: the config's name on the command line, such as `data` in `--data.decoder`.
    Raises:
        ValueError: a value that the type does not list.
    """
    for name, hint in get_type_hints(type(config)).items():
        choices, value = get_args(hint), getattr(config, name)
        if get_origin(hint) is Literal and value not in choices:
            raise ValueError(f"{section}.{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def _at_least_one(config: ReadConfig, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"data.{name} must be at least 1, got {getattr(config, name)}")
