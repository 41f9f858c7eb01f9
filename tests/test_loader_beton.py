"""FFCV's .beton files through the same loader; the stored fixture was written by FFCV 1.0.2 itself."""

import gzip
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from patchmill.pipeline.config import MaskConfig
from patchmill.pipeline.loader import DataConfig, build_loader
from patchmill.pipeline.read.beton import BetonReader
from patchmill.pipeline.read.image import decode_image
from patchmill.pipeline.read.shards import BadSample
from tests.support.photos import make_dataset, photo_crop

# 12 crops of the photograph `coffee` (photo_crop, seed 0, sides 40 to 90), by FFCV's DatasetWriter with
# RGBImageField(write_mode="smart", smart_threshold=9000, jpeg_quality=90), a FloatField and an IntField: small ones are
# raw, large ones JPEG.
STORED = Path(__file__).parent / "golden" / "ffcv_photos.beton.gz"
SAMPLES = 12


@pytest.fixture(scope="module")
def written_by_ffcv(tmp_path_factory):
    path = tmp_path_factory.mktemp("ffcv") / "photos.beton"
    path.write_bytes(gzip.decompress(STORED.read_bytes()))
    return path


def open_loader(path, decoder="cpu", *, batch=4, rank=0, world=1, **options):
    return build_loader(
        DataConfig(path=str(path), decoder=decoder, workers=2, **options),
        image_size=32, patch_size=8, channels=3, mask=MaskConfig(), seed=3,
        global_batch=batch, rank=rank, world_size=world,
    )  # fmt: skip


def content(batch):
    return batch.epoch, batch.step, batch.sample_ids.tolist(), batch.labels.tolist(), batch.images.numpy().tobytes()


def good_samples(reader):
    """The bytes of all samples, none of them bad."""
    samples = reader.read(np.arange(SAMPLES))
    return [data for data in samples if not isinstance(data, BadSample)]


def test_samples_of_a_file_that_ffcv_wrote(written_by_ffcv):
    reader = BetonReader(written_by_ffcv)
    heights, widths, labels = reader.describe(np.arange(SAMPLES))
    samples = good_samples(reader)
    reader.close()
    assert labels.tolist() == [10 * i for i in range(SAMPLES)]
    kinds = {data[:2] for data in samples}
    assert kinds == {b"P6", b"\xff\xd8"}
    rng = np.random.default_rng(0)
    for data, height, width in zip(samples, heights, widths, strict=True):
        source = photo_crop(rng, "coffee.png", (40, 90))
        assert source.shape == (height, width, 3)
        difference = np.abs(decode_image(data, 3).astype(int) - source)
        assert difference.mean() < (0.1 if data[:2] == b"P6" else 6)


@pytest.mark.parametrize("decoder", ["cpu", "dali"])
def test_order_restart_and_ranks_are_as_for_shards(written_by_ffcv, decoder):
    with open_loader(written_by_ffcv, decoder) as loader:
        assert (loader.num_samples, loader.steps_per_epoch) == (SAMPLES, 3)
        whole = [next(loader) for _ in range(3)]
        state = loader.state_dict()
        rest = [content(next(loader)) for _ in range(4)]
    assert sorted(i for batch in whole for i in batch.sample_ids.tolist()) == list(range(SAMPLES))
    with open_loader(written_by_ffcv, decoder) as loader:
        loader.load_state_dict(state)
        assert [content(next(loader)) for _ in range(4)] == rest
    parts = []
    for rank in (0, 1):
        with open_loader(written_by_ffcv, decoder, rank=rank, world=2) as loader:
            parts.append([next(loader) for _ in range(3)])
    for alone, first, second in zip(whole, *parts, strict=True):
        assert torch.equal(alone.images, torch.cat([first.images, second.images]))


def test_decoders_agree(written_by_ffcv):
    with open_loader(written_by_ffcv) as cpu, open_loader(written_by_ffcv, "dali") as dali:
        for _ in range(4):
            ours, theirs = next(cpu), next(dali)
            assert torch.equal(ours.sample_ids, theirs.sample_ids)
            assert (ours.images.int() - theirs.images.int()).abs().float().mean() < 0.5


@pytest.mark.parametrize("cut", [0, 10, 500, 3000])
def test_a_cut_file_is_refused(written_by_ffcv, tmp_path, cut):
    path = tmp_path / "cut.beton"
    path.write_bytes(written_by_ffcv.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"cut\.beton is not a \.beton file"):
        open_loader(path)


def test_a_sample_that_lost_its_end_is_replaced(written_by_ffcv, tmp_path):
    reader = BetonReader(written_by_ffcv)
    jpegs = [i for i, data in enumerate(good_samples(reader)) if data[:2] == b"\xff\xd8"]
    start, size = int(reader.images["pointer"][jpegs[0]]), int(reader.sizes[jpegs[0]])
    data = bytearray(written_by_ffcv.read_bytes())
    data[start : start + size] = bytes(size)
    (tmp_path / "bad.beton").write_bytes(data)
    with open_loader(tmp_path / "bad.beton", max_bad_fraction=0.1) as loader:
        ids = {i for _ in range(6) for i in next(loader).sample_ids.tolist()}
        assert loader.bad_samples == 1
    assert ids == set(range(SAMPLES)) - {jpegs[0]}


def test_a_missing_file_names_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match="patchmill convert"):
        open_loader(tmp_path / "none.beton")


def test_a_converted_dataset_gives_the_same_batches(ffcv, tmp_path):
    """What `patchmill convert` writes keeps the JPEGs' bytes, so that even the pixels agree."""
    from patchmill.pipeline.read.manifest import open_dataset
    from patchmill.tools.packing.beton import write_beton

    dataset = make_dataset(tmp_path, count=SAMPLES, sides=(40, 90))
    write_beton(open_dataset(dataset), tmp_path / "photos.beton")
    with open_loader(dataset) as shards, open_loader(tmp_path / "photos.beton") as beton:
        assert [content(next(shards)) for _ in range(4)] == [content(next(beton)) for _ in range(4)]


def test_importing_ffcv_leaves_torch_its_threads(ffcv):
    """Checked in a process that has not imported it yet: FFCV alone sets them to one."""
    script = "import torch; torch.set_num_threads(2); "
    script += "from patchmill.tools.packing.beton import import_ffcv; import_ffcv()"
    check = "; assert torch.get_num_threads() == 2, torch.get_num_threads()"
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", script + check], check=True, cwd=root)
