"""Faulty and unusual files: each is packed to its documented pixels or left out with its reason; nothing stops."""

import json

import numpy as np
import pytest

from patchmill.pipeline.config import DataConfig, MaskConfig
from patchmill.pipeline.loader import build_loader
from patchmill.pipeline.read.manifest import QUARANTINE_NAME, ImageFormat, open_dataset
from patchmill.tools.packing.listing import list_folder
from patchmill.tools.packing.normalise import Packed, Policy, normalise
from patchmill.tools.packing.pack_dataset import pack_dataset
from patchmill.tools.packing.strict_decode import Rejected, decode, read_bytes
from patchmill.tools.verify import verify
from tests.support.faults import Case, all_cases, write_folder

CASES = all_cases()


def mean_difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(np.int32) - b.astype(np.int32)).mean())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("want_pixels", [True, False])
def test_verdict(case: Case, want_pixels: bool):
    if case.pixels is None:
        with pytest.raises(Rejected) as rejected:
            normalise(case.data, Policy(), want_pixels=want_pixels)
        assert rejected.value.reason.startswith(case.reason)
        assert rejected.value.kind == "bad"
        return
    packed = normalise(case.data, Policy(), want_pixels=want_pixels)
    pixels = decode(packed.data, packed.format)
    assert pixels.shape == case.pixels.shape
    assert (packed.height, packed.width) == pixels.shape[:2]
    assert mean_difference(pixels, case.pixels) <= case.tolerance
    check_form(packed)


def check_form(packed: Packed):
    """Only what every decoder reads alike: baseline JPEG to its last byte, or plain 8-bit PNG."""
    if packed.format == ImageFormat.JPEG:
        assert packed.data[:2] == b"\xff\xd8"
        assert packed.data[-2:] == b"\xff\xd9"
        assert b"\xff\xc2" not in packed.data[: packed.data.index(b"\xff\xda")]
    else:
        assert packed.format == ImageFormat.PNG
        assert packed.data[24] == 8
        assert packed.data[25] in (0, 2)


def test_folder_is_packed_and_verified(tmp_path):
    folder = write_folder(tmp_path / "in", CASES)
    (folder / "notes.txt").write_text("no image by its name")
    (folder / "dangling.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "a-folder.jpg").mkdir()
    out = tmp_path / "out"
    manifest = pack_dataset(list_folder(folder), out)
    expected_out = {case.name for case in CASES if case.pixels is None} | {"notes.txt", "dangling.jpg"}
    left_out = {entry["name"]: entry for entry in map(json.loads, (out / QUARANTINE_NAME).read_text().splitlines())}
    assert set(left_out) == expected_out
    assert left_out["dangling.jpg"]["reason"].startswith("cannot be read: No such file")
    assert left_out["notes.txt"]["kind"] == "ignored"
    assert manifest is not None
    assert manifest.num_samples == sum(case.pixels is not None for case in CASES)
    assert [fault for faults in verify(out, manifest, 1.0, 0, 1) for fault in faults] == []


def test_table_holds_what_was_packed(tmp_path):
    cases = [case for case in CASES if case.pixels is not None]
    out = tmp_path / "out"
    pack_dataset(list_folder(write_folder(tmp_path / "in", cases)), out)
    dataset = open_dataset(out)
    names = [json.loads(line) for line in (out / "names.jsonl").read_text().splitlines()]
    by_name = {case.name: case for case in cases}
    for i, name in enumerate(names):
        row, case = dataset.samples[i], by_name[name]
        assert case.pixels is not None
        assert (row["height"], row["width"]) == case.pixels.shape[:2]
        pixels = decode(read_bytes(dataset, i), ImageFormat(row["format"]))
        assert mean_difference(pixels, case.pixels) <= case.tolerance


@pytest.mark.parametrize("decoder", ["cpu", "dali"])
def test_loader_needs_no_replacement(tmp_path, decoder):
    """Training reads what was packed of all these files without one sample that it must replace."""
    if decoder == "dali":
        pytest.importorskip("nvidia.dali", reason="the extra `dali` is not installed")
    pack_dataset(list_folder(write_folder(tmp_path / "in", CASES)), tmp_path / "out")
    config = DataConfig(path=str(tmp_path / "out"), decoder=decoder, workers=1)
    with build_loader(
        config, image_size=32, patch_size=16, channels=3, mask=MaskConfig(), seed=0, global_batch=1
    ) as loader:
        seen = {int(next(loader).sample_ids[0]) for _ in range(loader.steps_per_epoch)}
        assert loader.bad_samples == 0
    assert seen == set(range(len(open_dataset(tmp_path / "out"))))
