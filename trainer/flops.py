"""Counts the FLOPs of training, and knows the peak of GPUs, for MFU."""

import torch

from patchmill.pipeline.config import MaskConfig
from patchmill.trainer.config.model import ModelConfig

PEAK_BF16_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}
"""dense bf16 FLOP/s, by a part of the device's name (data sheets)"""


def train_flops_per_image(config: ModelConfig, mask: MaskConfig) -> float:
    """Counts matrix-product FLOPs of forward and backward for one image (2 per multiply-add).

    It counts the published formulation, which embeds and predicts all patches, whatever a fast path skips: 58.5, 124.2
    and 291 GFLOPs for ViT-B/16, L/16 and H/14 at 224 px and 75 %. MFU is based on these. A target's tokenizer does not
    count.
    """
    c, patches = config, config.num_patches
    kept = patches if c.sees_mask_tokens else mask.kept(c.grid_hw)

    def blocks(depth: int, tokens: int, dim: int) -> float:
        linear = 2 * tokens * dim * dim * (4 + 2 * c.mlp_ratio)
        return depth * (linear + 4 * tokens**2 * dim)

    embed = 2 * patches * c.patch_dim * c.embed_dim
    encoder = blocks(c.depth, kept + 1, c.embed_dim)
    if c.kind == "simmim":
        return 3.0 * (embed + encoder + 2 * patches * c.embed_dim * c.pred_dim)
    if c.kind == "crossmae":
        masked, dim = patches - kept, c.decoder_embed_dim
        asking = 2 * masked * dim * dim * (2 + 2 * c.mlp_ratio) + 4 * masked * (kept + 1) * dim
        decoder = c.decoder_depth * (asking + 2 * (kept + 1) * c.embed_dim * 2 * dim)
        return 3.0 * (embed + encoder + decoder + 2 * masked * dim * c.pred_dim)
    bridge = 2 * (kept + 1) * c.embed_dim * c.decoder_embed_dim
    decoder = blocks(c.decoder_depth, patches + 1, c.decoder_embed_dim)
    head = 2 * (patches + 1) * c.decoder_embed_dim * c.pred_dim
    return 3.0 * (embed + encoder + bridge + decoder + head)


def device_peak(device: torch.device) -> float | None:
    """Returns a device's dense bf16 peak in FLOP/s; None for a CPU or an unknown GPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16_FLOPS.items() if part in name), None)
