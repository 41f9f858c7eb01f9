"""What a user can get wrong, and what a disk can: one clear message, exit code 2, nothing half-written."""

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from patchmill.pipeline.read.tar import ShardWriter
from patchmill.tools.cli import run
from patchmill.tools.packing.destination import LocalStore
from patchmill.tools.packing.join import read_part
from patchmill.tools.packing.listing import list_folder
from patchmill.tools.packing.pack_dataset import pack_dataset
from patchmill.tools.packing.plan import PackOptions, part_name
from tests.support.photos import jpeg, make_image_folder, photograph


@pytest.fixture
def images(tmp_path) -> Path:
    return make_image_folder(tmp_path / "in", count=12, sides=(40, 60))


def fails(capsys, *argv: str | Path) -> str:
    """The message of a command that ends with exit code 2."""
    assert run("shard", [str(arg) for arg in argv]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


def test_missing_source(tmp_path, capsys):
    assert f"no {tmp_path / 'nowhere'}: give a folder" in fails(capsys, tmp_path / "nowhere", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_size_without_resize(images, tmp_path, capsys):
    assert "--size 64 needs --resize" in fails(capsys, images, tmp_path / "out", "--size", "64")


def test_beton_over_a_folder(images, tmp_path, capsys):
    assert "is a folder and --format beton writes a file" in fails(capsys, images, images, "--format", "beton")
    assert list(tmp_path.iterdir()) == [images]


def test_empty_folder(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    assert "no image in" in fails(capsys, tmp_path / "in", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_folder_without_images(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").write_text("hello")
    assert "(1 other files)" in fails(capsys, tmp_path / "in", tmp_path / "out")


def test_no_image_can_be_packed(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / "in" / f"{i}.jpg").write_bytes(b"<html>")
    message = fails(capsys, tmp_path / "in", tmp_path / "out", "--max-bad-fraction", "1")
    assert "none of the 3 images can be packed" in message
    assert "this is an HTML page" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_too_many_bad_images(images, tmp_path, capsys):
    for i in range(4):
        (images / f"bad{i}.jpg").write_bytes(b"")
    common = (images, tmp_path / "out", "--shard-size-mb", "0.02", "--workers", "1")
    message = fails(capsys, *common, "--max-bad-fraction", "0.2")
    assert "of 16 images are bad, above --max-bad-fraction 0.2" in message
    assert not (tmp_path / "out").exists()
    assert run("shard", [*map(str, common), "--max-bad-fraction", "0.25"]) == 0


def test_output_is_not_empty(images, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    assert "is not empty" in fails(capsys, images, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "precious"
    assert "is a file" in fails(capsys, images, tmp_path / "out" / "mine")


def test_output_may_be_an_empty_folder(images, tmp_path):
    (tmp_path / "out").mkdir()
    assert run("shard", [str(images), str(tmp_path / "out")]) == 0


def test_output_is_another_dataset(images, tmp_path, capsys):
    assert run("shard", [str(images), str(tmp_path / "out")]) == 0
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    assert "holds a dataset of other images or options" in fails(capsys, images, tmp_path / "out", "--seed", "1")
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
    assert run("shard", [str(images), str(tmp_path / "out")]) == 0
    assert "already packed" in capsys.readouterr().out


def test_unfinished_run_of_another_plan(images, tmp_path, capsys):
    pack_dataset(list_folder(images), tmp_path / "out", PackOptions(seed=1), part=(0, 2))
    assert "is an unfinished run with other images or options" in fails(capsys, images, tmp_path / "out")


def test_output_cannot_be_made(images, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "cannot make" in fails(capsys, images, tmp_path / "file" / "out")


@pytest.mark.parametrize(
    "options",
    [
        ["--shard-size-mb", "0"],
        ["--seed", "-1"],
        ["--workers", "-1"],
        ["--resize", "border"],
        ["--quality", "101"],
        ["--max-samples", "-1"],
        ["--max-bad-fraction", "2"],
        ["--part", "3/3"],
        ["--part", "x"],
        ["--splits", "train", "train"],
        ["--splits", "nowhere"],
        ["--format", "beton", "--part", "0/2"],
    ],
    ids=" ".join,
)
def test_options_that_cannot_be(images, tmp_path, capsys, options):
    assert options[0] in fails(capsys, images, tmp_path / "out", *options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_unknown_option(images, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        run("shard", [str(images), str(tmp_path / "out"), "--colour", "red"])
    assert exit.value.code == 2
    assert "--colour" in capsys.readouterr().err


@pytest.mark.parametrize("whole_shards", [0, 2])
def test_disk_full(images, tmp_path, capsys, monkeypatch, whole_shards):
    """No half shard stays; what is whole is resumed once there is room."""
    written = ShardWriter.finish
    finished: list[ShardWriter] = []

    def finish(writer: ShardWriter) -> tuple[str, str]:
        if len(finished) == whole_shards:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finished.append(writer)
        return written(writer)

    monkeypatch.setattr(ShardWriter, "finish", finish)
    argv = (images, tmp_path / "out", "--shard-size-mb", "0.01", "--workers", "1")
    message = fails(capsys, *argv)
    assert "no space left" in message
    left = sorted(path.name for path in tmp_path.rglob("*") if path.is_file() and path.suffix in (".tmp", ".tar"))
    assert left == [f"shard-{i:06d}.tar" for i in range(whole_shards)]
    assert (tmp_path / "out.partial").exists() == bool(whole_shards)
    monkeypatch.undo()
    assert run("shard", [str(arg) for arg in argv]) == 0
    assert not (tmp_path / "out.partial").exists()


def test_file_size_limit_in_workers(tmp_path):
    """The same from the system itself (EFBIG), in worker processes."""
    images = make_image_folder(tmp_path / "in", count=40, sides=(150, 200))
    command = [sys.executable, "-m", "patchmill.tools.cli", "shard", str(images), str(tmp_path / "out")]
    result = subprocess.run(
        [*command, "--shard-size-mb", "0.2", "--workers", "2"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert result.returncode == 2
    assert "no space left" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_bombs_cost_nothing(tmp_path):
    """An image that claims four gigapixels is refused by its header: the process stays small."""
    data = jpeg(np.ascontiguousarray(photograph("coffee.png")[:64, :64]))
    at = data.index(b"\xff\xc0")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "bomb.jpg").write_bytes(data[: at + 5] + b"\xff\xdc\xff\xdc" + data[at + 9 :])
    (tmp_path / "in" / "good.jpg").write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pack_dataset(list_folder(tmp_path / "in"), tmp_path / "out")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes
    assert "65500 x 65500 pixels" in (tmp_path / "out" / "quarantine.jsonl").read_text()


def test_a_part_record_cannot_name_a_file_outside_the_dataset(tmp_path):
    store = LocalStore(tmp_path / "out", tmp_path / "out.partial")
    store.create()
    store.write_text(part_name(0), json.dumps({"name": "../kept.tar", "rows": []}))
    with pytest.raises(ValueError, match=r"parts/shard-000000\.json names a shard '../kept\.tar'"):
        read_part(store, 0)
