"""train.size_schedule -> [size_schedule] -> loop: which image size a step trains on.

Smaller images first, since a step costs about as many FLOPs as its images have patches: progressive resizing, which
EfficientNetV2 (Tan and Le 2021, section 4) has for classifiers and DailyMAE for masked autoencoders (160, 192, 224 px).

    ((0.0, 160), (0.4, 192), (0.8, 224)) over 10 epochs:  epochs 0 to 3 at 160 px, 4 to 7 at 192, 8 and 9 at 224

A size changes at the beginning of an epoch, and is a function of the step alone, so that a run resumes in any phase.
"""

from collections.abc import Sequence

Schedule = tuple[tuple[float, int], ...]


def check_schedule(schedule: Schedule, image_size: int | tuple[int, int], patch_size: int) -> None:
    """Raises ValueError for a schedule that cannot lead to a model of that image size."""
    if not schedule:
        return
    shares, sizes = zip(*schedule, strict=True)
    if shares[0] != 0 or list(shares) != sorted(set(shares)) or shares[-1] >= 1:
        raise ValueError(
            f"train.size_schedule begins at the shares {shares} of the run; they must rise from 0 and stay below 1"
        )
    if sizes[-1] != image_size:
        raise ValueError(
            f"train.size_schedule ends with {sizes[-1]} px and model.image_size is {image_size}; they must be the same "
            "(sizes on the way are squares)"
        )
    wrong = [size for size in sizes if size < patch_size or size % patch_size]
    if wrong:
        raise ValueError(f"train.size_schedule: {wrong[0]} px is no multiple of model.patch_size {patch_size}")


def first_steps(schedule: Schedule, steps_per_epoch: int, total_steps: int) -> list[tuple[int, int]]:
    """The step from which each size holds, and the size; in order.

    Args:
        schedule: as `check_schedule` has passed it; shares are rounded to whole epochs.
    Raises:
        ValueError: the run is so short that a size would hold for no epoch.
    """
    epochs = total_steps / steps_per_epoch
    starts = [round(share * epochs) * steps_per_epoch for share, _ in schedule]
    for (share, size), start, end in zip(schedule, starts, (*starts[1:], total_steps), strict=False):
        if start >= end:
            raise ValueError(
                f"train.size_schedule: {size} px from {share:g} of the run on would hold for no epoch of {epochs:g}; "
                "train longer, or leave it out"
            )
    return [(start, size) for start, (_, size) in zip(starts, schedule, strict=True)]


def size_at(phases: Sequence[tuple[int, int]], step: int) -> int:
    """The size that update `step` (from 0) trains on, by what `first_steps` gives.

    Example: size_at([(0, 160), (400, 192)], 399) is 160.
    """
    return next(size for start, size in reversed(phases) if start <= step)
