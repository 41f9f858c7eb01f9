"""The resident decoder: the CPU decoder's images and plans from pictures that were decoded once."""

import pytest
import torch

from patchmill.pipeline.config import MaskConfig
from patchmill.pipeline.decode import resident
from patchmill.pipeline.decode.cpu import INTERPOLATIONS
from patchmill.pipeline.decode.resident import filter_weights
from patchmill.pipeline.loader import DataConfig, build_loader
from patchmill.pipeline.read.shards import ShardReader
from tests.support.damage import flip_a_bit
from tests.support.photos import make_dataset

COUNT = 24


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("resident"), count=COUNT, sides=(48, 48))


@pytest.fixture(autouse=True)
def _nothing_kept():
    resident._kept.clear()
    yield
    resident._kept.clear()


def open_loader(path, decoder, size=32, **options):
    options = {"workers": 2, "max_bad_fraction": 0.2, **options}
    return build_loader(
        DataConfig(path=str(path), decoder=decoder, **options),
        image_size=size, patch_size=8, channels=3, mask=MaskConfig(), seed=3, global_batch=8,
    )  # fmt: skip


def batches(path, decoder, count=4, **options):
    with open_loader(path, decoder, **options) as loader:
        return [next(loader) for _ in range(count)]


def test_weights_of_the_example():
    start, length = torch.tensor([1]), torch.tensor([2])
    for interpolation in ("bicubic", "bilinear"):
        assert filter_weights(start, length, 4, 2, interpolation)[0].tolist() == [[0, 1, 0, 0], [0, 0, 1, 0]]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("start", "length", "out"), [(0, 48, 48), (5, 31, 64), (7, 41, 16), (20, 1, 8)])
def test_weights_are_torch_s_own_filter(interpolation, start, length, out):
    row = torch.rand(48)
    weights = filter_weights(torch.tensor([start]), torch.tensor([length]), 48, out, interpolation)[0]
    window = row[start : start + length].view(1, 1, 1, -1)
    expected = torch.empty(1, 1, 1, out)
    INTERPOLATIONS[interpolation](window, [1, out], False, None, None, out=expected)
    torch.testing.assert_close(weights @ row, expected.flatten(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"interpolation": "bilinear"}, {"repeats": 2}, {"crop": "centre", "flip": False}, {"size": (16, 40)}],
    ids=str,
)
def test_batches_are_the_cpu_decoder_s(dataset, options):
    for found, expected in zip(
        batches(dataset, "resident", **options), batches(dataset, "cpu", **options), strict=True
    ):
        assert torch.equal(found.sample_ids, expected.sample_ids)
        assert torch.equal(found.labels, expected.labels)
        assert torch.equal(found.plan.ids_restore, expected.plan.ids_restore)
        assert found.images.dtype == torch.uint8
        assert found.images.is_contiguous()
        levels = (found.images.int() - expected.images.int()).abs()
        # the CPU decoder's weights have 8 or so bits after the point: one level in each of two passes
        assert levels.max() <= 2
        assert levels.float().mean() < 0.05


def test_a_restart_in_the_middle_gives_the_same_batches(dataset):
    whole = batches(dataset, "resident", count=6)
    with open_loader(dataset, "resident") as loader:
        next(loader)
        loader.seek(*divmod(4, loader.steps_per_epoch))
        assert torch.equal(next(loader).images, whole[4].images)


def test_a_bad_sample_is_replaced_as_the_cpu_decoder_does(tmp_path):
    path = make_dataset(tmp_path, count=COUNT, sides=(48, 48))
    flip_a_bit(path, 5)
    with open_loader(path, "resident") as loader, open_loader(path, "cpu") as reference:
        for _ in range(2 * loader.steps_per_epoch):
            found, expected = next(loader), next(reference)
            assert torch.equal(found.sample_ids, expected.sample_ids)
            assert 5 not in found.sample_ids
            assert (found.images.int() - expected.images.int()).abs().max() <= 2
        assert loader.bad_samples == 1


def test_images_of_several_sizes_are_refused(tmp_path):
    path = make_dataset(tmp_path, count=COUNT, sides=(40, 60))
    with pytest.raises(ValueError, match=r"one size, found \d+ x \d+ to \d+ x \d+ pixels: use data.decoder=cpu"):
        open_loader(path, "resident")


def test_a_stream_is_refused(dataset):
    tars = sorted(dataset.glob("*.tar"))
    with pytest.raises(ValueError, match="not a stream of tars"):
        open_loader(tars[0], "resident")


def test_what_needs_too_much_memory_is_refused(dataset, monkeypatch):
    monkeypatch.setattr("patchmill.pipeline.decode.resident.MAX_BYTES", COUNT * 48 * 48 * 3 - 1)
    with pytest.raises(ValueError, match="GiB of images"):
        open_loader(dataset, "resident")


@pytest.fixture
def reads(monkeypatch):
    """Ids of all samples that are read."""
    ids, read = [], ShardReader.read

    def counting_read(self, sample_ids_B):
        ids.extend(sample_ids_B.tolist())
        return read(self, sample_ids_B)

    monkeypatch.setattr(ShardReader, "read", counting_read)
    return ids


def test_all_bytes_are_read_once_in_a_process(dataset, reads):
    with open_loader(dataset, "resident") as loader:
        first = [next(loader).images for _ in range(3 * loader.steps_per_epoch)]
    assert sorted(reads) == list(range(COUNT))
    with open_loader(dataset, "resident") as loader:
        again = [next(loader).images for _ in range(3 * loader.steps_per_epoch)]
    batches(dataset, "resident", size=16)
    assert len(reads) == COUNT
    assert torch.equal(torch.stack(first), torch.stack(again))


def test_one_dataset_is_kept_and_only_for_loaders_of_the_same(dataset, tmp_path, reads):
    other = make_dataset(tmp_path, count=COUNT, sides=(48, 48))
    flip_a_bit(other, 5)  # the manifest, and with it the fingerprint, is that of the whole dataset
    batches(dataset, "resident")
    with open_loader(other, "resident") as loader:
        for _ in range(loader.steps_per_epoch):
            assert 5 not in next(loader).sample_ids
        assert loader.bad_samples == 1
    assert len(resident._kept) == 1
    before = len(reads)
    batches(dataset, "resident")
    assert len(reads) == before + COUNT


def test_a_large_dataset_is_not_kept(dataset, monkeypatch):
    monkeypatch.setattr(resident, "KEPT_BYTES", COUNT * 48 * 48 * 3 - 1)
    batches(dataset, "resident")
    assert not resident._kept
