"""verify names every fault that can befall a dataset, and only those."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from patchmill.pipeline.read.manifest import open_dataset
from patchmill.tools import verify
from tests.support.photos import make_dataset


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("verify"), count=30, sides=(40, 80), shard_size_mb=0.02)


@pytest.fixture
def dataset(whole, tmp_path) -> Path:
    shutil.copytree(whole, tmp_path / "dataset")
    return tmp_path / "dataset"


def faults(dataset: Path, capsys, *options: str) -> list[str]:
    """The lines that verify prints about faults; the exit code must agree."""
    code = verify.main([str(dataset), "--workers", "1", *options])
    *lines, summary = capsys.readouterr().out.strip().splitlines()
    assert (code, "all is well" in summary) == ((1, False) if lines else (0, True))
    return lines


def edit_manifest(dataset: Path, **changes: object) -> None:
    path = dataset / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_whole_dataset(whole, capsys):
    assert faults(whole, capsys) == []
    assert faults(whole, capsys, "--sample", "0.3") == []


def test_two_workers(whole, capsys):
    assert verify.main([str(whole), "--workers", "2"]) == 0


def test_every_flipped_bit_is_found(dataset, capsys):
    """Wherever it falls: image, label, header, padding or end mark."""
    tar = dataset / "shard-000001.tar"
    data = tar.read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(data), 40):
        changed = bytearray(data)
        changed[position] ^= 1 << int(rng.integers(8))
        tar.write_bytes(changed)
        lines = faults(dataset, capsys)
        assert "shard-000001.tar: its sha256 differs from the manifest's" in lines


def test_flipped_bit_in_an_image_names_the_sample(dataset, capsys):
    opened = open_dataset(dataset)
    index = int(np.flatnonzero(opened.samples["shard"] == 1)[2])
    tar = dataset / "shard-000001.tar"
    data = bytearray(tar.read_bytes())
    data[int(opened.samples[index]["offset"]) + 500] ^= 4
    tar.write_bytes(data)
    lines = faults(dataset, capsys)
    assert any(line.startswith(f"shard-000001.tar: sample {index}: expected crc32 ") for line in lines)


@pytest.mark.parametrize("keep", [0.5, 0.95])
def test_cut_tar(dataset, capsys, keep):
    tar = dataset / "shard-000000.tar"
    data = tar.read_bytes()
    tar.write_bytes(data[: int(len(data) * keep)])
    text = "\n".join(faults(dataset, capsys))
    assert "shard-000000.tar: " in text
    assert "shard-000000.tar: expected " in text
    assert "cut short" in text


def test_missing_shard_and_index(dataset, capsys):
    (dataset / "shard-000001.tar").unlink()
    (dataset / "shard-000002.idx").unlink()
    lines = faults(dataset, capsys)
    assert any(line.startswith("shard-000001.tar: missing") for line in lines)
    assert "shard-000002.idx: missing" in lines
    assert len(lines) == 2


def test_swapped_indexes(dataset, capsys):
    a, b = dataset / "shard-000000.idx", dataset / "shard-000001.idx"
    text = a.read_text()
    a.write_text(b.read_text())
    b.write_text(text)
    lines = faults(dataset, capsys)
    assert [line.split(":")[0] for line in lines] == ["shard-000000.idx", "shard-000001.idx"]


def test_swapped_tars(dataset, capsys):
    a, b, spare = (dataset / name for name in ("shard-000000.tar", "shard-000001.tar", "x"))
    a.rename(spare)
    b.rename(a)
    spare.rename(b)
    text = "\n".join(faults(dataset, capsys))
    assert "shard-000000.tar: its sha256" in text
    assert "shard-000001.idx: not the index" in text


def test_wrong_count(dataset, capsys):
    count = open_dataset(dataset).manifest.num_samples
    edit_manifest(dataset, num_samples=count + 1)
    lines = faults(dataset, capsys)
    assert f"manifest.json: num_samples is {count + 1}, its shards add up to {count}" in lines


def test_changed_table(dataset, capsys):
    path = dataset / "samples.npy"
    samples = np.load(path)
    samples["offset"][3] += 512
    samples["label"][4] = 99
    samples["width"][5] += 1
    samples["offset"][6] = 2**63 + 5
    np.save(path, samples)
    text = "\n".join(faults(dataset, capsys))
    assert "samples.npy: its sha256 differs from the manifest's" in text
    assert "sample 3: no image of the tar has the table's offset and size" in text
    assert "labels outside" in text
    assert "sample 5: expected " in text
    assert "sample 6: reaches past the end of the tar" in text


def test_cut_table(dataset, capsys):
    path = dataset / "samples.npy"
    path.write_bytes(path.read_bytes()[:-40])
    assert "samples.npy is damaged or cut short" in "\n".join(faults(dataset, capsys))


def test_strange_tar_and_missing_names(dataset, capsys):
    (dataset / "shard-000099.tar").write_bytes(b"")
    (dataset / "names.jsonl").write_text('"one"\n')
    text = "\n".join(faults(dataset, capsys))
    assert "shard-000099.tar: a tar that the manifest does not list" in text
    assert "names.jsonl: expected 30 names, found 1" in text
