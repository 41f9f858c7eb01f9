"""Captures a whole update as one CUDA graph, for steps so short that launching their kernels dominates.

A graph replays fixed kernels on fixed memory. Inputs are copied into place, the learning rate is a GPU tensor, and an
update's values are copied out before the next one overwrites them. The loader's threads keep running during the
capture; they allocate and pin memory, which CUDA's strictest capture mode would forbid. Not yet run on a GPU.
"""

from collections.abc import Callable

import torch

from patchmill.pipeline.batch import Batch
from patchmill.pipeline.plan.masks import MaskPlan
from patchmill.trainer.engine.step import StepValues

EAGER_STEPS = 3
"""eager updates before the capture, which settle cuBLAS, the allocator and the optimizer's state"""


class GraphedUpdate:
    """Calls `update` eagerly at first, then captures it once and replays it. Every call is one update."""

    def __init__(self, update: Callable[[Batch], StepValues], optimizer: torch.optim.AdamW) -> None:
        self.update = update
        self.stream = torch.cuda.Stream()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.eager_steps_left = EAGER_STEPS
        for group in optimizer.param_groups:
            device = group["params"][0].device
            group["capturable"], group["lr"] = True, torch.tensor(float(group["lr"]), device=device)

    def __call__(self, batch: Batch) -> StepValues:
        """Runs one update; the caller owns the returned values."""
        if self.graph is not None and batch.images.shape != self.inputs.images.shape:
            self.graph, self.eager_steps_left = None, EAGER_STEPS  # a size schedule has switched to another image size
        if self.eager_steps_left:
            self.eager_steps_left -= 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                values = self.update(batch)
            torch.cuda.current_stream().wait_stream(self.stream)
            return values
        if self.graph is None:
            self._capture(batch)
        assert self.graph is not None
        for held, new in zip(_tensors(self.inputs), _tensors(batch), strict=True):
            held.copy_(new)
        self.graph.replay()
        return StepValues(*(value.clone() for value in self.values))

    def _capture(self, batch: Batch) -> None:
        plan = batch.plan
        ids = MaskPlan(plan.ids_keep.clone(), plan.ids_mask.clone(), plan.ids_restore.clone())
        self.inputs = Batch(batch.images.clone(), ids, batch.labels, batch.sample_ids, batch.epoch, batch.step)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            self.values = self.update(self.inputs)


def _tensors(batch: Batch) -> tuple[torch.Tensor, ...]:
    return batch.images, batch.plan.ids_keep, batch.plan.ids_mask, batch.plan.ids_restore
