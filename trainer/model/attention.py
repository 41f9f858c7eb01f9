"""Computes softmax attention, and chooses the kernel that does.

Shapes: B images, H heads, Q queries, N keys and values, d width of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from patchmill.pipeline.config import MaskConfig
from patchmill.trainer.config.model import ModelConfig

FLASH_MAX_HEAD_DIM = 256
forced: SDPBackend | None = None
"""the one backend to use on a GPU, whatever the shape; benchmarks set it"""


def attention(q_BHQd: Tensor, k_BHNd: Tensor, v_BHNd: Tensor) -> Tensor:
    """Computes softmax attention, in the form that measured fastest on the device (docs/decisions.md).

    On a GPU, PyTorch's fused kernels win. On a CPU, their backward pass is slow at ViT lengths and plain batched
    products are faster.

    Args:
        q_BHQd: queries, floating point.
        k_BHNd, v_BHNd: keys and values, in the same dtype.
    Returns:
        [B, H, Q, d] in the dtype of v.
    """
    if q_BHQd.is_cuda:
        return fused_attention(q_BHQd, k_BHNd, v_BHNd)
    weights_BHQN = (q_BHQd * q_BHQd.shape[-1] ** -0.5) @ k_BHNd.transpose(-2, -1)
    return weights_BHQN.softmax(-1).to(v_BHNd.dtype) @ v_BHNd


def fused_attention(q_BHQd: Tensor, k_BHNd: Tensor, v_BHNd: Tensor) -> Tensor:
    """Computes softmax attention by PyTorch's fused kernels, with the backends of `allowed_backends`."""
    # torch.compile makes the choice part of the graph; in eager mode the host spends about 45 microseconds on it
    with sdpa_kernel(allowed_backends(q_BHQd.dtype, k_BHNd.shape[-2], q_BHQd.shape[-1])):
        return F.scaled_dot_product_attention(q_BHQd, k_BHNd, v_BHNd)


def allowed_backends(dtype: torch.dtype, tokens: int, head_dim: int) -> list[SDPBackend]:
    """Returns the backends for attention of this shape, in PyTorch's order: a GPU takes the first that it supports.

    Never cuDNN, which PyTorch itself prefers on Hopper: its bf16 backward pass is known to give NaN at lengths that its
    tile does not divide, as 50, 65, 197 and 257. The rule does not depend on `tokens` until a GPU has measured the
    backends at our lengths (docs/performance.md).
    """
    del tokens
    if forced is not None:
        return [forced]
    if dtype == torch.float64:
        return [SDPBackend.MATH]
    if dtype == torch.float32 or head_dim > FLASH_MAX_HEAD_DIM:
        return [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attention_backend(device: torch.device, dtype: torch.dtype, tokens: int, head_dim: int) -> str:
    """Returns what computes attention of this shape here: a backend's name, or `products` on a CPU."""
    if device.type != "cuda":
        return "products"
    q = torch.empty(1, 1, tokens, head_dim, dtype=dtype, device=device, requires_grad=True)
    with sdpa_kernel(allowed_backends(dtype, tokens, head_dim)):
        return SDPBackend(torch._fused_sdp_choice(q, q, q)).name.lower()


def describe_backends(config: ModelConfig, mask: MaskConfig, device: torch.device, dtype: torch.dtype) -> str:
    """Returns what computes the attention of encoder and decoder in pretraining, with its tokens and head width."""
    kept = config.num_patches if config.sees_mask_tokens else mask.kept(config.grid_hw)
    parts = [("encoder", 1 + kept, config.embed_dim // config.num_heads)]
    if config.kind != "simmim":
        tokens = 1 + (kept if config.kind == "crossmae" else config.num_patches)
        parts.append(("decoder", tokens, config.decoder_embed_dim // config.decoder_num_heads))
    return ", ".join(
        f"{name} {attention_backend(device, dtype, tokens, head_dim)} ({tokens} x {head_dim})"
        for name, tokens, head_dim in parts
    )
