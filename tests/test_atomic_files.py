"""Files and folders that appear complete or not at all: errors, kills, and the flushes that a power cut needs."""

import errno
import os
import signal
import stat
from pathlib import Path

import pytest

from patchmill.pipeline import atomic
from patchmill.pipeline.atomic import whole_file, whole_folder, write_whole
from patchmill.tools.packing.destination import store_at
from patchmill.trainer.checkpoints import checkpoint


class Stopped(Exception):
    """Ends a block early."""


def write_file(final: Path, text: str) -> None:
    with whole_file(final) as path:
        path.write_text(text)


def write_shared_file(final: Path, text: str) -> None:
    with whole_file(final, shared=True) as path:
        path.write_text(text)


def write_folder(final: Path, text: str) -> None:
    with whole_folder(final, replace=True) as path:
        (path / "inner").mkdir()
        (path / "inner" / "a").write_text(text)


WRITERS = [write_file, write_shared_file, write_folder, write_whole]


def content(final: Path) -> str:
    return (final / "inner" / "a" if final.is_dir() else final).read_text()


@pytest.fixture
def flushed(monkeypatch):
    """What was flushed and renamed, in order: ("flush", path at that time), ("rename", new path)."""
    done: list[tuple[str, Path]] = []
    fsync, replace, rename = os.fsync, Path.replace, Path.rename

    def record_flush(descriptor):
        done.append(("flush", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def record(move):
        def call(self, target):
            done.append(("rename", Path(target)))
            return move(self, target)

        return call

    monkeypatch.setattr(os, "fsync", record_flush)
    monkeypatch.setattr(Path, "replace", record(replace))
    monkeypatch.setattr(Path, "rename", record(rename))
    return done


@pytest.mark.parametrize("write", WRITERS)
def test_content_is_flushed_before_the_rename_and_the_name_after(write, tmp_path, flushed):
    final = tmp_path / "out"
    write(final, "new")
    assert content(final) == "new"
    (renamed,) = (i for i, (what, _) in enumerate(flushed) if what == "rename")
    before = [path.name for _, path in flushed[:renamed]]
    assert flushed[renamed] == ("rename", final)
    assert flushed[renamed + 1 :] == [("flush", tmp_path)]
    hidden = f".out.{os.getpid()}.tmp" if write is write_shared_file else ".out.tmp"
    assert before == ([hidden] if write is not write_folder else [*sorted(["inner", "a"], reverse=True), hidden])
    assert list(tmp_path.iterdir()) == [final]


def test_a_folder_of_very_many_files_is_flushed_at_one_go(tmp_path, flushed, monkeypatch):
    monkeypatch.setattr(atomic, "MANY_FILES", 2)
    monkeypatch.setattr(os, "sync", lambda: flushed.append(("flush", Path("everything"))))
    write_folder(tmp_path / "out", "new")
    assert [path.name for _, path in flushed] == ["everything", "out", tmp_path.name]


@pytest.mark.parametrize("write", WRITERS)
def test_a_flush_that_fails_leaves_the_old_content(write, tmp_path, monkeypatch):
    final = tmp_path / "out"
    write(final, "old")

    def broken(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        write(final, "new")
    assert content(final) == "old"
    assert list(tmp_path.iterdir()) == [final]


def test_a_file_system_that_cannot_flush_a_folder_is_no_error(tmp_path, monkeypatch):
    fsync = os.fsync

    def files_only(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    write_folder(tmp_path / "out", "new")
    assert content(tmp_path / "out") == "new"


@pytest.mark.parametrize("write", [write_file, write_shared_file, write_folder])
def test_an_error_while_writing_keeps_the_old_content_and_removes_the_temporary(write, tmp_path, monkeypatch):
    final = tmp_path / "out"
    write(final, "old")
    written = Path.write_text

    def stop(path, text):
        written(path, text[:2])
        raise Stopped

    monkeypatch.setattr(Path, "write_text", stop)
    with pytest.raises(Stopped):
        write(final, "new")
    assert content(final) == "old"
    assert list(tmp_path.iterdir()) == [final]


def test_a_folder_with_content_is_not_replaced_unasked(tmp_path):
    final = tmp_path / "out"
    final.mkdir()
    with whole_folder(final) as path:  # an empty one is
        (path / "a").write_text("old")
    with pytest.raises(ValueError, match="not empty; choose another --out"), whole_folder(final):
        raise AssertionError("the block must not run")
    assert (final / "a").read_text() == "old"


@pytest.mark.parametrize("write", WRITERS)
def test_a_kill_between_writing_and_renaming_leaves_the_old_content(write, tmp_path):
    final = tmp_path / "out"
    if write is not write_folder:  # a folder has to be deleted before another takes its name
        write(final, "old")
    child = os.fork()
    if child == 0:
        try:
            kill = lambda *args: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
            Path.replace = kill  # type: ignore[method-assign, assignment]
            Path.rename = kill  # type: ignore[method-assign, assignment]
            write(final, "new")
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not final.exists() if write is write_folder else content(final) == "old"
    (left,) = (path for path in tmp_path.iterdir() if path != final)
    assert left.name.startswith(".out.")
    assert left.name.endswith(".tmp")
    write(final, "new")  # starts over
    assert content(final) == "new"
    assert left.exists() == (write is write_shared_file)


def test_a_checkpoint_is_flushed_with_its_folder(tmp_path, flushed):
    snapshot = checkpoint.Snapshot({"format": "patchmill"}, {}, {}, {})
    path = checkpoint.write(tmp_path, 1, snapshot)
    names = {path.name for what, path in flushed if what == "flush"}
    assert names == {*checkpoint.FILES, checkpoint.SUMS, ".step-00000001.tmp", "checkpoints"}
    assert flushed[-2:] == [("rename", path), ("flush", path.parent)]


def test_a_shard_is_flushed_before_it_gets_its_name(tmp_path, flushed):
    store = store_at(tmp_path / "out")
    store.create()
    with store.writing("shard-000000.tar") as file:
        file.write(b"samples")
    root = tmp_path / "out.partial"
    unfinished = root / f".shard-000000.tar.{os.getpid()}.tmp"
    assert flushed == [("flush", unfinished), ("rename", root / "shard-000000.tar"), ("flush", root)]
    store.publish()
    assert flushed[-1] == ("flush", tmp_path)
    assert (tmp_path / "out" / "shard-000000.tar").read_bytes() == b"samples"
