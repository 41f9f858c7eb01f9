"""Writes files and folders that appear under their name only when they are complete and on disk.

What is written gets a hidden temporary name (`.NAME.tmp`) in the same folder. At the end it is flushed to the disk,
renamed, and the folder that holds the new name is flushed too: without the first flush a power cut can leave an empty
file under the final name, without the second it can undo the rename. An error removes the temporary; a killed process
leaves it, and the next writer of that name starts over.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MANY_FILES = 1000  # above this, one flush of the whole machine is quicker than one for each file


@contextmanager
def whole_file(final: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yields a path to write to; renames it to `final` at the end, or removes it after an error.

    Args:
        shared: several processes may write this file at the same time. Each then has a temporary file with its process
            number in the name, which a later process does not clean up.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    unfinished = final.with_name(f".{final.name}.{os.getpid()}.tmp" if shared else f".{final.name}.tmp")
    try:
        yield unfinished
        sync(unfinished)
        unfinished.replace(final)
        sync(final.parent)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def whole_folder(final: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields a new folder to fill; renames it to `final` at the end, or removes it after an error.

    Args:
        replace: delete the folder `final` just before the rename. A kill between the two leaves neither.

    Raises:
        ValueError: `final` exists and is not empty, without `replace`.
    """
    if not replace and final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise ValueError(f"{final} exists already and is not empty; choose another --out")
    unfinished = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        _sync_tree(unfinished)
        if final.exists():
            shutil.rmtree(final) if replace else final.rmdir()
        unfinished.rename(final)
        sync(final.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_whole(final: Path, content: str | bytes) -> None:
    """Writes a small file, complete or not at all; text as UTF-8."""
    with whole_file(final) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


def sync(path: Path) -> None:
    """Flushes a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot flush a folder
            raise
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    paths = [*folder.rglob("*"), folder]
    if len(paths) > MANY_FILES:
        os.sync()
        return
    for path in paths:
        sync(path)
