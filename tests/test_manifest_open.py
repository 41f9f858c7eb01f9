"""Opening a dataset finds whatever can be found without reading a shard, and says what mends it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchmill.pipeline.read.manifest import SAMPLE_DTYPE, Manifest, ShardInfo, open_dataset
from patchmill.pipeline.read.tiff import read_tiff, write_tiff
from tests.support.photos import make_dataset, make_image_folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("open"), count=12, sides=(40, 60), shard_size_mb=0.02)


@pytest.fixture
def dataset(whole, tmp_path) -> Path:
    shutil.copytree(whole, tmp_path / "dataset")
    return tmp_path / "dataset"


def edit(dataset: Path, **changes: object) -> None:
    path = dataset / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_rows_are_33_bytes_little_endian():
    assert SAMPLE_DTYPE.itemsize == 33
    assert [SAMPLE_DTYPE[name].str for name in SAMPLE_DTYPE.names or ()] == [
        "<u4",
        "<u8",
        "<u4",
        "<u4",
        "|u1",
        "<u4",
        "<u4",
        "<i4",
    ]


def test_whole(dataset):
    opened = open_dataset(dataset)
    assert len(opened) == 12
    assert isinstance(opened.samples, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        opened.samples["label"][0] = 1
    assert opened.shard_path(0) == dataset / "shard-000000.tar"


@pytest.mark.parametrize("name", ["/etc/x.tar", "../x.tar", "a/x.tar", "x.tar/", "samples.npy", "..", "", "x\0.tar", 3])
def test_a_shard_named_like_anything_but_a_tar_of_the_folder_is_refused(dataset, name):
    shards = json.loads((dataset / "manifest.json").read_text())["shards"]
    edit(dataset, shards=[shards[0] | {"name": name}, *shards[1:]])
    with pytest.raises(ValueError, match=r"manifest\.json names a shard .* expected a plain file name"):
        open_dataset(dataset)


def test_fingerprint_follows_the_content(dataset, tmp_path):
    first = open_dataset(dataset).manifest
    assert Manifest.from_json(first.to_json()) == first
    other = make_dataset(tmp_path / "other", count=12, sides=(40, 60), shard_size_mb=0.02)
    assert open_dataset(other).manifest.fingerprint() == first.fingerprint()
    third = make_dataset(tmp_path / "third", count=12, sides=(40, 60), shard_size_mb=0.02, seed=1)
    assert open_dataset(third).manifest.fingerprint() != first.fingerprint()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "expected format_version 1, found 2"),
        ({"num_samples": 13}, "counts 13 samples and its shards 12"),
        ({"shards": [{"name": "a.tar"}]}, "lacks a field"),
        ({"shards": []}, "counts 12 samples and its shards 0"),
        ({"num_samples": 0, "shards": []}, "counts 0 samples"),
    ],
)
def test_manifest_that_cannot_be(dataset, change, message):
    edit(dataset, **change)
    with pytest.raises(ValueError, match=message):
        open_dataset(dataset)


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"'])
def test_manifest_that_is_none(dataset, text):
    (dataset / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json"):
        open_dataset(dataset)


def test_missing_shard(dataset):
    (dataset / "shard-000001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-000001\.tar is missing"):
        open_dataset(dataset)


def test_cut_shard(dataset):
    tar = dataset / "shard-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    with pytest.raises(ValueError, match=r"shard-000001\.tar: expected \d+ bytes as in manifest\.json, found \d+"):
        open_dataset(dataset)


@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "other type", "other length", "objects"])
def test_samples_table(dataset, damage):
    path = dataset / "samples.npy"
    samples = np.load(path)
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "other type":
        np.save(path, samples["offset"])
    elif damage == "other length":
        np.save(path, samples[:-1])
    else:
        np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"samples\.npy"):
        open_dataset(dataset)


def test_places_that_are_no_dataset(dataset, tmp_path):
    with pytest.raises(FileNotFoundError, match="patchmill shard IMAGES DATASET"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is a file"):
        open_dataset(dataset / "shard-000000.tar")
    with pytest.raises(ValueError, match="it holds the datasets dataset"):
        open_dataset(tmp_path)
    with pytest.raises(ValueError, match="if it holds images, pack them"):
        open_dataset(make_image_folder(tmp_path / "in", count=2, sides=(40, 50)))
    (dataset / "manifest.json").unlink()
    with pytest.raises(ValueError, match="run `patchmill index"):
        open_dataset(dataset)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="it is empty"):
        open_dataset(tmp_path / "empty")
    (tmp_path / "new.partial").mkdir()
    with pytest.raises(FileNotFoundError, match="holds an unfinished run"):
        open_dataset(tmp_path / "new")


def test_json_of_a_manifest_has_no_order_of_its_own():
    shard = ShardInfo("a.tar", 1, 2, "00")
    manifest = Manifest(1, {"b": 1, "a": 2}, ["ä"], 1, [shard], (0.5,), (0.25,))
    assert list(json.loads(manifest.to_json())) == sorted(json.loads(manifest.to_json()))
    assert Manifest.from_json(manifest.to_json()) == manifest


@given(st.integers(1, 8), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_tiff_holds_any_number_of_channels(channels, height, width, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    data = write_tiff(pixels)
    np.testing.assert_array_equal(read_tiff(data), pixels)
    for wrong in (data[:-1], data[: len(data) // 2], b"", b"II*\0" + bytes(20)):
        with pytest.raises(ValueError, match=r"TIFF|directory|strips"):
            read_tiff(wrong)
