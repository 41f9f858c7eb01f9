"""Feeding DALI: bytes stay where they are until DALI has read them, and reading is one batch ahead."""

import gc
import weakref

import numpy as np
import pytest
import torch

from patchmill.pipeline.config import MaskConfig
from patchmill.pipeline.decode.dali import _Source
from patchmill.pipeline.loader import DataConfig, build_loader
from patchmill.pipeline.read.threads import Pool
from tests.support.photos import make_dataset

pytest.importorskip("nvidia.dali", reason="the extra `dali` is not installed")
BATCH = 16


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("feed"), count=64, sides=(60, 120))


def open_loader(path, **options):
    return build_loader(
        DataConfig(path=str(path), decoder="dali", workers=4, **options),
        image_size=32, patch_size=8, channels=3, mask=MaskConfig(), seed=3, global_batch=BATCH,
    )  # fmt: skip


class Event:
    """A CUDA event that the device reaches when told to."""

    reached = False

    def query(self) -> bool:
        return self.reached


def test_samples_live_until_the_device_has_read_them(dataset):
    with open_loader(dataset) as loader, Pool(2, "test") as pool:
        source = _Source(loader.maker.feeder, pool, 0, 0, 3, None)
        alive = []
        for iteration in range(3):
            alive.append([weakref.ref(array) for array in source(iteration)[1:]])
        gc.collect()
        assert all(reference() is not None for batch in alive for reference in batch)
        first, second = Event(), Event()
        assert source.take(first).place == (0, 0)  # type: ignore[arg-type]
        assert source.take(second).place == (0, 1)  # type: ignore[arg-type]
        assert all(reference() is not None for batch in alive for reference in batch)
        first.reached = second.reached = True
        assert source.take(Event()).place == (0, 2)  # type: ignore[arg-type]
        assert [any(reference() is not None for reference in batch) for batch in alive] == [False, False, True]
        source(3)
        assert source.take(None).place == (0, 3)  # the CPU backend has read a batch when it returns it


def test_the_next_batch_is_read_before_this_one_is_complete(dataset, monkeypatch):
    with open_loader(dataset) as loader, Pool(1, "test") as pool:
        source = _Source(loader.maker.feeder, pool, 0, 0, 3, None)
        fetched = []
        submit = pool.submit

        def submitting(function, plan, lo):
            fetched.append(plan.place)
            return submit(function, plan, lo)

        monkeypatch.setattr(pool, "submit", submitting)
        source(0)
        assert set(fetched) == {(0, 0), (0, 1)}
        source(1)
        assert fetched == sorted(fetched)
        assert set(fetched) == {(0, 0), (0, 1), (0, 2)}


def test_memory_that_python_reuses_changes_no_batch(dataset):
    """The consumer fills memory with other bytes meanwhile: a sample freed too early would decode to something else."""
    with open_loader(dataset) as loader:
        expected = [next(loader).images.clone() for _ in range(12)]
    with open_loader(dataset) as loader:
        for images in expected:
            found = next(loader).images
            noise = [np.full(size, 255, np.uint8).tobytes() for size in (3_000, 5_000, 8_000) for _ in range(50)]
            assert torch.equal(found, images)
            del noise
