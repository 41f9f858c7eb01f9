"""Provides images worth learning from on a machine that may have no dataset."""

import importlib.util
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "retina.jpg", "motorcycle_left.png")
OCTAVES = (2, 4, 8, 16, 32, 64)


def training_images(count: int, size: int, seed: int = 0) -> tuple[Tensor, str]:
    """uint8 [count, size, size, 3] and what they are: crops of scikit-image's photographs, else drawn ones."""
    found = importlib.util.find_spec("skimage")
    if found is not None and found.origin is not None:
        folder = Path(found.origin).parent / "data"
        paths = [folder / name for name in PHOTOGRAPHS if (folder / name).is_file()]
        if paths:
            return _crops(paths, count, size, seed), f"crops of {len(paths)} photographs of scikit-image"
    return _drawn(count, size, seed), "drawn images: noise of many scales in two colours with a sharp border"


def _crops(paths: list[Path], count: int, size: int, seed: int) -> Tensor:
    from PIL import Image

    rng = np.random.default_rng(seed)
    photographs = [Image.open(path).convert("RGB") for path in paths]
    images = np.empty((count, size, size, 3), np.uint8)
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        side = int(rng.integers(96, min(photograph.size) + 1))
        left, top = (int(rng.integers(0, whole - side + 1)) for whole in photograph.size)
        crop = photograph.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
        images[number] = np.asarray(crop)[:, :: 1 if rng.random() < 0.5 else -1]
    return torch.from_numpy(images)


def _drawn(count: int, size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)

    def field(channels: int) -> Tensor:
        octaves = [torch.randn(count, channels, side, side, generator=generator) / side**0.5 for side in OCTAVES]
        return sum((F.interpolate(each, (size, size), mode="bilinear") for each in octaves), torch.zeros(()))

    colours = torch.rand(2, count, 3, 1, 1, generator=generator) * 255
    pixels = torch.where(field(1) > 0, colours[0], colours[1]) + 25 * field(3)
    return pixels.clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()
