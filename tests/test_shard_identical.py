"""The same images and options give the same bytes: for any number of workers, parts and engines, and after kills."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from patchmill.tools import merge, shard
from patchmill.tools.packing.listing import list_folder
from patchmill.tools.packing.pack_dataset import pack_dataset
from patchmill.tools.packing.plan import PackOptions
from patchmill.tools.packing.workers import pack_on_ray
from tests.support.photos import make_image_folder

OPTIONS = PackOptions(seed=7, shard_size_mb=0.04)


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """60 photographs and three files that are none."""
    folder = make_image_folder(tmp_path_factory.mktemp("identical") / "images", count=60)
    for i in range(3):
        (folder / "rocket" / f"bad{i}.jpg").write_bytes(b"\xff\xd8\xff" + bytes(i))
    return folder


@pytest.fixture(scope="module")
def expected(images, tmp_path_factory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("expected") / "out"
    manifest = pack_dataset(list_folder(images), out, OPTIONS)
    assert manifest is not None
    assert len(manifest.shards) > 8
    return digests(out)


@pytest.mark.parametrize("workers", [2, 4])
def test_any_number_of_workers(images, expected, tmp_path, workers):
    pack_dataset(list_folder(images), tmp_path / "out", OPTIONS, workers=workers)
    assert digests(tmp_path / "out") == expected
    assert not (tmp_path / "out.partial").exists()


def test_parts_and_merge(images, expected, tmp_path):
    out = str(tmp_path / "out")
    common = [str(images), out, "--seed", "7", "--shard-size-mb", "0.04", "--workers", "1"]
    for part in ("2/3", "0/3"):
        assert shard.main([*common, "--part", part]) == 0
    with pytest.raises(ValueError, match="shards are not packed yet"):
        merge.main([out])
    assert not Path(out).exists()
    assert shard.main([*common, "--part", "1/3"]) == 0
    assert merge.main([out]) == 0
    assert digests(Path(out)) == expected


def test_ray(images, expected, tmp_path):
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    pack_dataset(list_folder(images), tmp_path / "out", OPTIONS, engine=pack_on_ray)
    assert digests(tmp_path / "out") == expected


def test_order_of_listing_does_not_matter(images, expected, tmp_path, monkeypatch):
    scandir = os.scandir

    class Shuffled:
        def __init__(self, path):
            self.children = list(scandir(path))
            random.Random(1).shuffle(self.children)

        def __enter__(self):
            return iter(self.children)

        def __exit__(self, *exception):
            pass

    monkeypatch.setattr(os, "scandir", Shuffled)
    pack_dataset(list_folder(images), tmp_path / "out", OPTIONS)
    assert digests(tmp_path / "out") == expected


def test_resume_after_sigkill(images, expected, tmp_path):
    """Three kills at random moments of the packing itself, then a run to the end."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "patchmill.tools.cli", "shard", str(images), str(out)]
    command += ["--seed", "7", "--shard-size-mb", "0.04", "--workers", "2"]
    parts = tmp_path / "out.partial" / "parts"
    rng = random.Random(time.time_ns())
    kept = 0
    for _ in range(3):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        more = kept + rng.randrange(1, 3)
        while process.poll() is None and len(list(parts.glob("*.json"))) < more:
            time.sleep(0.0005)
        time.sleep(rng.random() * 0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept = len(list(parts.glob("*.json")))
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert digests(out) == expected


def test_damaged_leftovers_are_packed_again(images, expected, tmp_path):
    """A resumed run trusts no file: cut tars, changed indexes and lost records are found by their checksums."""
    out = tmp_path / "out"
    listing = list_folder(images)
    pack_dataset(listing, out, OPTIONS, part=(0, 2))
    partial = tmp_path / "out.partial"
    tar, index, record = (
        partial / name for name in ("shard-000000.tar", "shard-000002.idx", "parts/shard-000004.json")
    )
    tar.write_bytes(tar.read_bytes()[:-2000])
    index.write_text("v1.2 0\n")
    record.unlink()
    (partial / "shard-000001.tar.999.tmp").write_bytes(b"half")
    pack_dataset(listing, out, OPTIONS)
    assert digests(out) == expected


def test_another_seed_is_another_order(images, expected, tmp_path):
    pack_dataset(list_folder(images), tmp_path / "out", PackOptions(seed=8, shard_size_mb=0.04))
    names = (tmp_path / "out" / "names.jsonl").read_text()
    assert hashlib.sha256(names.encode()).hexdigest() != expected["names.jsonl"]
    assert len(set(map(json.loads, names.splitlines()))) == 60


def test_killed_between_rename_and_cleaning(images, expected, tmp_path):
    """What only served the making is removed when the finished dataset is met again."""
    out = tmp_path / "out"
    listing = list_folder(images)
    pack_dataset(listing, out, OPTIONS)
    (out / "parts").mkdir()
    (out / "plan.json").write_text("{}")
    assert pack_dataset(listing, out, OPTIONS) is not None
    assert digests(out) == expected


def test_interrupt_leaves_no_process_and_resumes(images, expected, tmp_path):
    """Ctrl-C reaches every process of the group; none stays, and the same command finishes."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "patchmill.tools.cli", "shard", str(images), str(out)]
    command += ["--seed", "7", "--shard-size-mb", "0.04", "--workers", "2"]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (tmp_path / "out.partial" / "parts").exists():
        time.sleep(0.001)
    time.sleep(random.Random(time.time_ns()).random())  # while workers start, or pack
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate()  # the pipe is closed when the last process is gone
    if process.returncode not in (0, -signal.SIGINT):  # else it was done, or the interpreter was already leaving
        assert process.returncode == 130
        assert "Traceback" not in stderr
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert digests(out) == expected
