"""Plans what each step trains on as a pure function of (epoch, step), and reads its bytes.

A plan holds positions, sample indices, windows and flips. Reading is separate: decoders read parts of a batch from many
threads. Bad samples are replaced here, in the same way for every decoder.

Legend: G global batch, W ranks, K repeats, B = G / W rows of a rank's batch, U = B / K slots (decoded images).
Slot u fills rows u * K to (u + 1) * K, each with its own window, flip and mask.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from patchmill.kernels.philox import STREAM_REPLACE, draw_numpy
from patchmill.pipeline.observe import NOBODY, Observer
from patchmill.pipeline.plan.draws import crop_windows, flips, framed_windows
from patchmill.pipeline.plan.order import Order, WindowOrder
from patchmill.pipeline.plan.spec import BatchSpec
from patchmill.pipeline.read.quarantine import Quarantine
from patchmill.pipeline.read.shards import BadSample

ATTEMPTS = 100  # replacements tried for one slot; under the default limit on bad samples even two are rare

Ids = NDArray[np.int64]
Decoded = TypeVar("Decoded")


class SampleStore(Protocol):
    """Encoded samples by index: ShardReader or BetonReader."""

    num_samples: int
    channels: int
    fingerprint: str

    def describe(self, sample_ids_B: Ids) -> tuple[NDArray, NDArray, NDArray]: ...

    def read(self, sample_ids_B: Ids) -> list[bytes | BadSample]: ...

    def where(self, index: int) -> str: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class CropConfig:
    """How windows and flips are drawn; see draws.py."""

    kind: str
    """random (random-resized crop), fixed (fixed size, random place) or centre"""
    rule: str
    """of random crops: torchvision or tf"""
    scale: tuple[float, float]
    """of random crops: range of the area's share"""
    ratio: tuple[float, float]
    """of random crops: range of width / height"""
    fraction: float
    """of fixed and centre crops: share of the shorter side"""
    flip: bool
    """mirror half of the images"""
    aspect: float
    """width / height of the result"""

    def windows(
        self, seed: int, epoch: int, ids_B: Ids, heights_B: NDArray, widths_B: NDArray, repeats_B: Ids
    ) -> NDArray:
        """int32 `[B, 4]`: top, left, height, width."""
        if self.kind == "random":
            return crop_windows(
                seed, epoch, ids_B, heights_B, widths_B,
                rule=self.rule, scale=self.scale, ratio=self.ratio, repeats_B=repeats_B,
            )  # fmt: skip
        return framed_windows(
            seed, epoch, ids_B, heights_B, widths_B,
            aspect=self.aspect, fraction=self.fraction, centre=self.kind == "centre", repeats_B=repeats_B,
        )  # fmt: skip

    def flips(self, seed: int, epoch: int, ids_B: Ids, repeats_B: Ids) -> NDArray[np.bool_]:
        """bool `[B]`."""
        return flips(seed, epoch, ids_B, repeats_B) if self.flip else np.zeros(len(ids_B), dtype=np.bool_)


@dataclass
class StepPlan:
    """What a step trains on. Replacing a bad sample changes its rows before the batch is delivered."""

    epoch: int
    step: int
    positions_U: Ids
    sample_ids_B: Ids
    repeats_B: Ids
    heights_B: NDArray
    widths_B: NDArray
    labels_B: NDArray
    windows_B4: NDArray[np.int32]
    flips_B: NDArray[np.bool_]
    attempts_U: Ids

    @property
    def place(self) -> tuple[int, int]:
        """(epoch, step)."""
        return self.epoch, self.step


class AnyFeeder(Protocol):
    """Plans the steps of one rank and returns their bytes: Feeder, or StreamFeeder for plain tars."""

    seed: int
    repeats: int
    local_batch: int
    local_slots: int
    num_samples: int
    steps_per_epoch: int
    quarantine: Quarantine
    observer: Observer

    def plans(self, epoch: int, step: int) -> Iterator[StepPlan]: ...

    def fetch(self, plan: StepPlan, lo: int, hi: int) -> list[bytes]: ...

    def decoded(
        self, plan: StepPlan, slot: int, data: bytes, decode: Callable[[bytes, tuple[int, int]], Decoded]
    ) -> Decoded: ...

    def close(self) -> None: ...


class Feeder:
    """Plans the steps of one rank and reads their samples.

    Rank r of W takes rows [r * G / W, (r + 1) * G / W) of each global batch: all ranks together train on the same rows
    for any W.

    Args:
        store: the samples.
        order: the order of an epoch.
        crop: how windows and flips are drawn.
        quarantine: counts and lists bad samples.
        spec: size of a batch, seed and rank.
        fill_last: complete the last, partial batch of an epoch; else drop it.
        want: called with the shards that will be read soon (remote data).
        observer: sees planning and reading, and what the decoders do.
    """

    def __init__(
        self,
        store: SampleStore,
        order: Order,
        crop: CropConfig,
        quarantine: Quarantine,
        spec: BatchSpec,
        *,
        fill_last: bool,
        want: Callable[[list[int]], None] | None = None,
        observer: Observer = NOBODY,
    ) -> None:
        self.store, self.order, self.crop, self.quarantine = store, order, crop, quarantine
        self.spec, self.seed, self.repeats = spec, spec.seed, spec.repeats
        self.local_batch, self.local_slots = spec.local_batch, spec.local_slots
        self.num_samples, self.want, self.observer = store.num_samples, want, observer
        images = store.num_samples * spec.repeats
        self.steps_per_epoch = -(-images // spec.global_batch) if fill_last else images // spec.global_batch

    def plans(self, epoch: int, step: int) -> Iterator[StepPlan]:
        """Yields plans from a step on, without end."""
        while True:
            if step >= self.steps_per_epoch:
                epoch, step = epoch + 1, 0
            with self.observer.span("plan", self.local_batch):
                plan = self.plan(epoch, step)
            yield plan
            step += 1

    def plan(self, epoch: int, step: int) -> StepPlan:
        """This rank's part of one step. With `fill_last`, the epoch's first samples complete its last batch."""
        start = step * self.spec.global_batch + self.spec.rank * self.local_batch
        positions_U = (start // self.repeats + np.arange(self.local_slots)) % self.store.num_samples
        ids_U = self.order.indices(epoch, positions_U)
        if self.want is not None and isinstance(self.order, WindowOrder):
            self.want(self.order.shards_ahead(epoch, int(positions_U[0])))
        ids_B = np.repeat(ids_U, self.repeats)
        repeats_B = np.tile(np.arange(self.repeats), self.local_slots)
        heights_B, widths_B, labels_B = self.store.describe(ids_B)
        return StepPlan(
            epoch=epoch,
            step=step,
            positions_U=positions_U,
            sample_ids_B=ids_B,
            repeats_B=repeats_B,
            heights_B=heights_B,
            widths_B=widths_B,
            labels_B=labels_B.astype(np.int64),
            windows_B4=self.crop.windows(self.seed, epoch, ids_B, heights_B, widths_B, repeats_B),
            flips_B=self.crop.flips(self.seed, epoch, ids_B, repeats_B),
            attempts_U=np.zeros(self.local_slots, dtype=np.int64),
        )

    def fetch(self, plan: StepPlan, lo: int, hi: int) -> list[bytes]:
        """Bytes of slots `lo` to `hi`. Replaces bad samples, in the plan too."""
        with self.observer.span("read", hi - lo):
            found = self.store.read(plan.sample_ids_B[lo * self.repeats : hi * self.repeats : self.repeats])
            return [
                self._replacement(plan, slot, data) if isinstance(data, BadSample) else data
                for slot, data in enumerate(found, start=lo)
            ]

    def decoded(
        self, plan: StepPlan, slot: int, data: bytes, decode: Callable[[bytes, tuple[int, int]], Decoded]
    ) -> Decoded:
        """Returns `decode(data, (height, width))`; when it raises ValueError, the sample is bad and is replaced."""
        while True:
            row = slot * self.repeats
            try:
                return decode(data, (int(plan.heights_B[row]), int(plan.widths_B[row])))
            except ValueError as error:
                index = int(plan.sample_ids_B[row])
                data = self._replacement(plan, slot, BadSample(index, self.store.where(index), str(error)))

    def close(self) -> None:
        """Closes the files."""
        self.store.close()

    def _replacement(self, plan: StepPlan, slot: int, bad: BadSample) -> bytes:
        """Records a bad sample and puts the first good one of the `replace` stream into its slot.

        The stream is keyed by (seed, epoch, position in the epoch, attempt), the same for any number of ranks. Window,
        flip and mask follow the replacement's own index.
        """
        self.quarantine.record(bad)
        position = int(plan.positions_U[slot])
        while plan.attempts_U[slot] < ATTEMPTS:
            attempt = int(plan.attempts_U[slot])
            plan.attempts_U[slot] += 1
            word = int(draw_numpy(self.seed, STREAM_REPLACE, attempt, position, plan.epoch, position >> 32)[0])
            index = word * self.store.num_samples >> 32
            (data,) = self.store.read(np.array([index]))
            if not isinstance(data, BadSample):
                self._put(plan, slot, index)
                return data
            self.quarantine.record(data)
        raise ValueError(f"no good sample in {ATTEMPTS} draws for position {position} of epoch {plan.epoch}")

    def _put(self, plan: StepPlan, slot: int, index: int) -> None:
        """Writes another sample into a slot: its index, size, label, windows and flips."""
        rows = slice(slot * self.repeats, (slot + 1) * self.repeats)
        ids_K, repeats_K = np.full(self.repeats, index), plan.repeats_B[rows]
        heights_K, widths_K, labels_K = self.store.describe(ids_K)
        plan.sample_ids_B[rows], plan.labels_B[rows] = ids_K, labels_K
        plan.heights_B[rows], plan.widths_B[rows] = heights_K, widths_K
        plan.windows_B4[rows] = self.crop.windows(self.seed, plan.epoch, ids_K, heights_K, widths_K, repeats_K)
        plan.flips_B[rows] = self.crop.flips(self.seed, plan.epoch, ids_K, repeats_K)
