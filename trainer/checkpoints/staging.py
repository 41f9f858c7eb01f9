"""Copies tensors into main memory, for checkpoints that are written while training goes on."""

import torch
from torch import Tensor


class Staging:
    """Buffers in main memory for copies of tensors, made at the first copy of each name and used again.

    Those for tensors of a GPU are pinned, and it copies into them in the order of its stream while the host goes on.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """Copies a tensor into its buffer and returns that. On a GPU the values arrive later."""
        if name not in self._buffers:
            self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return self._buffers[name].copy_(tensor, non_blocking=True)
