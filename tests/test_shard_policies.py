"""Resize, encode, filter, dedupe, subset and split do what they say, and the plan keeps its promises."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from patchmill.pipeline.read.manifest import ImageFormat, open_dataset
from patchmill.tools.packing.listing import labels_from_folders, list_folder
from patchmill.tools.packing.normalise import Policy, normalise, pack_pixels
from patchmill.tools.packing.pack_dataset import pack_dataset
from patchmill.tools.packing.plan import PackOptions, cut_shards, make_plan, shuffle_keys
from patchmill.tools.packing.splits import split_listing
from patchmill.tools.packing.strict_decode import Rejected, decode, read_pixels
from tests.support.faults import png_16, save
from tests.support.photos import COLOUR, GREY, jpeg, make_image_folder, photograph

WIDE = np.ascontiguousarray(photograph("coffee.png")[:300, :500])


@pytest.mark.parametrize(
    ("resize", "size", "expected"),
    [
        ("shorter-side", 100, (100, 167)),
        ("longest-side", 100, (60, 100)),
        ("shorter-side", 300, (300, 500)),
        ("longest-side", 900, (300, 500)),
        ("border", 128, (128, 128)),
    ],
)
@pytest.mark.parametrize("source", ["jpeg", "png"])
def test_resize(resize, size, expected, source):
    data = jpeg(WIDE, 95, "444") if source == "jpeg" else save(WIDE, "PNG")
    packed = normalise(data, Policy(resize=resize, size=size))
    pixels = decode(packed.data, packed.format)
    assert pixels.shape == (*expected, 3)
    assert (packed.height, packed.width) == expected
    if expected == (300, 500):
        assert packed.data == data
    if resize == "border":
        assert not pixels[:20].any() or source == "jpeg"
        pixels = pixels[(128 - 77) // 2 :][:77]
        expected = (77, 128)
    bound = 0.02 if source == "png" else 4.0  # JPEG halves the chroma, and rings at a black border
    reference = np.asarray(Image.fromarray(WIDE).resize(expected[::-1], Image.Resampling.BICUBIC))
    assert np.abs(pixels.astype(int) - reference).mean() < bound


def test_resize_decodes_no_more_than_it_needs():
    """A large JPEG is decoded at a fraction of its scale and still is the antialiased picture."""
    photo = np.ascontiguousarray(np.kron(photograph("chelsea.png")[:288, :448], np.ones((4, 4, 1), np.uint8)))
    packed = normalise(jpeg(photo, 95), Policy(resize="shorter-side", size=72))
    reference = np.asarray(Image.fromarray(photo).resize((112, 72), Image.Resampling.BICUBIC))
    assert np.abs(decode(packed.data, packed.format).astype(int) - reference).mean() < 4


@pytest.mark.parametrize("pixels", [WIDE, photograph("camera.png")], ids=["rgb", "grey"])
def test_encode_jpeg(pixels):
    small = normalise(save(pixels, "PNG"), Policy(encode="jpeg", quality=50))
    large = normalise(jpeg(pixels, 95), Policy(encode="jpeg", quality=90))
    assert small.format == large.format == ImageFormat.JPEG
    assert len(small.data) < len(large.data)
    assert decode(small.data, small.format).ndim == pixels.ndim
    assert np.abs(decode(large.data, large.format).astype(int) - pixels).mean() < 4


def test_filters():
    with pytest.raises(Rejected, match="under --min-size 301") as small:
        normalise(jpeg(WIDE), Policy(min_size=301))
    assert small.value.kind == "policy"
    with pytest.raises(Rejected, match="above --max-pixels 100000"):
        normalise(jpeg(WIDE), Policy(max_pixels=100_000))
    with pytest.raises(Rejected, match="above --max-pixels"):
        normalise(png_16(WIDE.astype(np.uint16)), Policy(max_pixels=100_000))


def test_alpha_is_kept_when_asked():
    rgba = np.dstack([WIDE, WIDE[:, :, 0]])
    packed = normalise(save(rgba, "PNG"), Policy(alpha="keep"))
    np.testing.assert_array_equal(decode(packed.data, packed.format), rgba)
    assert normalise(jpeg(WIDE), Policy(alpha="keep")).format == ImageFormat.JPEG
    np.testing.assert_array_equal(decode(*_of(pack_pixels(rgba, Policy()))), WIDE)


def _of(packed) -> tuple[bytes, ImageFormat]:
    return packed.data, packed.format


def test_duplicates_are_left_out(tmp_path):
    folder = make_image_folder(tmp_path / "in", count=6, sides=(40, 60))
    first = sorted(folder.rglob("*.jpg"))[0]
    (folder / "zz-copy.jpg").write_bytes(first.read_bytes())
    changed = bytearray(first.read_bytes())
    changed[-3] ^= 1  # the same size, other bytes
    (folder / "zz-other.jpg").write_bytes(changed)
    manifest = pack_dataset(list_folder(folder), tmp_path / "out", PackOptions(dedupe=True))
    assert manifest is not None
    entries = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    duplicates = [entry for entry in entries if entry["kind"] == "duplicate"]
    assert duplicates == [
        {"name": "zz-copy.jpg", "kind": "duplicate", "reason": f"same bytes as {first.relative_to(folder)}"}
    ]


def test_subset_is_random_and_stable(tmp_path):
    listing = list_folder(make_image_folder(tmp_path / "in", count=20, sides=(40, 60)))
    all_names = [listing.names[i] for i in make_plan(listing, PackOptions(seed=5)).order]
    plan = make_plan(listing, PackOptions(seed=5, max_samples=7))
    assert [listing.names[i] for i in plan.order] == all_names[:7]


def test_statistics_are_those_of_the_pixels(tmp_path):
    folder = make_image_folder(tmp_path / "in", count=8, sides=(48, 63), names=(*COLOUR[:2], *GREY))
    pack_dataset(list_folder(folder), tmp_path / "out")
    dataset = open_dataset(tmp_path / "out")
    pixels = [read_pixels(dataset, i) for i in range(len(dataset))]
    flat = np.concatenate([np.broadcast_to(np.atleast_3d(p), (*p.shape[:2], 3)).reshape(-1, 3) for p in pixels]) / 255
    np.testing.assert_allclose(dataset.manifest.mean, flat.mean(0), atol=1e-6)
    np.testing.assert_allclose(dataset.manifest.std, flat.std(0), atol=1e-6)
    assert dataset.manifest.statistics["width"]["max"] == dataset.samples["width"].max()


def test_splits_by_folder(tmp_path):
    for split, count in (("train", 12), ("val", 6)):
        make_image_folder(tmp_path / "in" / split, count=count, sides=(40, 60))
    listing = list_folder(tmp_path / "in")
    assert listing.classes == sorted(name.split(".")[0] for name in COLOUR)
    assert "train, val are packed into one dataset" in listing.notes[0]
    pieces = split_listing(listing, ("train", "val"))
    assert {name: len(piece) for name, piece in pieces.items()} == {"train": 12, "val": 6}
    assert pieces["val"].classes == listing.classes
    with pytest.raises(ValueError, match="no folder test; it has: train, val"):
        split_listing(listing, ("train", "test"))


def test_splits_by_share(tmp_path):
    listing = list_folder(make_image_folder(tmp_path / "in", count=40, sides=(30, 40)))
    pieces = split_listing(listing, ("train:0.75", "val:0.25"))
    names = [set(piece.names) for piece in pieces.values()]
    assert names[0] | names[1] == set(listing.names)
    assert not names[0] & names[1]
    assert 20 <= len(names[0]) < 40
    for wrong in (("a:0.9", "b:0.2"), ("a:x",), ("a:1", "b"), ("a:0.5", "a:0.5")):
        with pytest.raises(ValueError, match="--splits"):
            split_listing(listing, wrong)


@pytest.mark.parametrize(
    ("names", "labels", "classes"),
    [
        (["a.jpg", "b.jpg"], [-1, -1], []),
        (["cat/1.jpg", "dog/2.jpg", "dog/deep/3.jpg"], [0, 1, 1], ["cat", "dog"]),
        (["top/cat/1.jpg", "top/dog/2.jpg"], [0, 1], ["cat", "dog"]),
        (["cat/1.jpg", "cat/2.jpg"], [0, 0], ["cat"]),
        (["1.jpg", "cat/2.jpg"], [-1, 0], ["cat"]),
        (["test/cat/1.jpg", "train/cat/2.jpg", "train/dog/3.jpg"], [0, 0, 1], ["cat", "dog"]),
        (["train/cat/1.jpg", "train/dog/2.jpg"], [0, 1], ["cat", "dog"]),
        (["test/1.jpg", "train/2.jpg"], [0, 1], ["test", "train"]),
    ],
)
def test_classes_of_folders(names, labels, classes):
    found, names_of_classes, _ = labels_from_folders(names)
    assert found.tolist() == labels
    assert names_of_classes == classes


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=200), st.integers(1, 20000))
def test_shards_hold_everything_once_and_no_more_than_they_may(sizes, limit):
    starts = cut_shards(np.array(sizes), limit)
    assert starts[0] == 0
    assert starts[-1] == len(sizes)
    assert (np.diff(starts) > 0).all()
    taken = np.array(sizes) + 3 * 512
    for first, end in pairwise(starts):
        assert taken[first:end].sum() <= limit or end - first == 1
        if end < len(sizes):
            assert taken[first : end + 1].sum() > limit


def test_shuffle_is_a_documented_hash():
    assert shuffle_keys(["cat/1.jpg"], 7).tolist() == [_documented("cat/1.jpg", 7)]
    order = np.argsort(shuffle_keys([str(i) for i in range(4000)], 1))
    ranks = np.corrcoef(order, np.arange(4000))[0, 1]
    assert abs(ranks) < 0.05


def _documented(name: str, seed: int) -> int:
    import hashlib

    return int.from_bytes(
        hashlib.blake2b(name.encode(), digest_size=8, key=seed.to_bytes(8, "little")).digest(), "little"
    )


def test_linked_folders_are_followed_once(tmp_path):
    folder = make_image_folder(tmp_path / "in", count=3, sides=(40, 50))
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    names = list_folder(folder).names
    assert sorted(Path(name).name for name in names) == ["00000.jpg", "00001.jpg", "00002.jpg"]
