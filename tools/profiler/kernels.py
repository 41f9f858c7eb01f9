"""Compares our operators with a copy of as many bytes, on random images and tokens.

An operator that moves little more than it must is bound by memory: a large copy, measured in the same run, is its
ceiling. Bytes count every input once and every output once. benchmarks/bench_kernels.py runs the same work against the
published formulation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from patchmill.kernels.backend import active_backend
from patchmill.kernels.gather import gather_patches, gather_tokens
from patchmill.kernels.masked_loss import masked_mse
from patchmill.kernels.permute import mask_indices
from patchmill.kernels.unshuffle import unshuffle
from patchmill.tools.profiler.timing import copy_bytes_per_second, measured, timed_in_turns
from patchmill.trainer.config.pretrain import PretrainConfig
from patchmill.trainer.engine.world import autocast_dtype

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Operator(NamedTuple):
    """An operator's call, and the fewest bytes that it can move."""

    name: str
    call: Callable[[], object]
    bytes_moved: int


class Workload:
    """Inputs in one model's sizes: B images, L patches, K kept, M masked, P values per patch, E decoder width.

    One class token; three channels; three of four patches masked.
    """

    def __init__(
        self, patch: int, image_hw: tuple[int, int], width: int, batch: int, device: str, dtype: torch.dtype
    ) -> None:
        self.patch, self.width, self.dtype = patch, width, dtype
        self.B, self.L = batch, (image_hw[0] // patch) * (image_hw[1] // patch)
        self.K = self.L // 4
        self.M, self.P = self.L - self.K, 3 * self.patch**2
        self.images = torch.randint(0, 256, (batch, *image_hw, 3), dtype=torch.uint8, device=device)
        self.samples = torch.arange(batch, device=device)
        self.keep, self.mask, self.restore = mask_indices(0, 0, self.samples, self.L, self.K)

        def leaf(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, device=device).to(dtype).requires_grad_()

        self.tokens = leaf(batch, 1 + self.L, width)
        self.x = leaf(batch, 1 + self.K, width)
        self.token = leaf(width, dtype=torch.float32)
        self.decoder_pos = torch.randn(1 + self.L, width, device=device)
        self.pred = leaf(batch, self.M, self.P)
        self.grad_rows = torch.randn(batch, self.M, width, device=device).to(dtype)
        self.grad_tokens = torch.randn(batch, 1 + self.L, width, device=device).to(dtype)

    def our_masks(self) -> tuple[Tensor, ...]:
        """Draws the mask indices of a batch."""
        return mask_indices(0, 0, self.samples, self.L, self.K)

    def our_patches(self) -> Tensor:
        """Gathers the visible patches, normalised."""
        return gather_patches(self.images, self.keep, self.patch, MEAN, STD, self.dtype)

    def our_tokens(self) -> tuple[Tensor, ...]:
        """Gathers the masked tokens of the last decoder block; returns their gradient."""
        return torch.autograd.grad(gather_tokens(self.tokens, self.mask, None, 1), self.tokens, self.grad_rows)

    def our_unshuffle(self) -> tuple[Tensor, ...]:
        """Unshuffles decoder tokens; returns their gradients."""
        out = unshuffle(self.x, self.token, self.decoder_pos, self.restore, 1)
        return torch.autograd.grad(out, (self.x, self.token), self.grad_tokens)

    def our_loss(self) -> tuple[Tensor, ...]:
        """Computes the loss; returns its gradient."""
        loss = masked_mse(self.pred, self.images, self.mask, self.patch, MEAN, STD, True)
        return torch.autograd.grad(loss, self.pred)

    def our_step(self) -> list[Tensor]:
        """Does the work of a step outside the network."""
        keep, mask, restore = self.our_masks()
        patches = gather_patches(self.images, keep, self.patch, MEAN, STD, self.dtype)
        out = unshuffle(self.x, self.token, self.decoder_pos, restore, 1)
        loss = masked_mse(self.pred, self.images, mask, self.patch, MEAN, STD, True)
        return [patches, *torch.autograd.grad((out, loss), (self.x, self.token, self.pred), (self.grad_tokens, None))]

    def operators(self) -> list[Operator]:
        """Returns every operator with its bytes: ids are 4 bytes, pixels 1, tokens and predictions `item`."""
        item, ids = self.dtype.itemsize, 4 * self.B
        row, kept, rows = self.width * item, self.B * (1 + self.K), self.B * (1 + self.L)
        masks = ids * 2 * self.L + 8 * self.B
        patches = self.B * self.K * self.P * (1 + item) + ids * self.K
        tokens = row * (3 * self.B * self.M + rows) + 2 * ids * self.M
        shuffle = 2 * row * (kept + rows) + 2 * ids * self.L + 4 * self.width * (1 + self.L)
        loss = self.B * self.M * self.P * (1 + 4 * item) + ids * self.M
        return [
            Operator("mask indices", self.our_masks, masks),
            Operator("gather patches", self.our_patches, patches),
            Operator("gather tokens, fwd + bwd", self.our_tokens, tokens),
            Operator("unshuffle, fwd + bwd", self.our_unshuffle, shuffle),
            Operator("masked loss, fwd + bwd", self.our_loss, loss),
            Operator("all together", self.our_step, masks + patches + shuffle + loss),
        ]


def measure_kernels(config: PretrainConfig, device: torch.device, repeats: int = 15) -> dict[str, Any]:
    """Times the operators at the sizes of a config, taking turns; docs/profile.md describes the result."""
    model, batch = config.model, config.train.global_batch
    dtype = autocast_dtype(config.train.precision, device) or torch.float32
    workload = Workload(model.patch_size, model.image_hw, model.decoder_embed_dim, batch, str(device), dtype)
    copy = copy_bytes_per_second(str(device), repeats=5)
    operators = workload.operators()
    taken = timed_in_turns({operator.name: operator.call for operator in operators}, str(device), repeats)
    rows = []
    for name, _, moved in operators:
        seconds = measured(taken[name])
        of_copy = moved / seconds["median"] / copy
        rows.append({"name": name, "seconds": seconds, "mb": moved / 1e6, "of_copy": of_copy})
    return {
        "backend": active_backend(workload.x), "batch": batch, "dtype": str(dtype).removeprefix("torch."),
        "copy_gb_per_s": copy / 1e9, "operators": rows,
    }  # fmt: skip
