"""Decodes a small dataset once, keeps it on the device, and makes each batch there.

For images that all have one size and fit into the device's memory (CIFAR-10 is 154 MB). A batch is a gather and two
batched products: the antialiased filter along rows and along columns, written as matrices of its weights. Windows,
flips and replacements of bad samples are the same as with every decoder; no image is decoded twice. Later loaders of
the process that need the same images on the same device find them there.

Shapes: N samples, B rows of a batch, H W the stored size, O the size asked for, C channels.
"""

import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from patchmill.pipeline.plan.feed import AnyFeeder, Feeder, StepPlan
from patchmill.pipeline.read.image import ImageHWC, decode_image
from patchmill.pipeline.read.shards import BadSample
from patchmill.pipeline.read.threads import Pool

CHUNK = 256  # samples of one task while the dataset is read
MAX_BYTES = 32 << 30  # of decoded images
KEPT_BYTES = 4 << 30  # of decoded images that stay on the device for the next loader of this process


class Residents(NamedTuple):
    """The decoded images of a dataset."""

    images_NHCW: Tensor
    """uint8, on the device"""
    bad_N: np.ndarray
    """bool: samples that cannot be read or decoded"""


_kept: dict[tuple, Residents] = {}
"""at most one entry: dataset, channels and device, and its images"""
_lock = threading.Lock()
"""held while images are read: a second loader waits for them and does not read them too"""


class ResidentDecoder:
    """Makes batches from decoded images on the device.

    Args:
        feeder: plans batches and returns their bytes; of a packed dataset or a .beton file.
        image_size: height and width of the result.
        channels: of the result.
        interpolation: "bicubic" or "bilinear"; both antialiased.
        workers: threads that read and decode, once.
        device: keeps the images.
        path: of the dataset.

    Raises:
        ValueError: the feeder is a stream, or images have several sizes or need more than MAX_BYTES.
    """

    def __init__(
        self,
        feeder: AnyFeeder,
        *,
        image_size: tuple[int, int],
        channels: int,
        interpolation: str,
        workers: int,
        device: torch.device,
        path: str,
    ) -> None:
        if not isinstance(feeder, Feeder):
            raise ValueError("data.decoder=resident needs a packed dataset, not a stream of tars: use data.decoder=cpu")
        self.feeder, self.image_size, self.channels = feeder, image_size, channels
        self.interpolation, self.workers, self.device = interpolation, workers, device
        self.size_hw = _common_size(feeder, channels)
        # Equal datasets at two paths may differ in their damage.
        self.key = (path, feeder.store.fingerprint, channels, str(device))
        self.residents: Residents | None = None

    def batches(self, epoch: int, step: int) -> Iterator[tuple[StepPlan, Tensor]]:
        """Yields plans and their images (uint8 `[B, H, W, C]`, on the device) from a step on, without end."""
        if self.residents is None:
            self.residents = self._find_or_read()
        images_NHCW, bad_N = self.residents
        for plan in self.feeder.plans(epoch, step):
            self._replace_bad(plan, bad_N)
            with self.feeder.observer.span("decode", len(plan.sample_ids_B)):
                images = self._cut(images_NHCW, plan)
            yield plan, images

    def _find_or_read(self) -> Residents:
        with _lock:
            if self.key in _kept:
                return _kept[self.key]
            _kept.clear()  # first: the device may not have room for both
            residents = self._read_all()
            if residents.images_NHCW.nbytes <= KEPT_BYTES:
                _kept[self.key] = residents
            return residents

    def _read_all(self) -> Residents:
        height, width = self.size_hw
        images_NHWC = torch.empty(self.feeder.num_samples, height, width, self.channels, dtype=torch.uint8)
        bad_N = np.zeros(len(images_NHWC), dtype=np.bool_)
        with Pool(self.workers, "patchmill-decode") as pool:
            starts = range(0, len(images_NHWC), CHUNK)
            for task in [pool.submit(self._read, images_NHWC.numpy(), bad_N, lo) for lo in starts]:
                task.result()
        images_NHCW = images_NHWC.permute(0, 1, 3, 2).to(self.device).contiguous()
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # another loader uses another stream
        return Residents(images_NHCW, bad_N)

    def _read(self, images_NHWC: np.ndarray, bad_N: np.ndarray, lo: int) -> None:
        ids = np.arange(lo, min(lo + CHUNK, len(images_NHWC)))
        for index, data in zip(ids.tolist(), self.feeder.store.read(ids), strict=True):
            try:
                if not isinstance(data, BadSample):
                    images_NHWC[index] = self._decode(data, self.size_hw)
                    continue
            except ValueError:
                pass  # recorded, with its reason, when the order reaches it
            images_NHWC[index], bad_N[index] = 0, True

    def _decode(self, data: bytes, size_hw: tuple[int, int]) -> ImageHWC:
        return decode_image(data, self.channels, size_hw)

    def _replace_bad(self, plan: StepPlan, bad_N: np.ndarray) -> None:
        """Has the feeder replace each bad sample, as for every decoder."""
        for slot in np.flatnonzero(bad_N[plan.sample_ids_B[:: self.feeder.repeats]]).tolist():
            (data,) = self.feeder.fetch(plan, slot, slot + 1)
            self.feeder.decoded(plan, slot, data, self._decode)

    def _cut(self, images_NHCW: Tensor, plan: StepPlan) -> Tensor:
        """The windows of a batch, resized and flipped."""
        columns = (plan.sample_ids_B, *plan.windows_B4.T, plan.flips_B)
        table = torch.from_numpy(np.stack([column.astype(np.int64) for column in columns]))
        if self.device.type == "cuda":
            table = table.pin_memory()
        ids_B, top_B, left_B, height_B, width_B, flip_B = table.to(self.device, non_blocking=True).unbind()
        x_BHCW = images_NHCW[ids_B]
        B, H, C, W = x_BHCW.shape
        out_h, out_w = self.image_size
        across_BOW = filter_weights(left_B, width_B, W, out_w, self.interpolation)
        across_BOW = torch.where(flip_B.bool()[:, None, None], across_BOW.flip(1), across_BOW)
        down_BOH = filter_weights(top_B, height_B, H, out_h, self.interpolation)
        # 8 bits between the two passes, as in Pillow and torch
        x_BHCO = (x_BHCW.float().view(B, H * C, W) @ across_BOW.mT).round_().clamp_(0, 255)
        x_BOCO = (down_BOH @ x_BHCO.view(B, H, C * out_w)).round_().clamp_(0, 255)
        return x_BOCO.to(torch.uint8).view(B, out_h, C, out_w).permute(0, 1, 3, 2).contiguous()


def filter_weights(start_B: Tensor, length_B: Tensor, size: int, out: int, interpolation: str) -> Tensor:
    """Weights that resize the `length` pixels from `start` to `out` pixels: fp32 `[B, out, size]`.

    Pillow's antialiased filters: a cubic of parameter -1/2 on [-2, 2] or a triangle on [-1, 1], widened when the image
    shrinks, cut at the window's edges and normalised.

    Example: start 1, length 2 of size 4 to 2 pixels gives the rows [0, 1, 0, 0] and [0, 0, 1, 0].
    """
    pixel_1S = torch.arange(size, device=start_B.device).float() + 0.5
    start_B1, length_B1 = start_B.float()[:, None], length_B.float()[:, None]
    scale_B1 = length_B1 / out
    centre_BO = start_B1 + (torch.arange(out, device=start_B.device).float() + 0.5) * scale_B1
    x_BOS = ((pixel_1S - centre_BO[..., None]) / scale_B1.clamp(min=1)[..., None]).abs()
    if interpolation == "bilinear":
        weight_BOS = (1 - x_BOS).clamp(min=0)
    else:
        near, far = (1.5 * x_BOS - 2.5) * x_BOS**2 + 1, ((2.5 - 0.5 * x_BOS) * x_BOS - 4) * x_BOS + 2
        weight_BOS = torch.where(x_BOS < 1, near, torch.where(x_BOS < 2, far, 0.0))
    inside_BS = (pixel_1S > start_B1) & (pixel_1S < start_B1 + length_B1)
    weight_BOS = weight_BOS * inside_BS[:, None]
    return weight_BOS / weight_BOS.sum(-1, keepdim=True)


def _common_size(feeder: Feeder, channels: int) -> tuple[int, int]:
    heights_N, widths_N, _ = feeder.store.describe(np.arange(feeder.num_samples))
    smallest, largest = ((int(bound(heights_N)), int(bound(widths_N))) for bound in (np.min, np.max))
    if smallest != largest:
        raise ValueError(
            f"data.decoder=resident needs images of one size, found {smallest[0]} x {smallest[1]} to {largest[0]} x "
            f"{largest[1]} pixels: use data.decoder=cpu, or pack them with one size"
        )
    if (total := feeder.num_samples * largest[0] * largest[1] * channels) > MAX_BYTES:
        raise ValueError(
            f"data.decoder=resident would keep {total / 2**30:.0f} GiB of images on the device: use data.decoder=cpu"
        )
    return largest
