"""a command's result -> [whole] -> the disk: files and folders that take their name when they are complete."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(final: Path) -> Iterator[Path]:
    """A path to write to that is renamed to `final` at the end, and removed when something goes wrong."""
    final.parent.mkdir(parents=True, exist_ok=True)
    beside = final.with_name(f".{final.name}.tmp")
    try:
        yield beside
        beside.replace(final)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A new folder to fill that is renamed to `final` at the end, and removed when something goes wrong.

    Raises:
        ValueError: `final` exists and is not empty.
    """
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise ValueError(f"{final} exists already and is not empty; choose another --out")
    beside = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        yield beside
        if final.exists():
            final.rmdir()
        beside.rename(final)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
