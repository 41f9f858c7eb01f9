"""Checks every operator against its reference: silence, or an AssertionError that says what differs.

Each check compares an operator, and its gradients, with the published formulation in float64 on fresh random inputs.
The same checks serve the CPU path, Triton's interpreter and a GPU; they need torch and numpy alone (a GPU machine may
have no pytest). Memory that an operator leaves unwritten holds NaN while a check runs.

Tolerances, as ||found - expected|| / ||expected||: a 16-bit result is an exact value rounded once, so that its error is
at most half a unit in the last place (eps / 2 of its dtype); float32 results carry a few roundings, 8 eps; float32
sums over rows or over the batch are allowed 64 eps. Gathers move values and must be equal bit for bit. See
docs/numerics.md.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks import published_operators as published
from benchmarks.compare import assert_close, assert_equal, grad_of, poisoned_empty, sum_tolerance
from patchmill.kernels.gather import gather_patches, gather_tokens
from patchmill.kernels.masked_loss import masked_l1, masked_mse
from patchmill.kernels.permute import mask_indices
from patchmill.kernels.philox import STREAM_MASK, draw_numpy
from patchmill.kernels.unshuffle import unshuffle

MEAN, STD = (0.485, 0.456, 0.406, 0.3, 0.5, 0.5, 0.5, 0.5), (0.229, 0.224, 0.225, 0.2, 0.25, 0.25, 0.25, 0.25)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The gradient that arrives at the loss. float16 needs it: unscaled, dloss/dpred of a real batch is below float16's
# range.
LOSS_SCALE = 1024.0


@dataclass(frozen=True)
class Case:
    """Sizes of one check: B images of H x W x C pixels, K kept patches, token widths D and E, num_prefix tokens."""

    name: str
    batch: int
    height: int
    width: int
    channels: int
    patch: int
    num_keep: int
    token_width: int
    num_prefix: int

    @property
    def num_patches(self) -> int:
        return (self.height // self.patch) * (self.width // self.patch)


CASES = (
    Case("published", 9, 64, 64, 3, 16, 4, 48, 1),
    Case("one image, one patch kept", 1, 32, 48, 3, 16, 1, 32, 1),
    Case("all but one kept", 2, 48, 64, 3, 16, 11, 40, 0),
    Case("grey, patch 14, four prefix tokens", 3, 28, 56, 1, 14, 3, 24, 4),
    Case("four channels, patch 8, odd width", 3, 40, 24, 4, 8, 5, 33, 1),
    Case("eight channels, patch 32", 2, 64, 32, 8, 32, 1, 272, 1),
    Case("patch 4, width beyond a tile", 2, 12, 20, 3, 4, 7, 520, 1),
)
# Most patches are kept, so that the interpreter has few programs to run.
MANY_PATCHES = Case("3136 patches", 1, 224, 224, 1, 4, 3000, 16, 1)


def _draw_images(case: Case, device: str) -> Tensor:
    shape = (case.batch, case.height, case.width, case.channels)
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    # A flat patch: the variance of its values is rounding error, its target must stay small.
    images[:, : case.patch, : case.patch] = 77
    return images.to(device)


def _draw_plan(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor]:
    ids_shuffle = torch.rand(case.batch, case.num_patches).argsort(1).int()
    keep, mask = ids_shuffle[:, : case.num_keep].contiguous(), ids_shuffle[:, case.num_keep :].contiguous()
    return keep.to(device), mask.to(device), ids_shuffle.argsort(1).int().to(device)


def mask_indices_numpy(
    seed: int, epoch: int, sample_ids: list[int], num_patches: int, num_keep: int, repeats: list[int]
) -> list[Tensor]:
    """The masks by the book, one image at a time, from philox.draw_numpy."""
    rows = []
    for sample, repeat in zip(sample_ids, repeats, strict=True):
        blocks = np.arange(-(-num_patches // 4))
        words = draw_numpy(seed, STREAM_MASK, blocks, sample, epoch, repeat).reshape(-1)[:num_patches]
        if num_patches <= 256:
            keys = ((words & np.uint32(0xFFFFFF00)) | np.arange(num_patches, dtype=np.uint32)).view(np.int32)
        else:
            keys = words.astype(np.int64) << 12 | np.arange(num_patches)
        order = np.argsort(keys)
        rows.append((order[:num_keep], order[num_keep:], np.argsort(order)))
    return [torch.from_numpy(np.stack(column).astype(np.int32)) for column in zip(*rows, strict=True)]


def check_mask_indices(device: str) -> None:
    """The three tensors equal those NumPy makes by the book: both key widths, padded and full blocks, many patches."""
    samples, repeats = [0, 2**31 + 5, 2**32 - 1], [0, 3, 2**31]
    sizes = ((1, 1), (4, 1), (196, 49), (255, 254), (256, 64), (257, 64))
    runs = [(samples, repeats, *size, seed, epoch) for size in sizes for seed, epoch in ((0, 0), (2**64 - 3, 16))]
    runs += [([7], [1], 784, 1, 5, 1), ([9], [0], 3136, 784, 2**63, 399)]
    for sample_ids, repeat_ids, num_patches, num_keep, seed, epoch in runs:
        ids_B, repeats_B = torch.tensor(sample_ids, device=device), torch.tensor(repeat_ids, device=device)
        found = mask_indices(seed, epoch, ids_B, num_patches, num_keep, repeats_B)
        expected = mask_indices_numpy(seed, epoch, sample_ids, num_patches, num_keep, repeat_ids)
        for f, e in zip(found, expected, strict=True):
            assert_equal(f"mask indices, L={num_patches}, K={num_keep}, seed={seed}", f.cpu(), e)
    found = mask_indices(5, 1, torch.tensor(samples, device=device), 196, 49)
    for f, e in zip(found, mask_indices_numpy(5, 1, samples, 196, 49, [0, 0, 0]), strict=True):
        assert_equal("mask indices without repeats", f.cpu(), e)


def _exact_patches(images: Tensor, case: Case) -> Tensor:
    statistics = torch.tensor([MEAN[: case.channels], STD[: case.channels]], dtype=torch.float64, device=images.device)
    return published.patchify(published.normalize_images(images, *statistics.unbind()), case.patch)


def check_gather_patches(case: Case, dtype: torch.dtype, device: str) -> None:
    """Patches equal those of the normalised image, cut and gathered."""
    images, (ids_keep, _, _) = _draw_images(case, device), _draw_plan(case, device)
    mean, std = MEAN[: case.channels], STD[: case.channels]
    found = gather_patches(images, ids_keep, case.patch, mean, std, dtype)
    patches = _exact_patches(images, case)
    assert found.dtype == dtype
    assert_close(f"gather_patches, {case.name}", found, published.gather_rows(patches, ids_keep))


def check_gather_tokens(case: Case, dtype: torch.dtype, device: str) -> None:
    """Tokens and gradients equal those of autograd, with and without positions, with ids that repeat."""
    rows = case.num_prefix + case.num_patches
    ids = _draw_plan(case, device)[1]
    for ids_BK, with_pos in ((ids, True), (ids % 3, False)):
        name = f"gather_tokens, {case.name}, {'distinct ids, positions' if with_pos else 'repeated ids'}: "
        x = torch.randn(case.batch, rows, case.token_width, device=device).to(dtype).requires_grad_()
        pos = torch.randn(rows, case.token_width, device=device, requires_grad=True)
        grad = torch.randn(case.batch, ids_BK.shape[1], case.token_width, device=device).to(dtype)
        found = gather_tokens(x, ids_BK, pos if with_pos else None, case.num_prefix)
        found.backward(grad)
        x64, pos64 = x.detach().double().requires_grad_(), pos.detach().double().requires_grad_()
        expected = published.gather_rows((x64 + pos64 if with_pos else x64)[:, case.num_prefix :], ids_BK)
        expected.backward(grad.double())
        if with_pos:
            assert_close(name + "tokens", found, expected)
            assert_close(name + "dpos", pos.grad, pos64.grad, sum_tolerance(torch.float32))
        else:
            assert_equal(name + "tokens", found, expected.to(dtype))
        assert_close(name + "dx", x.grad, x64.grad, sum_tolerance(dtype))


def check_unshuffle(case: Case, dtype: torch.dtype, device: str) -> None:
    """Decoder tokens and the gradients of tokens, mask token and positions equal those of the published code."""
    ids_restore = _draw_plan(case, device)[2]
    rows, name = case.num_prefix + case.num_patches, f"unshuffle, {case.name}: "
    x = torch.randn(case.batch, case.num_prefix + case.num_keep, case.token_width, device=device).to(dtype)
    token, pos = torch.randn(case.token_width, device=device), torch.randn(rows, case.token_width, device=device)
    x, token, pos = x.requires_grad_(), token.requires_grad_(), pos.requires_grad_()
    x64, token64, pos64 = (t.detach().double().requires_grad_() for t in (x, token, pos))
    grad = torch.randn(case.batch, rows, case.token_width, device=device).to(dtype)
    found = unshuffle(x, token, pos, ids_restore, case.num_prefix)
    found.backward(grad)
    expected = published.unshuffle(x64, token64, pos64, ids_restore, case.num_prefix)
    expected.backward(grad.double())
    assert_close(name + "tokens", found, expected)
    assert_equal(name + "dx", x.grad, grad_of(x64).to(dtype))
    assert_close(name + "dmask_token", token.grad, token64.grad, sum_tolerance(torch.float32))
    assert_close(name + "dpos", pos.grad, pos64.grad, sum_tolerance(torch.float32))


def check_masked_loss(case: Case, dtype: torch.dtype, device: str, power: int = 2, norm_pix: bool = True) -> None:
    """Loss and gradient equal those of the published loss over the full sequence; without a gradient the same loss."""
    images, (_, ids_mask, _) = _draw_images(case, device), _draw_plan(case, device)
    mean, std = MEAN[: case.channels], STD[: case.channels]
    target = _exact_patches(images, case)
    pred = torch.randn(*ids_mask.shape, target.shape[2], device=device).to(dtype).requires_grad_()
    operator = masked_mse if power == 2 else masked_l1
    found = operator(pred, images, ids_mask, case.patch, mean, std, norm_pix)
    (found * LOSS_SCALE).backward()
    full = torch.zeros_like(target).scatter(1, ids_mask.long()[..., None].expand_as(pred), pred.detach().double())
    mask = torch.zeros(target.shape[:2], device=device, dtype=torch.float64).scatter(1, ids_mask.long(), 1.0)
    expected = published.masked_loss(full.requires_grad_(), target, mask, norm_pix, power)
    (expected * LOSS_SCALE).backward()
    name = f"masked loss, {case.name}, power {power}, norm_pix {norm_pix}: "
    assert found.dtype == torch.float32
    assert_close(name + "loss", found, expected)
    assert_close(name + "dpred", pred.grad, published.gather_rows(grad_of(full), ids_mask))
    with torch.no_grad():
        without_grad = operator(pred, images, ids_mask, case.patch, mean, std, norm_pix)
    assert_equal(name + "loss without gradient", without_grad, found)


def check_large_offsets(device: str) -> None:
    """Batches of more than 2**31 bytes and values: offsets that wrap would read and write another image. For GPUs."""
    batch, statistics = 20_000, (16, MEAN[:3], STD[:3])
    images = torch.randint(0, 256, (batch, 224, 224, 3), dtype=torch.uint8, device=device)
    ids_keep, ids_mask, _ = mask_indices(1, 0, torch.arange(batch, device=device), 196, 49)
    pred = torch.randn(batch, 147, 768, dtype=torch.bfloat16, device=device).requires_grad_()
    masked_mse(pred, images, ids_mask, *statistics, True).backward()
    last = slice(batch - 2, batch)
    last_pred = pred.detach()[last].clone().requires_grad_()
    masked_mse(last_pred, images[last], ids_mask[last], *statistics, True).backward()
    assert_close(
        "large offsets, dpred", grad_of(pred)[last] * (batch / 2), last_pred.grad, torch.finfo(torch.bfloat16).eps
    )
    found = gather_patches(images, ids_keep, *statistics, torch.bfloat16)[last]
    expected = gather_patches(images[last], ids_keep[last], *statistics, torch.bfloat16)
    assert_equal("large offsets, patches", found, expected)


def check_no_host_sync(device: str) -> None:
    """No operator waits for the device: PyTorch raises on a synchronising call. For GPUs."""
    case = CASES[0]
    images, sample_ids = _draw_images(case, device), torch.arange(case.batch, device=device)
    mean, std, rows = MEAN[:3], STD[:3], case.num_prefix + case.num_patches
    x = torch.randn(case.batch, case.num_prefix + case.num_keep, case.token_width, device=device, requires_grad=True)
    token, pos = torch.randn(case.token_width, device=device), torch.randn(rows, case.token_width, device=device)
    head = torch.randn(case.token_width, 3 * case.patch**2, device=device)
    # The first turn compiles kernels and fills caches, which may wait.
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            ids_keep, ids_mask, ids_restore = mask_indices(3, 1, sample_ids, case.num_patches, case.num_keep)
            gather_patches(images, ids_keep, case.patch, mean, std, torch.bfloat16)
            tokens = unshuffle(x, token, pos, ids_restore, case.num_prefix)
            pred = gather_tokens(tokens, ids_mask, None, case.num_prefix) @ head
            masked_mse(pred, images, ids_mask, case.patch, mean, std, True).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


CASE_CHECKS = (check_gather_patches, check_gather_tokens, check_unshuffle, check_masked_loss)


# Every launch with other sizes or dtypes is a kernel to compile, which is what a check on a GPU waits for. So each case
# runs in one dtype, the published one in all, and the other losses on the published case and one that pads its patches.
COVERING = (
    *((CASES[0], dtype) for dtype in DTYPES),
    *((case, DTYPES[i % 3]) for i, case in enumerate((*CASES[1:], MANY_PATCHES))),
)
OTHER_LOSSES = ((2, False), (1, True), (1, False))


def check_all(device: str) -> int:
    """Run a covering set of the checks on a device with poisoned outputs; returns how many ran.

    Raises:
        AssertionError: the first difference found.
    """
    torch.manual_seed(0)
    with poisoned_empty():
        check_mask_indices(device)
        for case, dtype in COVERING:
            for check in CASE_CHECKS:
                check(case, dtype, device)
        for power, norm_pix in OTHER_LOSSES:
            for case, dtype in ((CASES[0], torch.bfloat16), (CASES[3], torch.float32)):
                check_masked_loss(case, dtype, device, power, norm_pix)
        count = 1 + len(COVERING) * len(CASE_CHECKS) + 2 * len(OTHER_LOSSES)
    if device.startswith("cuda"):
        check_no_host_sync(device)
        check_large_offsets(device)
        count += 2
    return count
