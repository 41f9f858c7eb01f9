"""sample bytes, windows -> [decode_cpu] -> images: TurboJPEG and torch's resize in a thread pool.

The reference for every other decoder, and the default without a GPU. JPEGs go through TurboJPEG; all else, and JPEGs
that it does not take, through Pillow. One result is documented for all of them (docs/loader.md): EXIF orientation is
applied, CMYK and YCCK become RGB by Pillow's rule, alpha is dropped, 16-bit values are scaled to 8 bits by rounding v /
257, and the window is resized with an antialiased bicubic (or bilinear) filter in 8 bits, as Pillow does.
"""

import io
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from patchmill.pipeline.feed import Feeder, StepPlan
from patchmill.pipeline.pool import Pool
from patchmill.pipeline.shards import JPEG_START
from patchmill.pipeline.tiff import read_tiff

MAX_PIXELS = 178_956_970  # of one image: Pillow's own guard against decompression bombs
CHUNK = 8  # samples of one task: large enough that handing it out costs nothing, small enough to share evenly
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # Pillow's name for each channel count
FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "GIF", "PPM", "WEBP", "AVIF")
PILLOW_ERRORS = (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, EOFError, ValueError)
TIFF_STARTS = (b"II*\0", b"MM\0*")
EXIF_MARK = b"Exif\0\0"
INTERPOLATIONS = {
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa.out,
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa.out,
}

ImageHWC = NDArray[np.uint8]


class CpuDecoder:
    """Decodes batches in a thread pool, several batches ahead.

    Args:
        feeder: plans batches and gives their bytes.
        image_size: height and width of the result.
        channels: 1 to 4 from images; up to 8 from TIFFs that hold as many.
        interpolation: "bicubic" or "bilinear"; both antialiased.
        workers: threads that read and decode.
        batches_ahead: batches in work at once.
        pin_memory: whether the result lies in page-locked memory, for the copy to a GPU.
    """

    def __init__(
        self,
        feeder: Feeder,
        *,
        image_size: tuple[int, int],
        channels: int,
        interpolation: str,
        workers: int,
        batches_ahead: int,
        pin_memory: bool,
    ) -> None:
        self.feeder = feeder
        self.shape = (feeder.local_batch, *image_size, channels)
        self.resize = INTERPOLATIONS[interpolation]
        self.workers = workers
        self.batches_ahead = batches_ahead
        self.pin_memory = pin_memory

    def batches(self, epoch: int, step: int) -> Iterator[tuple[StepPlan, Tensor]]:
        """Yields plans and their images (uint8 `[B, H, W, C]`) from a step on, for ever."""
        ahead: deque[tuple[StepPlan, Tensor, list[Future]]] = deque()
        with Pool(self.workers, "patchmill-decode") as pool:
            for plan in self.feeder.plans(epoch, step):
                images = torch.empty(self.shape, dtype=torch.uint8, pin_memory=self.pin_memory)
                chunks = range(0, self.feeder.local_slots, CHUNK)
                ahead.append((plan, images, [pool.submit(self._decode, plan, images, lo) for lo in chunks]))
                if len(ahead) > self.batches_ahead:
                    yield self._finish(*ahead.popleft())

    def _finish(self, plan: StepPlan, images: Tensor, tasks: list[Future]) -> tuple[StepPlan, Tensor]:
        for task in tasks:
            task.result()
        return plan, images

    def _decode(self, plan: StepPlan, images_BHWC: Tensor, lo: int) -> None:
        """Reads, decodes, crops and resizes slots `lo` to `lo + CHUNK` of a batch into their rows."""
        channels, repeats = self.shape[3], self.feeder.repeats
        hi = min(lo + CHUNK, self.feeder.local_slots)
        for slot, data in enumerate(self.feeder.fetch(plan, lo, hi), start=lo):
            image = self.feeder.decoded(plan, slot, data, lambda data, size: decode_image(data, channels, size))
            for row in range(slot * repeats, (slot + 1) * repeats):
                self._resize(image, plan.windows_B4[row].tolist(), bool(plan.flips_B[row]), images_BHWC[row])

    def _resize(self, image: ImageHWC, window: list[int], flip: bool, out_HWC: Tensor) -> None:
        top, left, height, width = window
        crop = torch.from_numpy(image)[top : top + height, left : left + width]
        # Permuted from NHWC with a batch axis, both sides look channels-last to torch: its fast path, without a copy.
        self.resize(
            crop[None].permute(0, 3, 1, 2),
            list(self.shape[1:3]),
            False,
            None,
            None,
            out=out_HWC[None].permute(0, 3, 1, 2),
        )
        if flip:
            out_HWC.copy_(out_HWC.flip(1))


def decode_image(data: bytes, channels: int, size_hw: tuple[int, int] | None = None) -> ImageHWC:
    """Decodes an image in displayed orientation.

    Args:
        data: an encoded file.
        channels: of the result. 1 to 4 are grey, grey and alpha, RGB, RGBA, whatever the file holds; more (and 2) only
            from a TIFF of that many channels.
        size_hw: the size that it must have.

    Returns:
        uint8 `[height, width, channels]`, writable.

    Raises:
        ValueError: the bytes are no image, are damaged, claim more than MAX_PIXELS, or hold another size or channels.
    """
    image = None
    if data[:3] == JPEG_START and channels in (1, 3):
        image = _decode_jpeg(data, "RGB" if channels == 3 else "GRAY")
    elif data[:4] in TIFF_STARTS:
        image = _decode_tiff(data, channels)
    if image is None:
        image = _decode_with_pillow(data, channels)
    if size_hw is not None and image.shape[:2] != size_hw:
        raise ValueError(f"is {image.shape[:2]} pixels where the sample table means {size_hw}")
    return image


def _decode_jpeg(data: bytes, colourspace: str) -> ImageHWC | None:
    """Decodes an ordinary JPEG, strictly; None for those that are Pillow's: CMYK, YCCK and unknown kinds."""
    try:
        height, width, source, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if source in ("CMYK", "YCCK"):
        return None
    if height * width > MAX_PIXELS:
        raise ValueError(f"claims {width} x {height} pixels, more than {MAX_PIXELS}")
    image = simplejpeg.decode_jpeg(data, colourspace)
    return _orient(image, data) if EXIF_MARK in data[:65536] else image


def _orient(image: ImageHWC, data: bytes) -> ImageHWC:
    """Turns and mirrors an image as its EXIF orientation says (Exif 2.32, section 4.6.4)."""
    orientation = Image.open(io.BytesIO(data)).getexif().get(ExifTags.Base.Orientation, 1)
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


def _decode_tiff(data: bytes, channels: int) -> ImageHWC | None:
    """A TIFF as the packer writes it; None for others, which are Pillow's."""
    try:
        image = read_tiff(data)
    except ValueError:
        return None
    if image.shape[2] == channels:
        return image.copy()
    if image.shape[2] not in (1, 3, 4):
        raise ValueError(f"has {image.shape[2]} channels where the model takes {channels}")
    return _convert(Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image), channels)


def _decode_with_pillow(data: bytes, channels: int) -> ImageHWC:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.height * image.width > MAX_PIXELS:
                raise ValueError(f"claims {image.width} x {image.height} pixels, more than {MAX_PIXELS}")
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16 bits: to 8 as round(v / 257); Pillow's own conversion clips at 255
                wide = np.asarray(upright).astype(np.uint32)
                upright = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
            return _convert(upright, channels)
    except PILLOW_ERRORS as error:
        raise ValueError(f"cannot be decoded: {error}") from None


def _convert(image: Image.Image, channels: int) -> ImageHWC:
    if channels not in MODES:
        raise ValueError(f"has {len(image.getbands())} channels where the model takes {channels}")
    return np.array(image.convert(MODES[channels])).reshape(image.height, image.width, channels)
