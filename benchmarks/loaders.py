"""The loaders that bench_loader.py compares: each yields uint8 batches of random-resized crops with flip, for ever.

Peers are written as their users write them: Pillow in torch's DataLoader, Pillow behind webdataset, FFCV's own RGB
pipeline on its JPEG mode. None of them normalises, which is to their advantage. All read the same bytes.
"""

import io
import math
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from patchmill.pipeline.config import MaskConfig
from patchmill.pipeline.loader import DataConfig, build_loader

SIDE, BATCH = 224, 64
SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)


def random_resized_crop(image: Image.Image) -> torch.Tensor:
    """torchvision's RandomResizedCrop (bicubic) and horizontal flip on a Pillow image, to a uint8 tensor."""
    width, height = image.size
    for _ in range(10):
        area = width * height * random.uniform(*SCALE)
        aspect = math.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            break
    else:
        w = h = min(width, height)
        left, top = (width - w) // 2, (height - h) // 2
    crop = image.crop((left, top, left + w, top + h)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    if random.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(crop))


class ImageFiles(torch.utils.data.Dataset):
    """Image files, as torchvision's ImageFolder reads them."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(path for path in folder.rglob("*") if path.is_file())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        with self.files[index].open("rb") as file:
            return random_resized_crop(Image.open(file).convert("RGB"))


def ours(data: Path, decoder: str, workers: int) -> Iterator[torch.Tensor]:
    """This project's loader, masks included."""
    config = DataConfig(path=str(data / "shards"), decoder=decoder, workers=workers)
    with build_loader(
        config, image_size=SIDE, patch_size=16, channels=3, mask=MaskConfig(), seed=0, global_batch=BATCH
    ) as loader:
        for batch in loader:
            yield batch.images


def pillow_dataloader(data: Path, workers: int) -> Iterator[torch.Tensor]:
    """Pillow in torch's DataLoader, on files."""
    loader = torch.utils.data.DataLoader(
        ImageFiles(data / "images"), BATCH, shuffle=True, num_workers=workers, persistent_workers=True, drop_last=True
    )
    while True:
        yield from loader


def decode_and_crop(sample: tuple[bytes]) -> tuple[torch.Tensor]:
    """The JPEG of a webdataset sample to a crop."""
    return (random_resized_crop(Image.open(io.BytesIO(sample[0])).convert("RGB")),)


def webdataset_pillow(data: Path, workers: int) -> Iterator[torch.Tensor]:
    """webdataset with a shuffle buffer, Pillow in its workers."""
    import webdataset as wds

    urls = sorted(str(path) for path in (data / "shards").glob("*.tar"))
    dataset = wds.WebDataset(urls, shardshuffle=len(urls), nodesplitter=wds.split_by_node, seed=0)
    dataset = dataset.shuffle(500).to_tuple("jpg").map(decode_and_crop).batched(BATCH, partial=False)
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=True)
    while True:
        yield from (images for (images,) in loader)


def ffcv(data: Path, workers: int) -> Iterator[torch.Tensor]:
    """FFCV on JPEGs: the whole image is decoded, the crop resized with OpenCV's INTER_AREA."""
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor

    decoder = RandomResizedCropRGBImageDecoder((SIDE, SIDE), scale=SCALE, ratio=RATIO)
    loader = Loader(
        str(data / "images.beton"), batch_size=BATCH, num_workers=workers, order=OrderOption.RANDOM, os_cache=True,
        drop_last=True, pipelines={"image": [decoder, RandomHorizontalFlip(), ToTensor()], "label": None},
    )  # fmt: skip
    while True:
        for (images,) in loader:
            yield images


LOADERS = {
    "patchmill cpu": lambda data, workers: ours(data, "cpu", workers),
    "patchmill dali (cpu)": lambda data, workers: ours(data, "dali", workers),
    "Pillow + DataLoader": pillow_dataloader,
    "webdataset + Pillow": webdataset_pillow,
    "FFCV (jpg mode, INTER_AREA)": ffcv,
}
