"""command line -> [data_config] -> loader: everything that can be set about the data."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

MaskKind = Literal["random", "block", "grid", "square"]
KINDS: tuple[MaskKind, ...] = get_args(MaskKind)


@dataclass(frozen=True)
class DataConfig:
    """Where the data lie and how a sample becomes an image.

    Attributes:
        path: folder of a packed dataset (`patchmill shard` makes one), local or a URL (http, https, s3, gs, hf); a
            .beton file of FFCV; or plain WebDataset tars without manifest: `{000..146}.tar` after a path or a URL.
        decoder: "cpu", "dali", or "auto": DALI on a GPU where it is installed, else the CPU. "resident" decodes a small
            dataset of one image size once and keeps it on the device (CIFAR).
        shuffle: "global"; "window" mixes only within windows of shards; "none" keeps the stored order; "auto" is
            "window" for remote data, else "global".
        window_shards: shards of a window.
        crop: "random" (random-resized crop), "fixed" (fixed size, random place) or "centre".
        crop_rule: of random crops: "torchvision" (published PyTorch pretraining) or "tf" (published linear probe).
        scale: of random crops: range of the area's share.
        ratio: of random crops: range of width / height.
        crop_fraction: of fixed and centre crops: share of the shorter side.
        flip: mirror half of the images left to right.
        colour_jitter: brightness, contrast and saturation vary by up to this share; 0 is none.
        interpolation: "bicubic" or "bilinear", both antialiased.
        repeats: crops and masks drawn from each decoded image; an epoch then has `repeats` times as many images.
        last_batch: "drop" leaves out what does not fill a batch (other samples each epoch); "fill" completes the last
            batch with the epoch's first samples.
        workers: threads that read and decode; 0 is one for each core.
        prefetch_batches: batches in work, and batches ready, ahead of the step.
        max_bad_fraction: share of the dataset that may be bad before the run stops.
        quarantine_path: file that names bad samples; empty writes none.
        timeout_seconds: longest wait for a batch before it is an error.
        cache_dir: where copies of remote shards are kept; empty is ~/.cache/patchmill.
        cache_limit_gib: of these copies; the least recently used go first.
        samples_per_epoch: of plain tars that have no .idx beside them to count by.
        shuffle_buffer: samples that plain tars are mixed among.
        allow_pipe: let `pipe:` URLs of plain tars run shell commands.
    """

    path: str = ""
    decoder: Literal["auto", "cpu", "dali", "resident"] = "auto"
    shuffle: Literal["auto", "global", "window", "none"] = "auto"
    window_shards: int = 8
    crop: Literal["random", "fixed", "centre"] = "random"
    crop_rule: Literal["torchvision", "tf"] = "torchvision"
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    crop_fraction: float = 0.875
    flip: bool = True
    colour_jitter: float = 0.0
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    repeats: int = 1
    last_batch: Literal["drop", "fill"] = "drop"
    workers: int = 0
    prefetch_batches: int = 2
    max_bad_fraction: float = 0.001
    quarantine_path: str = ""
    timeout_seconds: float = 600.0
    cache_dir: str = ""
    cache_limit_gib: float = 64.0
    samples_per_epoch: int = 0
    shuffle_buffer: int = 1000
    allow_pipe: bool = False

    def __post_init__(self) -> None:
        check_choices(self, "data")
        for name in ("repeats", "prefetch_batches", "window_shards", "shuffle_buffer"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"data.scale must be a range within (0, 1], got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"data.ratio must be a range of positive numbers, got {self.ratio}")
        if not 0 < self.crop_fraction <= 1:
            raise ValueError(f"data.crop_fraction must be in (0, 1], got {self.crop_fraction}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"data.max_bad_fraction must be in [0, 1], got {self.max_bad_fraction}")
        if not 0 <= self.colour_jitter <= 1:
            raise ValueError(f"data.colour_jitter must be in [0, 1], got {self.colour_jitter}")
        if self.workers < 0:
            raise ValueError(f"data.workers must be 0 (one for each core) or more, got {self.workers}")


@dataclass(frozen=True)
class MaskConfig:
    """How patches are masked.

    Attributes:
        kind: "random" (the paper's default), "block" (one or more rectangles, as BEiT), "grid" (keeps one of four) or
            "square" (one square at a random place, as SimMIM's).
        ratio: share of patches that are masked; K = int(L * (1 - ratio)). Grid masks ignore it: theirs is about 0.75.
            The side of a square is the whole number nearest to it.
        cell: patches on a side of the squares that are masked or kept as one, whatever the kind (SimMIM masks 32 px at
            a time: 2 patches of 16). L above is then the number of cells.
    """

    kind: MaskKind = "random"
    ratio: float = 0.75
    cell: int = 1

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
    """Checks every field of a dataclass whose type is a Literal.

    Args:
        section: what the config is called on the command line, as in `data` of `--data.decoder`.
    Raises:
        ValueError: another value than the type lists.
    """
    for name, hint in get_type_hints(type(config)).items():
        choices, value = get_args(hint), getattr(config, name)
        if get_origin(hint) is Literal and value not in choices:
            raise ValueError(f"{section}.{name} must be one of {', '.join(map(str, choices))}, got {value!r}")
