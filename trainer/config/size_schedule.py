"""Decides which image size a step trains on (train.size_schedule).

Smaller images come first, because the FLOPs of a step grow with the number of patches. EfficientNetV2 (Tan and Le 2021,
section 4) uses such progressive resizing for classifiers, DailyMAE for masked autoencoders (160, 192, 224 px).

    ((0.0, 160), (0.4, 192), (0.8, 224)) over 10 epochs:  epochs 0 to 3 at 160 px, 4 to 7 at 192, 8 and 9 at 224

Sizes change only between epochs and depend on the step alone: a run can resume in any phase.
"""

from collections.abc import Sequence

Schedule = tuple[tuple[float, int], ...]


def check_schedule(schedule: Schedule, image_size: int | tuple[int, int], patch_size: int) -> None:
    """Raises ValueError for a schedule that does not end at the model's image size or has impossible steps."""
    if not schedule:
        return
    shares, sizes = zip(*schedule, strict=True)
    if shares[0] != 0 or list(shares) != sorted(set(shares)) or shares[-1] >= 1:
        raise ValueError(
            f"train.size_schedule has the shares {shares} of the run; they must start at 0, rise and stay below 1"
        )
    if sizes[-1] != image_size:
        raise ValueError(
            f"train.size_schedule ends with {sizes[-1]} px and model.image_size is {image_size}; they must be equal "
            "(a schedule trains on square images)"
        )
    wrong = [size for size in sizes if size < patch_size or size % patch_size]
    if wrong:
        raise ValueError(f"train.size_schedule: {wrong[0]} px is not a multiple of model.patch_size {patch_size}")


def first_steps(schedule: Schedule, steps_per_epoch: int, total_steps: int) -> list[tuple[int, int]]:
    """Lists (first step, size) of each phase, in order.

    Args:
        schedule: checked by `check_schedule`; shares are rounded to whole epochs.
    Raises:
        ValueError: the run is so short that a phase would have no epoch.
    """
    epochs = total_steps / steps_per_epoch
    starts = [round(share * epochs) * steps_per_epoch for share, _ in schedule]
    for (share, size), start, end in zip(schedule, starts, (*starts[1:], total_steps), strict=False):
        if start >= end:
            raise ValueError(
                f"train.size_schedule: {size} px from {share:g} of the run would last for no epoch of {epochs:g}; "
                "train longer, or leave it out"
            )
    return [(start, size) for start, (_, size) in zip(starts, schedule, strict=True)]


def size_at(phases: Sequence[tuple[int, int]], step: int) -> int:
    """Returns the size that update `step` (from 0) trains on, given the phases of `first_steps`.

    Example: size_at([(0, 160), (400, 192)], 399) is 160.
    """
    return next(size for start, size in reversed(phases) if start <= step)
