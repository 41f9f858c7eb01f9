"""The operators in plain PyTorch: their documentation, the CPU path, and what the Triton kernels are tested against.

    seed, epoch, samples -> [mask_indices] -> ids
    images, ids_keep -> [gather_patches] -> encoder        tokens, ids -> [gather_tokens] -> tokens
    encoder tokens, ids_restore -> [unshuffle] -> decoder tokens
    prediction, images, ids_mask -> [masked_loss] -> loss and its gradient

Written for speed as well: only the patches in `ids` are read, and there is no loop over the batch. Sums and
normalisation are in float32 (float64 for float64 tensors), whatever the dtype in memory.

Shapes: B images, H W C pixels, L patches, K kept, M masked, N = num_prefix + tokens, D encoder width, E decoder width,
P = patch_size * patch_size * C values per patch, in the published order (row, column, channel).
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from patchmill.kernels.philox import STREAM_MASK, Key, philox_torch

# Up to 256 patches a sort key is 32 bits: 24 random ones above 8 of patch id. Beyond, 64: 32 random above 12 of id.
SMALL_KEY_PATCHES, SMALL_ID_BITS = 256, 8
MAX_PATCHES, LARGE_ID_BITS = 4096, 12
VARIANCE_EPS = 1e-6  # models_mae.py of the published code, forward_loss

MaskIndices = tuple[Tensor, Tensor, Tensor]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype sums and normalisation use: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def mask_words(sample_ids_B: Tensor, repeats_B: Tensor | None, key: Key, epoch: int, blocks_R: Tensor) -> Tensor:
    """Draw the four words of each block of the mask stream: int64 `[B, R, 4]` that holds 32-bit values."""
    epochs = torch.full_like(sample_ids_B[:, None], epoch)
    repeats = torch.zeros_like(epochs) if repeats_B is None else repeats_B[:, None]
    counter = (STREAM_MASK << 24 | blocks_R, sample_ids_B[:, None], epochs, repeats)
    return torch.stack(philox_torch(*counter, key), dim=-1)


def mask_keys(sample_ids_B: Tensor, repeats_B: Tensor | None, key: Key, epoch: int, num_patches: int) -> Tensor:
    """Draw the sort keys `[B, L]`: patch l takes word l % 4 of block l // 4.

    Up to 256 patches the key is int32: the word's low 8 bits are replaced by l and the 32 bits are read as a signed
    number (the sign bit is a random bit like the others; NumPy, torch and Triton all sort signed). Beyond, it is int64:
    word << 12 | l, never negative. No two keys of an image are equal, so that every sort gives the same order.
    """
    blocks = torch.arange((num_patches + 3) // 4, device=sample_ids_B.device)
    words = mask_words(sample_ids_B, repeats_B, key, epoch, blocks).flatten(1)[:, :num_patches]
    ids = torch.arange(num_patches, device=words.device)
    if num_patches > SMALL_KEY_PATCHES:
        return (words << LARGE_ID_BITS) | ids
    unsigned = (words >> SMALL_ID_BITS << SMALL_ID_BITS) | ids
    sign = 1 << 31
    return ((unsigned ^ sign) - sign).to(torch.int32)


def split_order(ids_shuffle_BL: Tensor, num_keep: int) -> MaskIndices:
    """Split an order of the patches into ids_keep `[B, K]`, ids_mask `[B, M]` and the inverse ids_restore `[B, L]`."""
    ids_shuffle_BL = ids_shuffle_BL.to(torch.int32)
    places = torch.arange(ids_shuffle_BL.shape[1], dtype=torch.int32, device=ids_shuffle_BL.device)
    ids_restore_BL = torch.empty_like(ids_shuffle_BL)
    ids_restore_BL.scatter_(1, ids_shuffle_BL.long(), places.expand_as(ids_shuffle_BL))
    keep, mask = ids_shuffle_BL[:, :num_keep], ids_shuffle_BL[:, num_keep:]
    contiguous = torch.contiguous_format
    return keep.clone(memory_format=contiguous), mask.clone(memory_format=contiguous), ids_restore_BL


def mask_indices(
    sample_ids_B: Tensor, repeats_B: Tensor | None, key: Key, epoch: int, num_patches: int, num_keep: int
) -> MaskIndices:
    """Order the patches of every image by their random keys and split the order: see permute.mask_indices."""
    keys_BL = mask_keys(sample_ids_B, repeats_B, key, epoch, num_patches)
    id_bits = LARGE_ID_BITS if num_patches > SMALL_KEY_PATCHES else SMALL_ID_BITS
    return split_order(keys_BL.sort(dim=1).values & ((1 << id_bits) - 1), num_keep)


@functools.lru_cache(maxsize=32)
def _channel_affine(
    mean_C: tuple[float, ...], std_C: tuple[float, ...], repeats: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(u / 255 - mean) / std as scale * u + bias, one value per position of a patch: two `[P]` tensors."""
    scale = torch.tensor([1 / (255 * s) for s in std_C], dtype=dtype)
    bias = torch.tensor([-m / s for m, s in zip(mean_C, std_C, strict=True)], dtype=dtype)
    return scale.repeat(repeats).to(device), bias.repeat(repeats).to(device)


def patch_bytes(images_BHWC: Tensor, ids_BK: Tensor, patch_size: int) -> Tensor:
    """Gather the bytes of the patches in ids: uint8 `[B, K, P]`.

    A row of a patch is patch_size * C neighbouring bytes; they are moved as the widest integers that divide it.
    """
    batch, height, width, channels = images_BHWC.shape
    rows, columns, row_bytes = height // patch_size, width // patch_size, patch_size * channels
    step = math.gcd(row_bytes, images_BHWC.storage_offset(), 8)
    wide = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[step]
    grid = images_BHWC.view(batch, rows, patch_size, columns, row_bytes).view(wide).transpose(2, 3)
    images = torch.arange(batch, device=ids_BK.device)[:, None]
    ids = ids_BK.long()
    patches = grid[images, ids // columns, ids % columns]
    return patches.view(torch.uint8).view(batch, -1, patch_size * row_bytes)


def gather_patches(
    images_BHWC: Tensor,
    ids_BK: Tensor,
    patch_size: int,
    mean_C: Sequence[float],
    std_C: Sequence[float],
    out_dtype: torch.dtype,
) -> Tensor:
    """Gather and normalise the patches in ids: `[B, K, P]` of out_dtype. See gather.gather_patches."""
    dtype = compute_dtype(out_dtype)
    area = patch_size * patch_size
    scale_P, bias_P = _channel_affine(tuple(mean_C), tuple(std_C), area, dtype, images_BHWC.device)
    patches = patch_bytes(images_BHWC, ids_BK, patch_size).to(dtype)
    return torch.addcmul(bias_P, patches, scale_P, out=patches).to(out_dtype)


def _flat_rows(ids_BK: Tensor, num_rows: int, num_prefix: int) -> Tensor:
    """Row numbers in a `[B * num_rows, ...]` matrix of tokens that stand num_prefix rows into their image."""
    starts = torch.arange(ids_BK.shape[0], device=ids_BK.device)[:, None] * num_rows + num_prefix
    return (ids_BK.long() + starts).flatten()


def gather_tokens(x_BND: Tensor, ids_BK: Tensor, pos_ND: Tensor | None, num_prefix: int) -> Tensor:
    """Take the rows num_prefix + ids of every image, plus their position: `[B, K, D]`. See gather.gather_tokens."""
    num_rows, width = x_BND.shape[1:]
    rows = x_BND.view(-1, width).index_select(0, _flat_rows(ids_BK, num_rows, num_prefix)).view(*ids_BK.shape, width)
    if pos_ND is None:
        return rows
    dtype = compute_dtype(x_BND.dtype)
    position = pos_ND.index_select(0, (ids_BK + num_prefix).flatten()).view_as(rows)
    return (rows.to(dtype) + position.to(dtype)).to(x_BND.dtype)


def gather_tokens_backward(grad_BKD: Tensor, ids_BK: Tensor, num_rows: int, num_prefix: int) -> Tensor:
    """Add the rows of grad back to where they came from: `[B, num_rows, D]`, zero elsewhere."""
    batch, _, width = grad_BKD.shape
    dx = torch.zeros(batch * num_rows, width, dtype=compute_dtype(grad_BKD.dtype), device=grad_BKD.device)
    dx.index_add_(0, _flat_rows(ids_BK, num_rows, num_prefix), grad_BKD.reshape(-1, width).to(dx.dtype))
    return dx.view(batch, num_rows, width).to(grad_BKD.dtype)


def _kept_ids(ids_restore_BL: Tensor, num_keep: int) -> Tensor:
    """Invert the permutation ids_restore and take its first num_keep entries: which patches were kept, `[B, K]`."""
    places = torch.arange(ids_restore_BL.shape[1], device=ids_restore_BL.device).expand_as(ids_restore_BL)
    return torch.empty_like(places).scatter_(1, ids_restore_BL.long(), places)[:, :num_keep]


def unshuffle(x_BNE: Tensor, mask_token_E: Tensor, pos: Tensor, ids_restore_BL: Tensor, num_prefix: int) -> Tensor:
    """Put kept tokens back among mask tokens, with positions: `[B, num_prefix + L, E]`. See unshuffle.unshuffle."""
    batch, num_tokens, width = x_BNE.shape
    dtype = compute_dtype(x_BNE.dtype)
    pos = pos.to(dtype)
    kept_BK = _kept_ids(ids_restore_BL, num_tokens - num_prefix)
    out = (pos + mask_token_E.to(dtype)).to(x_BNE.dtype).repeat(batch, 1, 1)
    out[:, :num_prefix] = x_BNE[:, :num_prefix] + pos[:num_prefix]
    positions = pos.index_select(0, (kept_BK + num_prefix).flatten())
    kept = x_BNE[:, num_prefix:].to(dtype).reshape(-1, width) + positions
    out.view(-1, width).index_copy_(0, _flat_rows(kept_BK, out.shape[1], num_prefix), kept.to(out.dtype))
    return out


def unshuffle_backward(
    grad_BNE: Tensor, ids_restore_BL: Tensor, num_keep: int, num_prefix: int
) -> tuple[Tensor, Tensor]:
    """Split grad into dx `[B, num_prefix + K, E]` and dmask_token `[E]`, the latter in the compute dtype."""
    batch, num_rows, width = grad_BNE.shape
    kept_BK = _kept_ids(ids_restore_BL, num_keep)
    dx = grad_BNE.new_empty(batch, num_prefix + num_keep, width)
    dx[:, :num_prefix] = grad_BNE[:, :num_prefix]
    kept = grad_BNE.view(-1, width).index_select(0, _flat_rows(kept_BK, num_rows, num_prefix))
    dx[:, num_prefix:] = kept.view(batch, num_keep, width)
    # A product with 0/1 weights reads grad once; the batch is summed last, so that errors stay those of short sums.
    grad = grad_BNE.to(compute_dtype(grad_BNE.dtype))
    weights = grad.new_zeros(batch, 1, num_rows)
    weights[:, 0, num_prefix:] = ids_restore_BL >= num_keep
    return dx, (weights @ grad).sum(dim=(0, 1))


def normalize_patches(patches_BMP: Tensor) -> Tensor:
    """Subtract each patch's mean and divide by its deviation, sqrt(unbiased variance + 1e-6), as published.

    Layer normalisation divides by sqrt(biased variance + eps); the factor (P - 1) / P turns one into the other.
    """
    size = patches_BMP.shape[-1]
    factor = (size - 1) / size
    weight = patches_BMP.new_full((size,), math.sqrt(factor))
    return torch.nn.functional.layer_norm(patches_BMP, (size,), weight, eps=VARIANCE_EPS * factor)


def gradient_exponent(num_values: int) -> int:
    """Return k such that the gradient of the mean over num_values, times 2**k, is of the order of the error itself.

    The forward pass stores the gradient with this factor, so that float16 does not flush it to zero; the backward pass
    takes it out. A power of two costs no rounding.
    """
    return math.frexp(num_values)[1] - 1


def masked_loss(
    pred_BMP: Tensor,
    images_BHWC: Tensor,
    ids_mask_BM: Tensor,
    patch_size: int,
    mean_C: Sequence[float],
    std_C: Sequence[float],
    norm_pix: bool,
    power: int,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Mean of |pred - target| ** power over the masked patches, and its gradient: see masked_loss.masked_mse.

    Returns:
        The loss, 0-d of the compute dtype; and `2**gradient_exponent * dloss/dpred`, `[B, M, P]` of pred's dtype (empty
        unless with_grad).
    """
    dtype = compute_dtype(pred_BMP.dtype)
    target = gather_patches(images_BHWC, ids_mask_BM, patch_size, mean_C, std_C, dtype)
    if norm_pix:
        target = normalize_patches(target)
    error = torch.sub(pred_BMP, target, out=target)
    # Patch sums first, then their mean: long flat sums in float32 lose digits.
    with torch.autocast(error.device.type, enabled=False):  # it would make this product a bf16 one
        sums_BM = torch.linalg.vecdot(error, error) if power == 2 else error.abs().sum(-1)
    loss = sums_BM.mean() / error.shape[-1]
    if not with_grad:
        return loss, pred_BMP.new_empty(0)
    slope = error if power == 2 else error.sign_()
    grad = slope.mul_(power * 2.0 ** gradient_exponent(error.numel()) / error.numel())
    return loss, grad.to(pred_BMP.dtype)


def masked_loss_backward(grad_loss: Tensor, scaled_grad_BMP: Tensor) -> Tensor:
    """Turn what the forward pass stored into the gradient of pred: `[B, M, P]`."""
    factor = grad_loss * 2.0 ** -gradient_exponent(scaled_grad_BMP.numel())
    return (scaled_grad_BMP.to(factor.dtype) * factor).to(scaled_grad_BMP.dtype)


def add_norm(
    x_ND: Tensor, delta_ND: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x + delta, its LayerNorm in delta's dtype, and mean and 1 / deviation of its rows: see add_norm.py."""
    dtype = compute_dtype(x_ND.dtype)
    total = (x_ND.to(dtype) + delta_ND.to(dtype)).to(x_ND.dtype)
    norm, mean, rstd = torch.native_layer_norm(
        total.to(dtype), (x_ND.shape[1],), weight_D.to(dtype), bias_D.to(dtype), eps
    )
    return total, norm.to(delta_ND.dtype), mean.flatten(), rstd.flatten()


def add_norm_backward(
    grad_sum_ND: Tensor, grad_norm_ND: Tensor, total_ND: Tensor, weight_D: Tensor, mean_N: Tensor, rstd_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of both addends, and those of weight and bias in the compute dtype."""
    dtype, rows = mean_N.dtype, (mean_N[:, None], rstd_N[:, None])
    weight_D = weight_D.to(dtype)
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        grad_norm_ND.to(dtype), total_ND.to(dtype), (len(weight_D),), *rows, weight_D, weight_D, [True, True, True]
    )
    return dx.add_(grad_sum_ND).to(total_ND.dtype), dweight, dbias


def short_attention(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """Return softmax attention `[B, N, H, d]` of qkv `[B, N, 3, H, d]`, and log(sum(exp(scores))) `[B, H, N]`."""
    q, k, v = qkv.to(compute_dtype(qkv.dtype)).permute(2, 0, 3, 1, 4)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return (scores.softmax(-1) @ v).transpose(1, 2).contiguous().to(qkv.dtype), scores.logsumexp(-1)


def short_attention_backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """Return the gradient of qkv: `[B, N, 3, H, d]`."""
    dtype, scale = lse.dtype, qkv.shape[-1] ** -0.5
    q, k, v = qkv.to(dtype).permute(2, 0, 3, 1, 4)
    dout, out = grad.to(dtype).transpose(1, 2), out.to(dtype).transpose(1, 2)
    weights = (q @ k.mT * scale - lse[..., None]).exp()
    dscores = weights * (dout @ v.mT - (dout * out).sum(-1, keepdim=True)) * scale
    return (
        torch.stack((dscores @ k, dscores.mT @ q, weights.mT @ dout)).permute(1, 3, 0, 2, 4).contiguous().to(qkv.dtype)
    )
