"""Defines the batch that a training step receives.

A batch's tensors belong to whoever holds the batch: the loader never writes into them again. A batch can be kept and
compared; dropping it frees its memory.
"""

from dataclasses import dataclass

from torch import Tensor

from patchmill.pipeline.plan.masks import MaskPlan


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch, on the training device; the current stream waits until it is ready.

    Attributes:
        images: uint8 `[B, H, W, C]`, cropped, resized and perhaps flipped; not normalised.
        plan: which patches are kept and which are masked.
        labels: int64 `[B]`; -1 unknown.
        sample_ids: int64 `[B]`; index in the dataset's sample table (a plain tar stream: a hash of shard name and key).
        epoch: pass over the data, from 0.
        step: step within the epoch, from 0.
    """

    images: Tensor
    plan: MaskPlan
    labels: Tensor
    sample_ids: Tensor
    epoch: int
    step: int
