"""Decodes, crops and resizes images with NVIDIA DALI, on the GPU or with the same graph on the CPU.

The graph: external_source, decoders.image_slice (only the window), resize, flip; the result is uint8 NHWC.

DALI keeps no random state and no order: it asks for batch i and receives bytes, windows and flips. It therefore agrees
with every other decoder and restarts anywhere. No other file imports DALI.

DALI cannot skip an image: one that it rejects costs the whole batch. Images other than plain 8-bit JPEG and PNG, on
which decoders disagree, therefore reach it decoded (as binary PPM), and a batch that still fails is decoded once more,
on the host. Channel counts other than 1 and 3 are decoded on the host too: DALI's "as stored" output is not safe (2.4.0
corrupted memory on a grey JPEG).

DALI reads the bytes where they are. If it copied them, it would do so under the interpreter's lock, for milliseconds a
batch in which no other thread of Python runs.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from patchmill.pipeline.decode.cpu import CHUNK
from patchmill.pipeline.decode.jpeg_engine import jpeg_engine_answers
from patchmill.pipeline.plan.feed import AnyFeeder, StepPlan
from patchmill.pipeline.read.image import decode_image, is_plain
from patchmill.pipeline.read.threads import Pool

HARDWARE_SHARE = 0.65  # of the images for the hardware JPEG engine, where there is one; CUDA kernels take the rest


class ThreadCounts(NamedTuple):
    """Threads that share the cores: those that read, and DALI's own."""

    readers: int
    dali: int

    @classmethod
    def of(cls, workers: int, *, readers_decode: bool, engine: bool) -> "ThreadCounts":
        """Shares out `workers`, of which there should be one for each core.

        Reading and checking takes a twentieth of the time of decoding on the host. A core in eight is left to readers
        that decode nothing, and to the training.

        Args:
            readers_decode: DALI receives pixels.
            engine: a JPEG engine takes most of the decoding from DALI's threads.
        """
        most, half = workers - workers // 8, max(1, workers // 2)
        if readers_decode:
            return cls(most, half)
        return cls(max(1, workers // 4), half if engine else most)


class DaliDecoder:
    """Decodes batches with DALI.

    Args:
        feeder: plans batches and returns their bytes.
        image_size: height and width of the result.
        channels: 1 to 4.
        interpolation: "bicubic" or "bilinear"; both antialiased.
        workers: threads that read and decode what the GPU does not, together about as many.
        batches_ahead: batches in work at the same time.
        device: a CUDA device or the CPU.
    """

    def __init__(
        self,
        feeder: AnyFeeder,
        *,
        image_size: tuple[int, int],
        channels: int,
        interpolation: str,
        workers: int,
        batches_ahead: int,
        device: torch.device,
    ) -> None:
        self.feeder = feeder
        self.image_size = image_size
        self.channels = channels
        self.interpolation = interpolation
        self.workers = workers
        self.batches_ahead = batches_ahead
        self.device = device
        self.hardware_share = HARDWARE_SHARE
        self.threads = ThreadCounts.of(
            workers, readers_decode=_readers_decode(channels), engine=device.type == "cuda" and jpeg_engine_answers()
        )

    def batches(self, epoch: int, step: int) -> Iterator[tuple[StepPlan, Tensor]]:
        """Yields plans and their images (uint8 `[B, H, W, C]`, on the current stream) from a step on."""
        on_host: tuple[int, int] | None = None
        while True:
            with Pool(self.threads.readers, "patchmill-read") as pool:
                source = _Source(self.feeder, pool, epoch, step, self.channels, on_host)
                pipeline = self._build(source)
                while True:
                    try:
                        with self.feeder.observer.span("decode", self.feeder.local_batch):
                            outputs = pipeline.run(self._stream())
                    except RuntimeError:  # DALI rejects an image: decode this batch again, on the host
                        if not source.fed or on_host == source.fed[0].plan.place:
                            raise
                        epoch, step = on_host = source.fed[0].plan.place
                        break
                    yield source.take(self._taken()), self._joined(outputs)

    def _stream(self) -> Any:
        return torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None

    def _taken(self) -> torch.cuda.Event | None:
        """Marks on a GPU that all work on the batch just taken is done: `run` returns before that."""
        return torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None

    def _joined(self, outputs: tuple) -> Tensor:
        """Joins the images of all repeats, with the repeats of a sample next to each other."""
        if len(outputs) == 1:
            return from_dlpack(outputs[0].as_tensor())
        return torch.stack([from_dlpack(output.as_tensor()) for output in outputs], dim=1).flatten(0, 1)

    def _build(self, source: "_Source") -> Any:
        dali, fn, types = (_import(name) for name in ("nvidia.dali", "nvidia.dali.fn", "nvidia.dali.types"))
        on_gpu = self.device.type == "cuda"
        interpolation = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_TRIANGULAR}[self.interpolation]
        kind = {"device": "mixed", "hw_decoder_load": self.hardware_share} if on_gpu else {"device": "cpu"}
        feeding = {"batch": True, "no_copy": True}
        kind["output_type"] = types.GRAY if self.channels == 1 else types.RGB

        def finish(images: Any, flips: Any) -> Any:
            if on_gpu:
                images = images.gpu()
            images = fn.resize(images, size=self.image_size, interp_type=interpolation, antialias=True)
            return fn.flip(images, horizontal=flips)

        @dali.pipeline_def(
            batch_size=source.batch_size,
            num_threads=self.threads.dali,
            device_id=(self.device.index or 0) if on_gpu else None,
            prefetch_queue_depth=self.batches_ahead,
        )
        def graph() -> Any:
            if source.decodes:
                images, flips = fn.external_source(source, num_outputs=2, layout=["HWC", ""], **feeding)
                return finish(images, flips)
            encoded, *draws = fn.external_source(source, num_outputs=1 + 3 * self.feeder.repeats, **feeding)
            if self.feeder.repeats == 1:
                start, shape, flips = draws
                window = fn.decoders.image_slice(encoded, start=start, shape=shape, axis_names="HW", **kind)
                return finish(window, flips)
            whole = fn.decoders.image(encoded, **kind)
            return tuple(
                finish(fn.slice(whole, start=draws[i], shape=draws[i + 1], axis_names="HW"), draws[i + 2])
                for i in range(0, len(draws), 3)
            )

        pipeline = graph()
        pipeline.build()
        return pipeline


class _Reading(NamedTuple):
    """A batch whose samples are being read."""

    plan: StepPlan
    tasks: list[Future]


class _Fed(NamedTuple):
    """A batch that DALI reads where it is: `arrays` must not be freed before."""

    plan: StepPlan
    arrays: list


class _Source:
    """Feeds DALI's external_source, which calls it with 0, 1, 2, ...; reads one batch ahead.

    The pipeline holds this object and ends its threads before it lets go: what `fed` holds outlives every reader.

    Attributes:
        fed: batches that DALI has and has not returned, in order.
    """

    def __init__(
        self,
        feeder: AnyFeeder,
        pool: Pool,
        epoch: int,
        step: int,
        channels: int,
        on_host: tuple[int, int] | None,
    ) -> None:
        self.feeder, self.pool, self.channels, self.on_host = feeder, pool, channels, on_host
        self.plans = feeder.plans(epoch, step)
        self.decodes = _readers_decode(channels)
        self.tensor = _import("nvidia.dali.tensors").TensorCPU
        self.batch_size = feeder.local_batch if self.decodes else feeder.local_slots
        self.reading: deque[_Reading] = deque()
        self.fed: deque[_Fed] = deque()
        self.finishing: deque[tuple[torch.cuda.Event, _Fed]] = deque()

    def __call__(self, iteration: int) -> list:
        while len(self.reading) < 2:
            plan, chunks = next(self.plans), range(0, self.feeder.local_slots, CHUNK)
            self.reading.append(_Reading(plan, [self.pool.submit(self._fetch, plan, lo) for lo in chunks]))
        plan, tasks = self.reading.popleft()
        arrays = [[sample for task in tasks for sample in task.result()], *self._draws(plan)]
        self.fed.append(_Fed(plan, arrays))
        return arrays

    def take(self, taken: torch.cuda.Event | None) -> StepPlan:
        """Returns the plan of the batch that DALI has returned; frees its samples, on a GPU after the event `taken`."""
        batch = self.fed.popleft()
        if taken is not None:
            self.finishing.append((taken, batch))
            while self.finishing and self.finishing[0][0].query():
                self.finishing.popleft()
        return batch.plan

    def _draws(self, plan: StepPlan) -> list[NDArray]:
        """DALI's other inputs: flips, and with windows left to cut start, shape and flips of each repeat."""
        if self.decodes:
            return [plan.flips_B.astype(np.int32)]
        repeats = self.feeder.repeats
        draws = []
        for k in range(repeats):
            windows_U4 = plan.windows_B4[k::repeats]
            draws += [windows_U4[:, :2], windows_U4[:, 2:], plan.flips_B[k::repeats].astype(np.int32)]
        return [np.ascontiguousarray(draw) for draw in draws]

    def _fetch(self, plan: StepPlan, lo: int) -> list:
        """DALI's input for slots `lo` to `lo + CHUNK`: encoded bytes, or decoded windows when the host decodes.

        Bytes are wrapped as DALI's tensors here: wrapping takes 8 microseconds a sample on the one thread that feeds.
        """
        everything = plan.place == self.on_host

        def convert(data: bytes, size_hw: tuple[int, int]) -> Any:
            if self.decodes:
                return decode_image(data, self.channels, size_hw)
            if is_plain(data, size_hw) and not everything:
                return data
            return as_ppm(decode_image(data, self.channels, size_hw))

        samples = []
        for slot, data in enumerate(self.feeder.fetch(plan, lo, min(lo + CHUNK, self.feeder.local_slots)), start=lo):
            sample = self.feeder.decoded(plan, slot, data, convert)
            if not self.decodes:
                samples.append(self.tensor(np.frombuffer(sample, np.uint8), ""))
                continue
            rows = slice(slot * self.feeder.repeats, (slot + 1) * self.feeder.repeats)
            for top, left, height, width in plan.windows_B4[rows].tolist():
                samples.append(np.ascontiguousarray(sample[top : top + height, left : left + width]))
        return samples


def _import(name: str) -> ModuleType:
    """Imports a module of DALI."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ValueError(
            f"data.decoder=dali needs NVIDIA DALI ({error}): pip install 'patchmill[dali]', or use data.decoder=cpu"
        ) from None


def _readers_decode(channels: int) -> bool:
    """Whether reader threads decode: DALI's decoders give 1 or 3 channels."""
    return channels not in (1, 3)


def as_ppm(image_HWC: NDArray[np.uint8]) -> bytes:
    """Writes pixels of 1 or 3 channels as a binary PGM or PPM file: a copy to write, nothing to decode."""
    height, width, channels = image_HWC.shape
    return b"P%d\n%d %d\n255\n" % (5 if channels == 1 else 6, width, height) + image_HWC.tobytes()
