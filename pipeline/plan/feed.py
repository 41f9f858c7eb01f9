"""order, draws, shards -> [feed] -> decode_cpu, decode_dali: what each step trains on, and its bytes.

Everything about a step is computed from (epoch, step): positions, sample indices, windows, flips. Reading is apart from
planning, so that decoders can read parts of a batch from many threads; a sample that turns out bad is replaced here,
for both decoders in the same way.

Legend: G global batch, W ranks, K repeats, B = G / W rows of a rank's batch, U = B / K slots (decoded images).
Slot u feeds rows u * K to (u + 1) * K, each with a window, flip and mask of its own.
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
from patchmill.pipeline.read.quarantine import Quarantine
from patchmill.pipeline.read.shards import BadSample

ATTEMPTS = 100  # replacements tried for one slot; with the default limit on bad samples two are already rare

Ids = NDArray[np.int64]
Decoded = TypeVar("Decoded")


class SampleStore(Protocol):
    """Where encoded samples come from: ShardReader, or the FFCV file."""

    num_samples: int
    channels: int
    fingerprint: str

    def describe(self, sample_ids_B: Ids) -> tuple[NDArray, NDArray, NDArray]: ...

    def read(self, sample_ids_B: Ids) -> list[bytes | BadSample]: ...

    def where(self, index: int) -> str: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class CropConfig:
    """How windows and flips are drawn; see draws.py.

    Attributes:
        kind: "random" (random-resized crop), "fixed" (fixed size, random place) or "centre".
        rule: of random crops: "torchvision" or "tf".
        scale, ratio: of random crops: range of the area's share and of width / height.
        fraction: of fixed and centre crops: share of the shorter side.
        flip: whether half of the images are mirrored.
        aspect: width / height of the result.
    """

    kind: str
    rule: str
    scale: tuple[float, float]
    ratio: tuple[float, float]
    fraction: float
    flip: bool
    aspect: float

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
    """What a step trains on. The arrays change only where a bad sample is replaced, before the batch is delivered."""

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


class Feeder:
    """Plans the steps of one rank and reads their samples.

    Rank r of W takes rows [r * G / W, (r + 1) * G / W) of each global batch, so that the union over ranks is the same
    for any W.

    Args:
        store: the samples.
        order: of an epoch.
        crop: how windows and flips are drawn.
        quarantine: counts and names bad samples.
        seed, global_batch, rank, world_size, repeats: as for the loader.
        fill_last: whether the last, partial batch of an epoch is completed or dropped.
        want: told which shards will be read soon (remote data).
        observer: sees planning and reading, and what the decoders do.
    """

    def __init__(
        self,
        store: SampleStore,
        order: Order,
        crop: CropConfig,
        quarantine: Quarantine,
        *,
        seed: int,
        global_batch: int,
        rank: int,
        world_size: int,
        repeats: int,
        fill_last: bool,
        want: Callable[[list[int]], None] | None = None,
        observer: Observer = NOBODY,
    ) -> None:
        self.observer = observer
        self.store, self.order, self.crop, self.quarantine = store, order, crop, quarantine
        self.seed, self.global_batch, self.rank, self.repeats = seed, global_batch, rank, repeats
        self.local_batch = global_batch // world_size
        self.local_slots = self.local_batch // repeats
        self.num_samples, self.want = store.num_samples, want
        views = store.num_samples * repeats
        self.steps_per_epoch = -(-views // global_batch) if fill_last else views // global_batch

    def plans(self, epoch: int, step: int) -> Iterator[StepPlan]:
        """Plans from a step on, for ever."""
        while True:
            if step >= self.steps_per_epoch:
                epoch, step = epoch + 1, 0
            with self.observer.span("plan", self.local_batch):
                plan = self.plan(epoch, step)
            yield plan
            step += 1

    def plan(self, epoch: int, step: int) -> StepPlan:
        """This rank's share of one step. The last batch of a filled epoch goes on with the epoch's first samples."""
        start = step * self.global_batch + self.rank * self.local_batch
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
        """Bytes of slots `lo` to `hi`; where a sample is bad, those of its replacement, which the plan then names."""
        with self.observer.span("read", hi - lo):
            found = self.store.read(plan.sample_ids_B[lo * self.repeats : hi * self.repeats : self.repeats])
            return [
                self._replacement(plan, slot, data) if isinstance(data, BadSample) else data
                for slot, data in enumerate(found, start=lo)
            ]

    def decoded(
        self, plan: StepPlan, slot: int, data: bytes, decode: Callable[[bytes, tuple[int, int]], Decoded]
    ) -> Decoded:
        """`decode(data, (height, width))`; where that raises ValueError, the sample is bad and is replaced."""
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
        """Records a bad sample and puts another into its slot: the first good one of the `replace` stream.

        The stream is drawn by (seed, epoch, position in the epoch, attempt), so that every rank layout agrees. Window,
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
        """Lets a slot hold another sample: its index, size, label, windows and flips."""
        rows = slice(slot * self.repeats, (slot + 1) * self.repeats)
        ids_K, repeats_K = np.full(self.repeats, index), plan.repeats_B[rows]
        heights_K, widths_K, labels_K = self.store.describe(ids_K)
        plan.sample_ids_B[rows], plan.labels_B[rows] = ids_K, labels_K
        plan.heights_B[rows], plan.widths_B[rows] = heights_K, widths_K
        plan.windows_B4[rows] = self.crop.windows(self.seed, plan.epoch, ids_K, heights_K, widths_K, repeats_K)
        plan.flips_B[rows] = self.crop.flips(self.seed, plan.epoch, ids_K, repeats_K)
