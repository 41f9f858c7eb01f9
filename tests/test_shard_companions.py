"""index, merge, convert, info and buckets: what stands around packing."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from patchmill.pipeline.read.manifest import Dataset, open_dataset
from patchmill.tools import convert, index, info, merge, shard, verify
from patchmill.tools.packing.list_tables import Columns
from patchmill.tools.packing.listing import list_folder
from patchmill.tools.packing.open_source import list_source
from patchmill.tools.packing.pack_dataset import pack_dataset
from patchmill.tools.packing.plan import PackOptions
from patchmill.tools.packing.strict_decode import read_bytes, read_pixels
from tests.support.faults import exif, save, with_exif
from tests.support.photos import jpeg, make_dataset, make_image_folder, make_photo_crops, photograph

CROPS = make_photo_crops(12, seed=3, sides=(40, 80))


def contents(dataset: Dataset) -> set[tuple[str, bytes]]:
    names = [*dataset.manifest.classes, ""]
    return {(names[int(row["label"])], read_bytes(dataset, i)) for i, row in enumerate(dataset.samples)}


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            tar_info = tarfile.TarInfo(name)
            tar_info.size = len(data)
            tar.addfile(tar_info, io.BytesIO(data))
    return path


def test_index_of_foreign_tars(tmp_path):
    """Tars by another program: read in place, bad images kept out of the table, tars untouched."""
    labels = sorted({label for label, _ in CROPS})
    members: dict[str, bytes] = {}
    for i, (label, data) in enumerate(CROPS):
        members |= {f"{i:04d}.jpeg": data, f"{i:04d}.cls": str(labels.index(label)).encode()}
    turned = with_exif(jpeg(np.ascontiguousarray(photograph("coffee.png")[:40, :60])), exif(6))
    members |= {"0100.jpg": turned, "0100.cls": b"0", "0101.jpg": CROPS[0][1][:-300], "0101.cls": b"1"}
    folder = tmp_path / "tars"
    folder.mkdir()
    path = write_tar(folder / "a.tar", members)
    write_tar(folder / "b.tar", {"0001.png": save(photograph("chelsea.png")[:30, :50], "PNG")})
    before = path.read_bytes()
    assert index.main([str(folder), "--workers", "1"]) == 0
    assert path.read_bytes() == before
    assert verify.main([str(folder)]) == 0
    dataset = open_dataset(folder)
    assert len(dataset) == 14
    row = dataset.samples[12]
    assert (row["height"], row["width"]) == (60, 40)
    assert dataset.samples[13]["label"] == -1
    assert "0101.jpg" in (folder / "quarantine.jsonl").read_text()
    assert (folder / "a.idx").read_text().startswith("v1.2 14\njpeg 512 ")
    with pytest.raises(ValueError, match="give --overwrite"):
        index.main([str(folder)])
    (folder / "samples.npy").write_bytes(b"")
    assert index.main([str(folder), "--overwrite", "--workers", "2"]) == 0
    assert len(open_dataset(folder)) == 14


def test_verify_of_indexed_tars(tmp_path):
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "a.tar", {f"{i}.jpg": data for i, (_, data) in enumerate(CROPS)})
    assert index.main([str(tmp_path / "tars")]) == 0
    assert verify.main([str(tmp_path / "tars")]) == 0


def test_index_names_a_damaged_tar(tmp_path):
    write_tar(tmp_path / "good.tar", {"1.jpg": CROPS[0][1]})
    bad = write_tar(tmp_path / "bad.tar", {"1.jpg": CROPS[0][1], "2.jpg": CROPS[1][1]})
    bad.write_bytes(bad.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"bad\.tar .*--skip-damaged"):
        index.main([str(tmp_path)])
    assert not (tmp_path / "manifest.json").exists()
    assert index.main([str(tmp_path), "--skip-damaged"]) == 0
    assert [s.name for s in open_dataset(tmp_path).manifest.shards] == ["good.tar"]


def test_index_rebuilds_what_shard_wrote(tmp_path):
    dataset = make_dataset(tmp_path, count=12, sides=(40, 60), shard_size_mb=0.02)
    before = {name: (dataset / name).read_bytes() for name in ("samples.npy", "shard-000000.idx")}
    (dataset / "samples.npy").unlink()
    assert index.main([str(dataset), "--overwrite"]) == 0
    assert before == {name: (dataset / name).read_bytes() for name in before}
    assert open_dataset(dataset).manifest.classes == sorted(
        {"astronaut", "chelsea", "coffee", "motorcycle_left", "retina", "rocket"}
    )


def test_merge_of_datasets(tmp_path):
    paths = [
        make_dataset(tmp_path / str(seed), count=12, seed=seed, sides=(40, 60), shard_size_mb=0.02) for seed in (1, 2)
    ]
    out = tmp_path / "all"
    assert merge.main([str(out), *map(str, paths)]) == 0
    assert verify.main([str(out)]) == 0
    joined, parts = open_dataset(out), [open_dataset(path) for path in paths]
    assert contents(joined) == contents(parts[0]) | contents(parts[1])
    assert [shard.sha256 for shard in joined.manifest.shards] == [
        s.sha256 for part in parts for s in part.manifest.shards
    ]
    pixels = np.concatenate([read_pixels(joined, i).reshape(-1, 3) for i in range(24)]) / 255
    np.testing.assert_allclose(joined.manifest.mean, pixels.mean(0), atol=1e-6)


def test_merge_refuses_other_classes(tmp_path):
    a = make_dataset(tmp_path / "a", count=6, sides=(40, 60))
    b = make_dataset(tmp_path / "b", count=6, sides=(40, 60), names=("coffee.png",))
    with pytest.raises(ValueError, match="differ in their classes"):
        merge.main([str(tmp_path / "all"), str(a), str(b)])
    with pytest.raises(ValueError, match="is not an unfinished dataset"):
        merge.main([str(tmp_path / "none")])


@pytest.mark.parametrize("kind", ["folder", "beton"])
def test_convert_and_back(request, tmp_path, kind):
    if kind == "beton":
        request.getfixturevalue("ffcv")
    folder = make_image_folder(tmp_path / "in", count=12, sides=(40, 80))
    (folder / "rocket" / "lossless.png").write_bytes(save(photograph("coffee.png")[:50, :70], "PNG"))
    pack_dataset(list_folder(folder), tmp_path / "dataset")
    there = tmp_path / ("there.beton" if kind == "beton" else "there")
    assert convert.main([str(tmp_path / "dataset"), str(there)]) == 0
    pack_dataset(list_source(str(there), Columns(), tmp_path / "staging"), tmp_path / "back")
    first, back = open_dataset(tmp_path / "dataset"), open_dataset(tmp_path / "back")

    def seen(dataset: Dataset) -> set[tuple[int, bytes]]:
        return {(int(row["label"]), read_pixels(dataset, i).tobytes()) for i, row in enumerate(dataset.samples)}

    assert seen(back) == seen(first)
    if kind == "folder":
        assert contents(back) == contents(first)
    with pytest.raises(ValueError, match="exists already"):
        convert.main([str(tmp_path / "dataset"), str(there)])


def test_beton_is_read_by_ffcv(ffcv, tmp_path):
    from ffcv.reader import Reader

    folder = make_image_folder(tmp_path / "in", count=8, sides=(40, 80))
    out = tmp_path / "out.beton"
    assert shard.main([str(folder), str(out), "--format", "beton"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out.beton"]
    reader = Reader(str(out))
    assert reader.num_samples == 8
    assert reader.field_names == ["image", "label"]
    data = out.read_bytes()
    sizes = dict(zip(reader.alloc_table["ptr"].tolist(), reader.alloc_table["size"].tolist(), strict=True))
    found = {data[p : p + sizes[p]] for p in reader.metadata["f0"]["data_ptr"].tolist()}
    assert found == {path.read_bytes() for path in folder.rglob("*.jpg")}


@pytest.mark.parametrize("option", [("--sheet", "sheet.txt"), ("--classes", "-1"), ("--images", "0")])
def test_info_refuses_before_it_says_anything(option, tmp_path, capsys):
    with pytest.raises(ValueError, match=option[0]):
        info.main([str(tmp_path), *option])
    assert capsys.readouterr().out == ""


def test_contact_sheet(tmp_path, capsys):
    dataset = make_dataset(tmp_path, count=10, sides=(40, 300))
    assert info.main([str(dataset), "--sheet", str(tmp_path / "sheet.png"), "--images", "6"]) == 0
    out = capsys.readouterr().out
    for what in ("10", "astronaut", "JPEG", "shorter side"):
        assert what in out
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet)
    assert pixels.shape == (2 * (128 + 14 + 4) + 4, 3 * (128 + 4) + 4, 3)
    assert pixels.std() > 30


def test_output_in_a_bucket(tmp_path):
    """The bytes in a bucket are those of a local folder; an unfinished run is resumed there too."""
    fsspec = pytest.importorskip("fsspec", reason="the extra `remote` is not installed")
    listing = list_folder(make_image_folder(tmp_path / "in", count=24, sides=(40, 60)))
    options = PackOptions(shard_size_mb=0.02)
    pack_dataset(listing, tmp_path / "out", options)
    expected = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / "out").iterdir()}
    url = f"memory://bucket-{tmp_path.name}/out"
    fs = fsspec.filesystem("memory")
    assert pack_dataset(listing, url, options, part=(0, 2)) is None
    assert not fs.exists(f"{url}/manifest.json")
    pack_dataset(listing, url, options)
    found = {p.rpartition("/")[2]: hashlib.sha256(fs.cat_file(p)).hexdigest() for p in fs.find(url)}
    assert found == expected
    assert pack_dataset(listing, url, options) is not None
    with pytest.raises(ValueError, match="holds a dataset of other images or options"):
        pack_dataset(listing, url, PackOptions(seed=1))
    fs.pipe_file("memory://foreign/out/file", b"x")
    with pytest.raises(ValueError, match="is not empty"):
        pack_dataset(listing, "memory://foreign/out", options)
    with pytest.raises(ValueError, match="cannot be written"):
        pack_dataset(listing, "https://example.org/out", options)


def test_names_are_kept(tmp_path):
    dataset = open_dataset(make_dataset(tmp_path, count=6, sides=(40, 60)))
    names = [json.loads(line) for line in (dataset.root / "names.jsonl").read_text().splitlines()]
    for i, name in enumerate(names):
        assert read_bytes(dataset, i) == (tmp_path / "images" / name).read_bytes()
