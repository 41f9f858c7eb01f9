"""Puts a linear head on an encoder, for probing and fine-tuning.

Parameter names are those of the published `models_vit.py`: mean pooling has `fc_norm` instead of `norm`; the linear
probe's head is `head.0` (BatchNorm without affine) and `head.1`.

Shapes: B images, L patches, N = 1 + L tokens, D width, A classes.
"""

from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from patchmill.kernels.philox import STREAM_COLOUR, draw_numpy, uniform_numpy
from patchmill.trainer.config.evaluate import Pool
from patchmill.trainer.model.encoder import Encoder
from patchmill.trainer.model.vit import LAYER_NORM_EPS, EncoderBody

DROP_PATH_BLOCK = 1024
"""first Philox block of the colour stream that drop path draws from"""

Head = Literal["linear", "probe"]


class Classifier(EncoderBody):
    """An encoder, a pooling rule and a linear head, applied to whole images."""

    def __init__(self, encoder: Encoder, num_classes: int, pool: Pool, head: Head) -> None:
        super().__init__()
        c = self.config = encoder.config
        self.pool = pool
        self.cls_token = encoder.cls_token
        self.pos_embed = encoder.pos_embed
        self.patch_embed = encoder.patch_embed
        self.blocks = encoder.blocks
        if pool == "mean" and head == "linear":
            self.fc_norm = nn.LayerNorm(c.embed_dim, eps=LAYER_NORM_EPS)
        else:
            self.norm = encoder.norm
        linear = nn.Linear(c.embed_dim, num_classes)
        nn.init.trunc_normal_(linear.weight, std=2e-5 if head == "linear" else 0.01)  # both as published
        nn.init.zeros_(linear.bias)
        self.head = nn.Sequential(RankBatchNorm(c.embed_dim), linear) if head == "probe" else linear
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", encoder.mean, persistent=False)
        self.register_buffer("std", encoder.std, persistent=False)

    def forward(self, images_BCHW: Tensor, path_scales_SB: Tensor | None = None) -> Tensor:
        """Logits fp32 [B, A].

        Args:
            images_BCHW: normalised, floating.
            path_scales_SB: factor of each residual branch of each image, two branches a block; None for all ones.
        """
        return self.head(self.features(images_BCHW, path_scales_SB).float())

    def features(self, images_BCHW: Tensor, path_scales_SB: Tensor | None = None) -> Tensor:
        """The head's input: [B, D]."""
        x_BND = self.run_blocks(self.embed_images(images_BCHW), path_scales_SB)
        if hasattr(self, "fc_norm"):
            return self.fc_norm(x_BND[:, 1:].mean(1))
        x_BND = self.norm(x_BND)
        return x_BND[:, 0] if self.pool == "cls" else x_BND[:, 1:].mean(1)

    def normalise(self, images_BCHW: Tensor) -> Tensor:
        """Normalises floating images [B, C, H, W] in 0..1 units: (value - mean) / std."""
        return (images_BCHW - self.mean) / self.std

    def tune(self, blocks: float | None) -> None:
        """Lets the last `blocks` blocks learn (Figure 9), or everything when None.

        0.5 is the MLP half of the last block, 0 is no block. The last norm and the head always learn.

        Raises:
            ValueError: the encoder has fewer blocks.
        """
        depth = len(self.blocks)
        if blocks is not None and blocks > depth:
            raise ValueError(f"tuned_blocks is {blocks:g} and the encoder has {depth} blocks; leave it out to tune all")
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(blocks is None or self._is_tuned(name, blocks, depth))

    @staticmethod
    def _is_tuned(name: str, blocks: float, depth: int) -> bool:
        if name.startswith(("norm.", "fc_norm.", "head.")):
            return True
        if not name.startswith("blocks."):
            return False
        number, part = int(name.split(".")[1]), name.split(".")[2]
        return number >= depth - blocks or (blocks == 0.5 and number == depth - 1 and part in ("norm2", "mlp"))


class RankBatchNorm(nn.BatchNorm1d):
    """BatchNorm without affine, with the statistics of the whole batch over all ranks.

    No gradient passes through it, because everything before it is frozen. (The published probe uses each GPU's own
    statistics.)
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-6, affine=False)

    def forward(self, x_BD: Tensor) -> Tensor:
        """Normalises fp32 features [B, D]."""
        if not self.training or not dist.is_initialized():
            return super().forward(x_BD)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        exact_BD = x_BD.detach().double()
        sums_2D = torch.stack([exact_BD.sum(0), exact_BD.square().sum(0)])
        dist.all_reduce(sums_2D)
        count = len(x_BD) * dist.get_world_size()
        mean_D = sums_2D[0] / count
        var_D = (sums_2D[1] / count - mean_D.square()).clamp_min(0)
        momentum = self.momentum or 0.1
        self.running_mean.lerp_(mean_D.float(), momentum)
        self.running_var.lerp_((var_D * count / max(count - 1, 1)).float(), momentum)
        self.num_batches_tracked += 1
        return (x_BD - mean_D.float()) * torch.rsqrt(var_D.float() + self.eps)


def path_scales(
    seed: int, epoch: int, sample_ids_B: np.ndarray, depth: int, rate: float, tuned_blocks: float | None
) -> Tensor:
    """Drop path's factors: 0 where a branch is dropped, else 1 / (1 - its rate); fp32 [2 * depth, B].

    The rate rises linearly from 0 at the first block to `rate` at the last (Huang et al. 2016); frozen blocks are never
    dropped. The draw is a function of (seed, epoch, sample, branch).
    """
    branches = 2 * depth
    words = draw_numpy(
        seed, STREAM_COLOUR, DROP_PATH_BLOCK + np.arange(-(-branches // 4))[:, None], sample_ids_B[None], epoch
    )
    uniform_SB = uniform_numpy(words).transpose(0, 2, 1).reshape(-1, len(sample_ids_B))[:branches]
    rates_S = np.repeat(np.linspace(0.0, rate, depth), 2)
    if tuned_blocks is not None:
        rates_S[: branches - int(2 * tuned_blocks)] = 0.0
    kept_SB = uniform_SB >= rates_S[:, None]
    return torch.from_numpy((kept_SB / (1 - rates_S)[:, None]).astype(np.float32))
