"""Turns patches into tokens with the encoder of DALL-E's discrete VAE, as BEiT and Table 1d of MAE do.

Shapes and names are those of the published encoder (openai/DALL-E): a 7 x 7 convolution, four groups of two residual
blocks of width 256 to 2048 with three poolings between them, and 8192 logits for each 8 x 8 pixels. Its tensors load
under their own names from a safetensors file; the published file is a pickle, which this code never opens. The
architecture is tested with random weights. It has not yet run with the published ones.

The training crop is shrunk to 8 pixels per patch (112 px for 14 x 14 patches of 16, as in BEiT) by an antialiased
bicubic filter; BEiT resizes the original crop with Lanczos. All is in fp32; the published code uses fp16 on a GPU.

Shapes: B images, H W C pixels, M patches, V vocabulary, N channels of a feature map, h w its size.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchmill.trainer.config.model import DVAE_VOCABULARY, ModelConfig

WIDTH, BLOCKS_PER_GROUP, GROUPS = 256, 2, 4
PIXELS_PER_TOKEN = 8
LOGIT_LAPLACE_EPS = 0.1
"""pixels are mapped to [0.1, 0.9], as published"""


class Convolution(nn.Module):
    """A convolution that keeps the size. Its tensors are buffers, named `w` and `b` as published, and never trained."""

    w: Tensor
    b: Tensor

    def __init__(self, n_in: int, n_out: int, side: int) -> None:
        super().__init__()
        self.register_buffer("w", torch.zeros(n_out, n_in, side, side))
        self.register_buffer("b", torch.zeros(n_out))

    def forward(self, x_BNhw: Tensor) -> Tensor:
        """[B, n_in, h, w] -> [B, n_out, h, w]."""
        return F.conv2d(x_BNhw, self.w, self.b, padding=self.w.shape[-1] // 2)


class ResidualBlock(nn.Module):
    """id_path(x) + gain * res_path(x); res_path is four pairs of ReLU and convolution (3, 3, 3 and 1 pixels wide)."""

    def __init__(self, n_in: int, n_out: int, gain: float) -> None:
        super().__init__()
        self.gain = gain
        self.id_path = nn.Identity() if n_in == n_out else Convolution(n_in, n_out, 1)
        hidden = n_out // 4
        layers: list[tuple[str, nn.Module]] = []
        for number, (a, b, side) in enumerate(
            ((n_in, hidden, 3), (hidden, hidden, 3), (hidden, hidden, 3), (hidden, n_out, 1)), 1
        ):
            layers += [(f"relu_{number}", nn.ReLU()), (f"conv_{number}", Convolution(a, b, side))]
        self.res_path = nn.Sequential(OrderedDict(layers))

    def forward(self, x_BNhw: Tensor) -> Tensor:
        """[B, n_in, h, w] -> [B, n_out, h, w]."""
        return self.id_path(x_BNhw) + self.gain * self.res_path(x_BNhw)


class DVAETokenizer(nn.Module):
    """Gives each patch the most likely of 8192 tokens.

    Args:
        width: channels of the first group; 256 as published (tests use fewer).
    """

    def __init__(self, config: ModelConfig, width: int = WIDTH) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        gain = 1 / (GROUPS * BLOCKS_PER_GROUP) ** 2
        stages: list[tuple[str, nn.Module]] = [("input", Convolution(3, width, 7))]
        n_in = width
        for group in range(1, GROUPS + 1):
            n_out = width * 2 ** (group - 1)
            parts: list[tuple[str, nn.Module]] = []
            for block in range(1, BLOCKS_PER_GROUP + 1):
                parts.append((f"block_{block}", ResidualBlock(n_in, n_out, gain)))
                n_in = n_out
            if group < GROUPS:
                parts.append(("pool", nn.MaxPool2d(2)))
            stages.append((f"group_{group}", nn.Sequential(OrderedDict(parts))))
        output = OrderedDict([("relu", nn.ReLU()), ("conv", Convolution(n_in, DVAE_VOCABULARY, 1))])
        self.blocks = nn.Sequential(OrderedDict([*stages, ("output", nn.Sequential(output))]))

    @torch.no_grad()
    def forward(self, images_BHWC: Tensor, ids_BM: Tensor) -> Tensor:
        """uint8 images and patch ids -> int64 [B, M]."""
        height, width = (PIXELS_PER_TOKEN * (side // self.patch_size) for side in images_BHWC.shape[1:3])
        with torch.autocast(images_BHWC.device.type, enabled=False):
            x_BCHW = images_BHWC.permute(0, 3, 1, 2).float() / 255
            if x_BCHW.shape[2:] != (height, width):
                x_BCHW = F.interpolate(x_BCHW, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
            logits_BVhw = self.blocks((1 - 2 * LOGIT_LAPLACE_EPS) * x_BCHW + LOGIT_LAPLACE_EPS)
        return logits_BVhw.argmax(1).flatten(1).gather(1, ids_BM.long())
