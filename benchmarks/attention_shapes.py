"""Lists the attention shapes of a model, and the SDPA backends that torch and the model take for each.

Shapes: B images, N tokens, Q queries, H heads, d width of a head.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from patchmill.trainer.config.model import ModelConfig
from patchmill.trainer.model.attention import attention_backend

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


class Stack(NamedTuple):
    """A row of transformer blocks: tokens, and of these how many ask in the last block."""

    name: str
    tokens: int
    queries: int
    dim: int
    heads: int
    depth: int


def stacks(config: ModelConfig) -> list[Stack]:
    """Encoder and decoder at 75 %."""
    c, kept = config, config.num_patches // 4
    masked = c.num_patches - kept
    return [
        Stack("encoder", 1 + kept, 1 + kept, c.embed_dim, c.num_heads, c.depth),
        Stack("decoder", 1 + c.num_patches, masked, c.decoder_embed_dim, c.decoder_num_heads, c.decoder_depth),
    ]


class AttentionShape(NamedTuple):
    """One attention of a step: Q queries of N tokens, H heads of width d."""

    name: str
    Q: int
    N: int
    H: int
    d: int


def attention_shapes(config: ModelConfig) -> list[AttentionShape]:
    """Those of the encoder, the decoder, and the decoder's last block, where masked tokens alone ask."""
    encoder, decoder = stacks(config)
    cases = (("encoder", encoder, encoder.tokens), ("decoder", decoder, decoder.tokens))
    last = ("last decoder block", decoder, decoder.queries)
    return [
        AttentionShape(name, queries, stack.tokens, stack.heads, stack.dim // stack.heads)
        for name, stack, queries in (*cases, last)
    ]


def random_qkv(shape: AttentionShape, batch: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Leaves q, k and v as the model makes them: views of one [B, N, 3, H, d] product."""
    made = torch.randn(batch, shape.N, 3, shape.H, shape.d, device=device).to(dtype)
    q, k, v = made.permute(2, 0, 3, 1, 4).unbind(0)
    q, k, v = (each.detach().requires_grad_() for each in (q[:, :, : shape.Q], k, v))
    return q, k, v


def torch_choice(shape: AttentionShape, batch: int, device: str, dtype: torch.dtype) -> str:
    """The backend that torch takes where nobody says which, as in the published model."""
    return SDPBackend(torch._fused_sdp_choice(*random_qkv(shape, batch, device, dtype))).name.lower()


def attention_facts(config: ModelConfig, batch: int, device: str, dtype: torch.dtype) -> dict[str, str]:
    """For the head of a page: torch's choice and the model's by shape, the backends enabled, and cuDNN's version."""
    shapes = attention_shapes(config)
    torchs = [torch_choice(shape, batch, device, dtype) for shape in shapes]
    ours = [attention_backend(torch.device(device), dtype, shape.N, shape.d) for shape in shapes]
    cuda = torch.backends.cuda
    enabled = {
        "flash": cuda.flash_sdp_enabled(),
        "cudnn": cuda.cudnn_sdp_enabled(),
        "efficient": cuda.mem_efficient_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
    }
    version = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    names = ", ".join(name for name, on in enabled.items() if on)
    return {
        "SDPA, torch's choice": _by_shape(shapes, torchs),
        "SDPA, the model's choice": _by_shape(shapes, ours),
        "SDPA, enabled": f"{names}; cuDNN {version}",
    }


def _by_shape(shapes: list[AttentionShape], choices: list[str]) -> str:
    return "; ".join(
        f"{shape.name} ({shape.Q} of {shape.N} tokens, {shape.H} x {shape.d}) {choice}"
        for shape, choice in zip(shapes, choices, strict=True)
    )
