"""Cuts small real JPEGs, with a seed, from the photographs in scikit-image's wheel (nothing is downloaded)."""

from functools import cache
from pathlib import Path

import numpy as np
import simplejpeg
import skimage
from PIL import Image

from patchmill.tools.packing.listing import list_folder
from patchmill.tools.packing.pack_dataset import pack_dataset
from patchmill.tools.packing.plan import PackOptions

COLOUR = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "retina.jpg", "motorcycle_left.png")
GREY = ("camera.png", "coins.png")


@cache
def photograph(name: str) -> np.ndarray:
    """A whole photograph, uint8 [H, W, 3] or [H, W]."""
    with Image.open(Path(skimage.__file__).parent / "data" / name) as image:
        return np.asarray(image.convert("L" if name in GREY else "RGB"))


def photo_crop(rng: np.random.Generator, name: str, sides: tuple[int, int] = (96, 200)) -> np.ndarray:
    """A random window, each side between `sides` pixels: uint8 [h, w, 3] or [h, w]."""
    photo = photograph(name)
    height, width = (min(int(rng.integers(*sides, endpoint=True)), side) for side in photo.shape[:2])
    top, left = (int(rng.integers(0, photo.shape[i] - size + 1)) for i, size in enumerate((height, width)))
    return np.ascontiguousarray(photo[top : top + height, left : left + width])


def jpeg(pixels: np.ndarray, quality: int = 90, subsampling: str = "420") -> bytes:
    """Encodes grey or RGB pixels as a baseline JPEG."""
    pixels = np.ascontiguousarray(pixels)
    if pixels.ndim == 2:
        return simplejpeg.encode_jpeg(pixels[:, :, None], quality, "GRAY", "Gray")
    return simplejpeg.encode_jpeg(pixels, quality, "RGB", subsampling)


def make_photo_crops(
    count: int, seed: int = 0, sides: tuple[int, int] = (96, 200), names: tuple[str, ...] = COLOUR
) -> list[tuple[str, bytes]]:
    """`count` (photograph's name without extension, JPEG bytes) pairs, the photographs taking turns."""
    rng = np.random.default_rng(seed)
    chosen = [names[i % len(names)] for i in range(count)]
    return [(name.split(".")[0], jpeg(photo_crop(rng, name, sides))) for name in chosen]


def make_image_folder(
    root: Path, count: int = 24, seed: int = 0, sides: tuple[int, int] = (96, 200), names: tuple[str, ...] = COLOUR
) -> Path:
    """Writes root/<photograph>/<number>.jpg, an ImageFolder tree of `count` JPEGs; returns root."""
    for i, (label, data) in enumerate(make_photo_crops(count, seed, sides, names)):
        (root / label).mkdir(parents=True, exist_ok=True)
        (root / label / f"{i:05d}.jpg").write_bytes(data)
    return root


def make_dataset(
    root: Path,
    count: int = 24,
    seed: int = 0,
    sides: tuple[int, int] = (96, 200),
    names: tuple[str, ...] = COLOUR,
    shard_size_mb: float = 0.05,
) -> Path:
    """Packs such a tree (root/images) into shards of about ten images each; returns the dataset, root/dataset."""
    images = make_image_folder(root / "images", count, seed, sides, names)
    pack_dataset(list_folder(images), root / "dataset", PackOptions(seed=seed, shard_size_mb=shard_size_mb))
    return root / "dataset"
