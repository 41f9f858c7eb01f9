"""pack -> [store] -> the dataset's folder: files that are whole or not there.

A dataset is written into `OUT.partial` beside OUT and renamed at the end, so that OUT is finished the moment it exists.
Within it every file is written under a temporary name of its process and renamed: two processes, or one that was killed
and one that follows it, never write into each other's files.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

PLAN_NAME = "plan.json"
PARTS_FOLDER = "parts"


@dataclass(frozen=True)
class Store:
    """The folder of an unfinished dataset on a local (or mounted) file system, and the name it will get."""

    out: Path

    @property
    def root(self) -> Path:
        """Where it is being written."""
        return self.out.with_name(self.out.name + ".partial")

    def create(self) -> None:
        """Makes the folder; OSError says what stands in the way."""
        try:
            (self.root / PARTS_FOLDER).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"cannot make {self.root}: {error.strerror}; choose another place for {self.out}") from None

    @contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """A file to write that gets its name only when the block ends without an error; otherwise nothing is left."""
        temporary = self.root / f"{name}.{os.getpid()}.tmp"
        try:
            with temporary.open("wb", buffering=1 << 20) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.root / name)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def write_text(self, name: str, text: str) -> None:
        """Writes a small file, whole or not at all."""
        with self.writing(name) as file:
            file.write(text.encode("utf-8", "surrogateescape"))

    def read_text(self, name: str) -> str | None:
        """The text of a file, None when there is none."""
        path = self.root / name
        return path.read_text("utf-8", "surrogateescape") if path.is_file() else None

    def sha256(self, name: str) -> str:
        """Hex digest of a finished file; FileNotFoundError when it is not there."""
        with (self.root / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def rename(self, old: str, new: str) -> None:
        os.replace(self.root / old, self.root / new)

    def delete(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)

    def publish(self) -> None:
        """Gives the finished folder its name, then removes what only served the making."""
        for leftover in self.root.rglob("*.tmp"):
            leftover.unlink(missing_ok=True)
        if self.out.is_dir():
            self.out.rmdir()  # empty: checked at the start; if someone filled it since, this says so
        os.rename(self.root, self.out)
        self.clean_published()

    def clean_published(self) -> None:
        """Removes the part records from a finished dataset (again, if the process was killed while it did)."""
        shutil.rmtree(self.out / PARTS_FOLDER, ignore_errors=True)
        (self.out / PLAN_NAME).unlink(missing_ok=True)

    def abandon(self) -> None:
        """Removes an unfinished dataset."""
        shutil.rmtree(self.root, ignore_errors=True)


def is_disk_full(error: OSError) -> bool:
    """Whether a write failed for want of room or quota."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
