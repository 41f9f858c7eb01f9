"""Streams samples from plain WebDataset tars without a manifest, from any path or URL.

For data that cannot be packed or indexed first. Crops, flips and masks are drawn as everywhere, keyed by a hash of
shard name and key. A stream has limits: it shuffles only within a buffer; rank r reads the shards r, r + W, ..., and
batches depend on the number of ranks; resuming reads past used samples and needs the same number of ranks; there are no
checksums. A damaged or cut tar stops the run with its name: no reader can tell what it lost.
"""

import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import count, islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from patchmill.kernels.philox import STREAM_ORDER, STREAM_REPLACE, draw_numpy
from patchmill.pipeline.observe import NOBODY, Observer
from patchmill.pipeline.plan.feed import CropConfig, Decoded, StepPlan
from patchmill.pipeline.plan.order import EpochOrder
from patchmill.pipeline.plan.spec import BatchSpec
from patchmill.pipeline.read.connection import open_stream
from patchmill.pipeline.read.image import displayed_size
from patchmill.pipeline.read.image_headers import IMAGE_EXTENSIONS
from patchmill.pipeline.read.quarantine import Quarantine
from patchmill.pipeline.read.shards import BadSample
from patchmill.pipeline.read.tar import TarDamage, tar_samples
from patchmill.pipeline.read.threads import Prefetcher
from patchmill.pipeline.read.urls import beside, redact

log = logging.getLogger(__name__)

BUFFER_BLOCK = 1 << 16  # of the `order` stream, for places in the shuffle buffer; shards use the first blocks
ATTEMPTS = 100
AT_ONCE, QUEUED = 16, 16  # samples in a group that the reading thread hands over, and groups that it reads ahead


class Sample(NamedTuple):
    """One image: hash of shard name and key (63 bits), its place for people, bytes, label, displayed size."""

    sample_id: int
    where: str
    data: bytes
    label: int
    height: int
    width: int


@dataclass
class StreamPlan(StepPlan):
    """A step's plan together with its samples."""

    samples_U: list[Sample] = field(default_factory=list)


class StreamFeeder:
    """Plans the steps of one rank from a stream of tars; the counterpart of Feeder.

    An epoch has `samples_per_epoch` samples on all ranks together; a rank whose shards hold fewer reads them again.
    """

    def __init__(
        self,
        urls: list[str],
        crop: CropConfig,
        quarantine: Quarantine,
        spec: BatchSpec,
        *,
        samples_per_epoch: int,
        shuffle_buffer: int,
        shuffle_shards: bool,
        timeout_seconds: float,
        observer: Observer = NOBODY,
    ) -> None:
        if spec.world_size > len(urls):
            raise ValueError(
                f"{len(urls)} shards cannot be shared by {spec.world_size} ranks: use as many shards, or fewer ranks"
            )
        if samples_per_epoch * spec.repeats < spec.global_batch:
            raise ValueError(
                f"an epoch of {samples_per_epoch} samples does not fill one global batch of {spec.global_batch}"
            )
        self.urls, self.crop, self.quarantine, self.observer = urls, crop, quarantine, observer
        self.seed, self.repeats, self.rank, self.world_size = spec.seed, spec.repeats, spec.rank, spec.world_size
        self.local_batch, self.local_slots = spec.local_batch, spec.local_slots
        self.num_samples = samples_per_epoch
        self.steps_per_epoch = samples_per_epoch * spec.repeats // spec.global_batch
        self.shuffle_buffer, self.shuffle_shards = shuffle_buffer, shuffle_shards
        self.timeout_seconds = timeout_seconds
        log.warning(
            "%s: plain tars have no global order and no checksums, and resume only on %d rank(s), by reading past used "
            "samples; run `patchmill index` or `patchmill shard` once to get all of these",
            redact(urls[0]),
            self.world_size,
        )

    def plans(self, epoch: int, step: int) -> Iterator[StreamPlan]:
        """Yields plans from a step on, without end; a separate thread reads the tars ahead."""
        while True:
            if step >= self.steps_per_epoch:
                epoch, step = epoch + 1, 0
            with closing(Prefetcher(self._groups(epoch), QUEUED)) as groups:
                samples = (sample for _ in count() for sample in groups.get(self.timeout_seconds))
                used = sum(1 for _ in islice(samples, step * self.local_slots))
                if used:
                    log.warning("read past %d samples to reach step %d of epoch %d", used, step, epoch)
                for now in range(step, self.steps_per_epoch):
                    with self.observer.span("plan", self.local_batch):
                        plan = self._plan(epoch, now, list(islice(samples, self.local_slots)))
                    yield plan
            step = self.steps_per_epoch

    def fetch(self, plan: StepPlan, lo: int, hi: int) -> list[bytes]:
        """Bytes of slots `lo` to `hi`."""
        assert isinstance(plan, StreamPlan)
        with self.observer.span("read", hi - lo):
            return [sample.data for sample in plan.samples_U[lo:hi]]

    def decoded(
        self, plan: StepPlan, slot: int, data: bytes, decode: Callable[[bytes, tuple[int, int]], Decoded]
    ) -> Decoded:
        """Returns `decode(data, (height, width))`; when it raises ValueError, another sample of the batch is used."""
        assert isinstance(plan, StreamPlan)
        sample = plan.samples_U[slot]
        for attempt in range(ATTEMPTS):
            try:
                return decode(sample.data, (sample.height, sample.width))
            except ValueError as error:
                self.quarantine.record(BadSample(sample.sample_id, sample.where, str(error)))
            position = (plan.step * self.world_size + self.rank) * self.local_slots + slot
            word = int(draw_numpy(self.seed, STREAM_REPLACE, attempt, position, plan.epoch)[0])
            sample = plan.samples_U[word * self.local_slots >> 32]
            rows = slice(slot * self.repeats, (slot + 1) * self.repeats)
            plan.repeats_B[rows] += self.repeats  # other draws than at this sample's own slot
            self._draw(plan, rows, [sample] * self.repeats)
        raise ValueError(f"no sample of step {plan.step} of epoch {plan.epoch} can be decoded")

    def close(self) -> None:
        """Does nothing: no file stays open between iterations."""

    def _plan(self, epoch: int, step: int, samples: list[Sample]) -> StreamPlan:
        rows = self.local_batch
        empty = np.zeros(rows, dtype=np.int64)
        plan = StreamPlan(
            epoch=epoch,
            step=step,
            positions_U=np.arange(self.local_slots),
            sample_ids_B=empty.copy(),
            repeats_B=np.tile(np.arange(self.repeats), self.local_slots),
            heights_B=empty.copy(),
            widths_B=empty.copy(),
            labels_B=empty.copy(),
            windows_B4=np.zeros((rows, 4), dtype=np.int32),
            flips_B=np.zeros(rows, dtype=np.bool_),
            attempts_U=np.zeros(self.local_slots, dtype=np.int64),
            samples_U=samples,
        )
        self._draw(plan, slice(0, rows), [sample for sample in samples for _ in range(self.repeats)])
        return plan

    def _draw(self, plan: StreamPlan, rows: slice, samples: list[Sample]) -> None:
        """Writes samples and their draws into rows of a plan."""
        ids, repeats = np.array([sample.sample_id for sample in samples], dtype=np.int64), plan.repeats_B[rows]
        heights = np.array([sample.height for sample in samples])
        widths = np.array([sample.width for sample in samples])
        plan.sample_ids_B[rows], plan.labels_B[rows] = ids, [sample.label for sample in samples]
        plan.heights_B[rows], plan.widths_B[rows] = heights, widths
        plan.windows_B4[rows] = self.crop.windows(self.seed, plan.epoch, ids, heights, widths, repeats)
        plan.flips_B[rows] = self.crop.flips(self.seed, plan.epoch, ids, repeats)

    def _groups(self, epoch: int) -> Iterator[list[Sample]]:
        shuffled = self._shuffled(epoch)
        while group := list(islice(shuffled, AT_ONCE)):
            yield group

    def _shuffled(self, epoch: int) -> Iterator[Sample]:
        """Yields this rank's samples without end, shuffled in a buffer that is emptied at the end of each pass."""
        places = self._places(epoch)
        for number in count():
            buffer: list[Sample] = []
            for sample in self._pass(epoch, number):
                buffer.append(sample)
                if len(buffer) >= self.shuffle_buffer:
                    yield _take(buffer, next(places))
            while buffer:
                yield _take(buffer, next(places))

    def _places(self, epoch: int) -> Iterator[int]:
        """Yields the words that choose from the buffer."""
        for start in count(0, 1024):
            words = draw_numpy(self.seed, STREAM_ORDER, BUFFER_BLOCK, np.arange(start, start + 1024), epoch, self.rank)
            yield from words[:, 0].tolist()

    def _pass(self, epoch: int, number: int) -> Iterator[Sample]:
        """Yields the samples of this rank's shards once, in the epoch's order."""
        order: NDArray = np.arange(len(self.urls))
        if self.shuffle_shards:
            order = EpochOrder(len(self.urls), self.seed).indices(epoch, order)
        found = 0
        for shard in order[self.rank :: self.world_size].tolist():
            for sample in self._shard(self.urls[shard]):
                found += 1
                yield sample
        if not found:
            raise ValueError(f"no image in pass {number} over {len(self.urls)} tars, such as {redact(self.urls[0])}")

    def _shard(self, url: str) -> Iterator[Sample]:
        name = redact(url)
        with open_stream(url) as file:
            try:
                for key, parts in tar_samples(file):
                    sample = self._sample(name, key, parts)
                    if sample is not None:
                        yield sample
            except TarDamage as damage:
                raise ValueError(
                    f"{name} {damage}: restore it or leave it out (`patchmill index --skip-damaged` packs the rest)"
                ) from None

    def _sample(self, shard: str, key: str, parts: dict[str, bytes]) -> Sample | None:
        """A sample of the tar, or None for a bad one, which is recorded."""
        where = f"{shard}:{key}"
        digest = hashlib.blake2b(f"{shard.rpartition('/')[2]}/{key}".encode("utf-8", "replace"), digest_size=8).digest()
        index = int.from_bytes(digest, "little") >> 1
        data = next((parts[extension] for extension in IMAGE_EXTENSIONS if extension in parts), None)
        if data is None:
            self.quarantine.record(BadSample(index, where, f"contains no image, only {', '.join(sorted(parts))}"))
            return None
        try:
            height, width = displayed_size(data)
        except ValueError as error:
            self.quarantine.record(BadSample(index, where, str(error)))
            return None
        return Sample(index, where, data, label_of(parts), height, width)


def label_of(parts: dict[str, bytes]) -> int:
    """The label of a sample: its .cls, or `label` in its .json; -1 when neither is a number."""
    try:
        if "cls" in parts:
            return int(parts["cls"])
        if "json" in parts:
            return int(json.loads(parts["json"])["label"])
    except (ValueError, KeyError, TypeError):
        return -1
    return -1


def count_samples(urls: list[str]) -> int:
    """Counts the samples of tars by their DALI indexes (first line `v1.2 N`). Raises ValueError when one is missing."""
    total = 0
    for url in urls:
        if url.startswith("pipe:"):
            raise ValueError("set the number of samples of an epoch: data.samples_per_epoch")
        index = beside(url, ".idx")
        try:
            with open_stream(index) as file:
                total += int(io.BytesIO(file.read(64)).readline().split()[1])
        except (FileNotFoundError, ValueError, IndexError):
            raise ValueError(
                f"{redact(index)} does not give the number of samples: set data.samples_per_epoch, or make "
                "indexes with `patchmill index`"
            ) from None
    return total


def _take(buffer: list[Sample], word: int) -> Sample:
    """Takes the sample at a random place and fills the gap with the last one."""
    place = word * len(buffer) >> 32
    buffer[place], buffer[-1] = buffer[-1], buffer[place]
    return buffer.pop()
