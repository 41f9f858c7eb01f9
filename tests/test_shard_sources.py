"""Every kind of source gives the images, labels and captions that it holds."""

import gzip
import http.server
import io
import json
import tarfile
import threading
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from patchmill.pipeline.read import remote
from patchmill.pipeline.read.manifest import Dataset, ImageFormat, open_dataset
from patchmill.pipeline.read.tar import walk_tar_file
from patchmill.tools.packing.list_tables import Columns
from patchmill.tools.packing.open_source import list_source
from patchmill.tools.packing.pack_dataset import pack_dataset
from patchmill.tools.packing.strict_decode import read_bytes, read_pixels
from tests.support.photos import make_image_folder, make_photo_crops, photo_crop

CROPS = make_photo_crops(12, seed=3, sides=(40, 80))
CLASSES = sorted({label for label, _ in CROPS})
BY_NAME = {f"{label}/{i:03d}.jpg": data for i, (label, data) in enumerate(CROPS)}


def pack(source: Path | str, tmp_path: Path, columns: Columns | None = None) -> Dataset:
    listing = list_source(str(source), columns or Columns(), tmp_path / "staging")
    pack_dataset(listing, tmp_path / "out")
    return open_dataset(tmp_path / "out")


def contents(dataset: Dataset) -> set[tuple[str, bytes]]:
    """(class name or '', image bytes) of every sample."""
    names = [*dataset.manifest.classes, ""]
    return {(names[int(row["label"])], read_bytes(dataset, i)) for i, row in enumerate(dataset.samples)}


def captions(dataset: Dataset) -> dict[bytes, str]:
    """Image bytes -> caption, from the tars."""
    found = {}
    for shard in dataset.manifest.shards:
        path = dataset.root / shard.name
        data = path.read_bytes()
        members = {m.name: data[m.offset : m.offset + m.size] for m in walk_tar_file(path)}
        for name, content in members.items():
            if name.endswith(".json"):
                found[members[name.replace(".json", ".jpg")]] = json.loads(content)["caption"]
    return found


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_zip(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def labelled_tar(path: Path) -> Path:
    members: dict[str, bytes] = {}
    for i, (label, data) in enumerate(CROPS):
        members |= {
            f"{i:04d}.cls": str(CLASSES.index(label)).encode(),
            f"{i:04d}.jpg": data,
            f"{i:04d}.txt": f"no. {i}".encode(),
        }
    return write_tar(path, members)


EXPECTED = set(CROPS)
NUMBERED = {(str(CLASSES.index(label)), data) for label, data in CROPS}


def test_class_folders(tmp_path):
    dataset = pack(make_image_folder(tmp_path / "in", count=12, seed=3, sides=(40, 80)), tmp_path)
    assert dataset.manifest.classes == CLASSES
    assert contents(dataset) == EXPECTED


def test_flat_folder_has_no_labels(tmp_path):
    (tmp_path / "in").mkdir()
    for i, (_, data) in enumerate(CROPS):
        (tmp_path / "in" / f"{i}.jpg").write_bytes(data)
    dataset = pack(tmp_path / "in", tmp_path)
    assert dataset.manifest.classes == []
    assert contents(dataset) == {("", data) for _, data in CROPS}


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip(tmp_path, compression):
    names = {f"top/{name}": data for name, data in BY_NAME.items()} | {"top/readme.txt": b"x", "__MACOSX/._1.jpg": b"y"}
    dataset = pack(write_zip(tmp_path / "in.zip", names, compression), tmp_path)
    assert dataset.manifest.classes == CLASSES
    assert contents(dataset) == EXPECTED
    assert json.loads((dataset.root / "quarantine.jsonl").read_text())["name"] == "top/readme.txt"


def test_damaged_zip_member_is_left_out(tmp_path):
    path = write_zip(tmp_path / "in.zip", BY_NAME, zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    victim = BY_NAME["rocket/003.jpg"]
    data[data.index(victim) + len(victim) // 2] ^= 1
    path.write_bytes(data)
    dataset = pack(path, tmp_path)
    assert contents(dataset) == EXPECTED - {("rocket", victim)}
    assert "checksum is wrong" in (dataset.root / "quarantine.jsonl").read_text()


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_tar_of_folders(tmp_path, suffix):
    path = write_tar(tmp_path / "in.tar", {f"./{name}": data for name, data in BY_NAME.items()})
    if suffix == ".tar.gz":
        (tmp_path / "in.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert contents(pack(tmp_path / f"in{suffix}", tmp_path)) == EXPECTED


def test_webdataset_tar(tmp_path):
    dataset = pack(labelled_tar(tmp_path / "in.tar"), tmp_path)
    assert contents(dataset) == NUMBERED
    assert captions(dataset) == {data: f"no. {i}" for i, (_, data) in enumerate(CROPS)}


def test_pattern_of_tars(tmp_path):
    for i in range(3):
        write_tar(tmp_path / f"in-{i:02d}.tar", dict(list(BY_NAME.items())[4 * i : 4 * i + 4]))
    assert contents(pack(tmp_path / "in-{00..02}.tar", tmp_path)) == EXPECTED


def test_tars_without_labels_have_none(tmp_path):
    """The name of a shard is no class."""
    for i in range(2):
        write_tar(tmp_path / f"in-{i}.tar", {f"{j}.jpg": CROPS[j][1] for j in range(6 * i, 6 * i + 6)})
    assert contents(pack(tmp_path / "in-*.tar", tmp_path)) == {("", data) for _, data in CROPS}


def test_second_images_and_dotted_names(tmp_path):
    members = {"a.jpg": CROPS[0][1], "a.seg.png": b"mask", "a.cls": b"0", "b.v1.jpg": CROPS[1][1], "b.v1.cls": b"1"}
    dataset = pack(write_tar(tmp_path / "in.tar", members), tmp_path)
    assert contents(dataset) == {("0", CROPS[0][1]), ("1", CROPS[1][1])}
    assert "second image" in (dataset.root / "quarantine.jsonl").read_text()


def test_a_dataset_of_ours_keeps_its_class_names(tmp_path):
    first = pack(make_image_folder(tmp_path / "in", count=12, seed=3, sides=(40, 80)), tmp_path)
    again = pack(first.root, tmp_path / "again")
    assert contents(again) == EXPECTED


def test_tar_by_url(tmp_path, monkeypatch):
    pytest.importorskip("aiohttp", reason="the extra `remote` is not installed")
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.001)
    labelled_tar(tmp_path / "in.tar")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/in.tar"
        assert contents(pack(url, tmp_path)) == NUMBERED
        with pytest.raises(FileNotFoundError) as missing:
            list_source(url.replace("in.tar", "no.tar?token=SECRET"), Columns(), tmp_path / "s2")
        assert "SECRET" not in str(missing.value)
    finally:
        server.shutdown()
        server.server_close()


def test_remote_folder_of_parquet(tmp_path):
    """A dataset repository on the Hugging Face hub is such a folder."""
    fsspec = pytest.importorskip("fsspec", reason="the extra `remote` is not installed")
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    fs = fsspec.filesystem("memory")
    for i, piece in enumerate([CROPS[:5], CROPS[5:]]):
        out = io.BytesIO()
        table = pyarrow.Table.from_pylist([{"image": data, "label": CLASSES.index(label)} for label, data in piece])
        parquet.write_table(table, out)
        fs.pipe_file(f"memory://hub/{tmp_path.name}/data/train-{i}.parquet", out.getvalue())
    assert contents(pack(f"memory://hub/{tmp_path.name}", tmp_path)) == NUMBERED


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_lists(tmp_path, kind):
    make_image_folder(tmp_path / "in", count=12, seed=3, sides=(40, 80))
    files = sorted((tmp_path / "in").rglob("*.jpg"))
    rows = [{"file": str(f.relative_to(tmp_path)), "target": f.parent.name, "text": f"a {f.stem}"} for f in files]
    path = tmp_path / f"list.{kind}"
    if kind == "csv":
        lines = [",".join(rows[0])] + [",".join(row.values()) for row in rows]
        path.write_text("\n".join(lines))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
        import pyarrow

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    dataset = pack(path, tmp_path)
    assert contents(dataset) == EXPECTED
    assert captions(dataset) == {f.read_bytes(): f"a {f.stem}" for f in files}


def test_list_with_missing_file_and_named_columns(tmp_path):
    (tmp_path / "a.jpg").write_bytes(CROPS[0][1])
    (tmp_path / "list.csv").write_text("where,kind\na.jpg,7\nb.jpg,3\n")
    dataset = pack(tmp_path / "list.csv", tmp_path, Columns(path="where", label="kind"))
    assert contents(dataset) == {("7", CROPS[0][1])}
    assert "No such file" in (dataset.root / "quarantine.jsonl").read_text()


@pytest.mark.parametrize("several", [False, True])
def test_hugging_face_parquet(tmp_path, several):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    features = {"info": {"features": {"label": {"names": CLASSES, "_type": "ClassLabel"}}}}
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    schema = pyarrow.schema([("image", image), ("label", pyarrow.int64())], {"huggingface": json.dumps(features)})
    rows = [{"image": {"bytes": data, "path": None}, "label": CLASSES.index(label)} for label, data in CROPS]
    (tmp_path / "data").mkdir()
    for i, piece in enumerate([rows[:5], rows[5:]] if several else [rows]):
        parquet.write_table(pyarrow.Table.from_pylist(piece, schema), tmp_path / "data" / f"train-{i}.parquet")
    dataset = pack(tmp_path if several else tmp_path / "data" / "train-0.parquet", tmp_path)
    assert dataset.manifest.classes == CLASSES
    assert contents(dataset) == EXPECTED


@pytest.mark.parametrize("layout", ["npz", "npy", "channels-first"])
def test_arrays_lose_nothing(tmp_path, layout):
    rng = np.random.default_rng(0)
    images = np.stack([photo_crop(rng, "coffee.png", (32, 32)) for _ in range(10)])
    labels = np.arange(10) % 3
    if layout == "npz":
        np.savez_compressed(tmp_path / "in.npz", images=images, labels=labels)
    else:
        np.save(tmp_path / "in.npy", images if layout == "npy" else images.transpose(0, 3, 1, 2))
        np.save(tmp_path / "in_labels.npy", labels)
    dataset = pack(tmp_path / ("in.npz" if layout == "npz" else "in.npy"), tmp_path)
    assert dataset.manifest.classes == ["0", "1", "2"]
    found = {(int(row["label"]), read_pixels(dataset, i).tobytes()) for i, row in enumerate(dataset.samples)}
    assert found == {(int(label), image.tobytes()) for label, image in zip(labels, images, strict=True)}


@pytest.mark.parametrize("channels", [2, 5, 8])
def test_arrays_of_many_channels_become_tiffs(tmp_path, channels):
    images = np.random.default_rng(0).integers(0, 256, (6, 20, 30, channels), dtype=np.uint8)
    np.save(tmp_path / "in.npy", images)
    dataset = pack(tmp_path / "in.npy", tmp_path)
    assert (dataset.samples["format"] == ImageFormat.TIFF).all()
    assert len(dataset.manifest.mean) == channels
    assert {read_pixels(dataset, i).tobytes() for i in range(6)} == {image.tobytes() for image in images}
    expected = images.reshape(-1, channels).mean(axis=0) / 255
    np.testing.assert_allclose(dataset.manifest.mean, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.zip", b"no zip", "not a readable zip"),
        ("a.tar", b"no tar" * 200, "no tar header"),
        ("a.tar.gz", b"no gzip", "damaged or cut short"),
        ("a.npy", b"no array", "not an array of images"),
        ("a.csv", b"", "has no rows"),
        ("a.csv", b"x,y\n1,2\n", "--path-column"),
        ("a.csv", b"path\nhttp://x/1.jpg\n", "lists URLs"),
        ("a.jsonl", b"{\n", "line 1: not JSON"),
        ("a.pkl", b"", "pickle"),
        ("a.dat", b"", "not of a known kind"),
    ],
)
def test_what_is_no_source_is_named(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        list_source(str(tmp_path / name), Columns(), tmp_path / "staging")
    assert name in str(error.value)


def test_pickled_arrays_are_refused(tmp_path):
    np.save(tmp_path / "in.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="not an array of images"):
        list_source(str(tmp_path / "in.npy"), Columns(), tmp_path / "staging")


def test_commands_are_no_urls(tmp_path):
    with pytest.raises(ValueError, match="pipe: URLs are not opened"):
        list_source("pipe:touch /tmp/no.tar", Columns(), tmp_path)
