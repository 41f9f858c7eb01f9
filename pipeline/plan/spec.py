"""Defines what a batch is: its images, its part of the global batch, and the seed of its draws.

Legend: G global batch, W ranks, K repeats, B = G / W rows of a rank's batch, U = B / K slots (decoded images).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchSpec:
    """What the stages of the pipeline make together.

    Raises:
        ValueError: the numbers do not fit each other.
    """

    size_hw: tuple[int, int]
    """height and width of the images"""
    patch_size: int
    """side of a patch; divides both"""
    channels: int
    """1 to 8"""
    seed: int
    """64-bit seed of the run"""
    global_batch: int
    """G: images of a step on all ranks together"""
    repeats: int = 1
    """K: crops and masks from each decoded image"""
    rank: int = 0
    """this process"""
    world_size: int = 1
    """W: processes that train together"""

    def __post_init__(self) -> None:
        height, width = self.size_hw
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"image size {height} x {width} is not a multiple of the patch size {self.patch_size}")
        if not 1 <= self.channels <= 8:
            raise ValueError(f"channels must be 1 to 8, got {self.channels}")
        if self.global_batch < 1 or self.global_batch % (self.world_size * self.repeats):
            raise ValueError(
                f"global batch {self.global_batch} must be a multiple of world size x data.repeats = "
                f"{self.world_size} x {self.repeats}"
            )

    @property
    def grid_hw(self) -> tuple[int, int]:
        """Patches in a column and in a row."""
        return self.size_hw[0] // self.patch_size, self.size_hw[1] // self.patch_size

    @property
    def aspect(self) -> float:
        """Width / height of the images."""
        return self.size_hw[1] / self.size_hw[0]

    @property
    def local_batch(self) -> int:
        """B."""
        return self.global_batch // self.world_size

    @property
    def local_slots(self) -> int:
        """U."""
        return self.local_batch // self.repeats
