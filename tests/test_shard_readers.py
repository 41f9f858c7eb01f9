"""Shards stay plain WebDataset: webdataset, DALI with our index, tarfile and tar(1) read what the table says."""

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchmill.pipeline.read.manifest import EXTENSIONS, Dataset, ImageFormat, open_dataset
from patchmill.pipeline.read.tar import TarDamage, index_of, split_key, walk_tar, walk_tar_file
from patchmill.tools.packing.listing import list_folder
from patchmill.tools.packing.pack_dataset import pack_dataset
from patchmill.tools.packing.plan import PackOptions
from patchmill.tools.packing.strict_decode import read_bytes
from tests.support.faults import PHOTO, save
from tests.support.photos import make_image_folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    """JPEGs and a PNG, labelled and not."""
    root = tmp_path_factory.mktemp("readers")
    folder = make_image_folder(root / "in", count=24, sides=(64, 90))
    (folder / "rocket" / "lossless.png").write_bytes(save(PHOTO, "PNG"))
    pack_dataset(list_folder(folder), root / "out", PackOptions(shard_size_mb=0.05))
    return open_dataset(root / "out")


def tars(dataset: Dataset) -> list[str]:
    return [str(dataset.root / shard.name) for shard in dataset.manifest.shards]


def test_webdataset(dataset):
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
    samples = list(webdataset.WebDataset(tars(dataset), shardshuffle=False))
    assert len(samples) == len(dataset)
    for i, sample in enumerate(samples):
        row = dataset.samples[i]
        assert sample[EXTENSIONS[ImageFormat(row["format"])]] == read_bytes(dataset, i)
        assert int(sample["cls"]) == row["label"]
        assert "." not in sample["__key__"]


def test_dali_reads_with_our_index(dataset):
    dali = pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    from nvidia.dali import fn

    indexes = [str(dataset.root / shard.index_name) for shard in dataset.manifest.shards]

    @dali.pipeline_def(batch_size=5, num_threads=1, device_id=None)
    def read():
        images, labels = fn.readers.webdataset(  # type: ignore[misc]
            paths=tars(dataset), index_paths=indexes, ext=["jpg;png", "cls"], name="reader"
        )
        return images, labels

    pipeline = read()
    pipeline.build()
    assert pipeline.epoch_size("reader") == len(dataset)
    found: list[tuple[bytes, int]] = []
    while len(found) < len(dataset):
        images, labels = pipeline.run()
        found += [(np.array(images[i]).tobytes(), int(bytes(np.array(labels[i])))) for i in range(5)]
    expected = [(read_bytes(dataset, i), int(row["label"])) for i, row in enumerate(dataset.samples)]
    assert found[: len(dataset)] == expected


def test_dali_makes_the_same_index(dataset, tmp_path):
    wds2idx = pytest.importorskip("wds2idx", reason="DALI is not installed")
    for shard in dataset.manifest.shards:
        with wds2idx.IndexCreator(str(dataset.root / shard.name), str(tmp_path / "x.idx"), verbose=False) as creator:
            creator.create_index()
        assert (tmp_path / "x.idx").read_text() == (dataset.root / shard.index_name).read_text()


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar(1) on this platform")
def test_tar_lists_without_complaint(dataset):
    listed = []
    for path in tars(dataset):
        result = subprocess.run(["tar", "tf", path], capture_output=True, text=True, check=True)
        assert result.stderr == ""
        listed += result.stdout.split()
    assert len(listed) == 2 * len(dataset)


def test_tarfile(dataset):
    for shard in dataset.manifest.shards:
        path = dataset.root / shard.name
        with tarfile.open(path) as tar:
            ours = [(m.name, m.offset, m.size) for m in walk_tar_file(path)]
            assert [(m.name, m.offset_data, m.size) for m in tar.getmembers()] == ours
            for member in tar.getmembers():
                assert (member.mode, member.uid, member.gid, member.mtime, member.uname) == (0o644, 0, 0, 0, "")
        assert index_of(walk_tar_file(path)) == (dataset.root / shard.index_name).read_text()


NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=150
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(NAMES, st.binary(max_size=1500), max_size=8), st.sampled_from([0, 1, 2]))
def test_walks_any_tar_as_tarfile_does(tmp_path_factory, members, format):
    """USTAR, GNU and PAX with long and foreign names."""
    path = tmp_path_factory.mktemp("walk") / "any.tar"
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name.replace("/", "_"))
            info.size = len(data)
            try:
                tar.addfile(info, io.BytesIO(data))
            except ValueError:  # USTAR cannot hold this name
                continue
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar.getmembers()]
    assert [(m.name, m.offset, m.size) for m in walk_tar_file(path)] == expected


def write_tar(path: Path) -> list[int]:
    """A tar of twelve members; returns their header offsets."""

    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(12):
            info = tarfile.TarInfo(f"{i:04d}.jpg")
            info.size = 700
            tar.addfile(info, io.BytesIO(bytes([i]) * 700))
    with tarfile.open(path) as tar:
        return [member.offset for member in tar.getmembers()]


@pytest.mark.parametrize(
    "damage",
    [
        "checksum",
        "size",
        "random header",
        "zeroed header",
        "two zero blocks",
        "cut in data",
        "cut between",
        "html",
        "empty",
    ],
)
def test_damaged_tars_are_never_short_in_silence(tmp_path, damage):
    """What tarfile takes for the end of the archive (5 of 12 members and no error) is named here."""
    path = tmp_path / "a.tar"
    at = write_tar(path)[5]
    data = bytearray(path.read_bytes())
    if damage == "checksum":
        data[at + 150] ^= 1
    elif damage == "size":
        data[at + 130] ^= 1
    elif damage == "random header":
        data[at : at + 512] = np.random.default_rng(0).bytes(512)
    elif damage == "zeroed header":
        data[at : at + 512] = bytes(512)
    elif damage == "two zero blocks":
        data[at:at] = bytes(1024)
    elif damage == "cut in data":
        del data[at + 600 :]
    elif damage == "cut between":
        del data[at:]
    else:
        data = bytearray(b"<!DOCTYPE html>" * 50 if damage == "html" else b"")
    path.write_bytes(data)
    with pytest.raises(TarDamage, match=r"a\.tar .*byte"), path.open("rb"):
        walk_tar_file(path)


def test_keys_follow_webdataset():
    assert split_key("a/b.c.jpg") == ("a/b", "c.jpg")
    assert split_key("b.jpg") == ("b", "jpg")
    assert split_key(".hidden") is None
    assert split_key("plain") is None
    with pytest.raises(TarDamage):
        list(walk_tar(io.BytesIO(b"x" * 512)))
