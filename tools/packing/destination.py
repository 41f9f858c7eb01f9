"""Writes a dataset's files to a folder or a bucket: each file is complete or absent.

On a file system a dataset is written into `OUT.partial` next to OUT and renamed at the end: OUT is complete as soon as
it exists. Each file in it is written under a temporary name with the process's id and renamed: two processes, or a
killed one and its successor, never write into each other's files.

A bucket cannot rename, but an object is complete or absent: files are staged in a temporary folder and uploaded under
their final names. manifest.json comes last and makes the dataset valid.
"""

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from patchmill.pipeline.atomic import sync, whole_file
from patchmill.pipeline.read.manifest import MANIFEST_NAME
from patchmill.pipeline.read.urls import is_url, open_filesystem, redact

PLAN_NAME = "plan.json"
PARTS_FOLDER = "parts"


@dataclass(frozen=True)
class LocalStore:
    """A dataset on a local (or mounted) file system: its final folder, and the folder where it is written."""

    out: Path
    root: Path

    def create(self) -> None:
        """Makes the folder. Raises OSError with the reason when that fails."""
        try:
            (self.root / PARTS_FOLDER).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"cannot make {self.root}: {error.strerror}; choose another place for {self.out}") from None

    def refuse_foreign(self) -> None:
        """Raises ValueError when OUT exists and is neither empty nor a dataset (the plan is compared with that one)."""
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"{self.out} is a file: give the name of a new folder")
        if self.out.is_dir() and any(self.out.iterdir()) and not (self.out / MANIFEST_NAME).is_file():
            raise ValueError(f"{self.out} is not empty: give the name of a new folder, or delete what is there")

    def published_manifest(self) -> str | None:
        """manifest.json of the finished dataset, None when there is none."""
        path = self.out / MANIFEST_NAME
        return path.read_text("utf-8") if path.is_file() else None

    @contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """A file to write; it gets its name when the block ends without an error, and is deleted otherwise."""
        with whole_file(self.root / name, shared=True) as path, path.open("wb", buffering=1 << 20) as file:
            yield file

    def write_text(self, name: str, text: str) -> None:
        """Writes a small file, all of it or nothing."""
        with self.writing(name) as file:
            file.write(text.encode("utf-8", "surrogateescape"))

    def read_text(self, name: str) -> str | None:
        """The text of a file, None when there is none."""
        path = self.root / name
        return path.read_text("utf-8", "surrogateescape") if path.is_file() else None

    def has(self, name: str) -> bool:
        """Whether a file exists; if so, it is complete."""
        return (self.root / name).is_file()

    def sha256(self, name: str) -> str:
        """Hex digest of a finished file. Raises FileNotFoundError when it is missing."""
        with (self.root / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def rename(self, old: str, new: str) -> None:
        os.replace(self.root / old, self.root / new)
        sync(self.root)

    def delete(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)

    def publish(self) -> None:
        """Gives the finished folder its name, then removes plan and part records."""
        for leftover in self.root.rglob("*.tmp"):
            leftover.unlink(missing_ok=True)
        if self.out.is_dir():
            self.out.rmdir()  # it was empty at the start; fails if someone has filled it since
        os.rename(self.root, self.out)
        sync(self.out.parent)
        self.clean_published()

    def clean_published(self) -> None:
        """Removes plan and part records from a finished dataset; a killed run may have left them."""
        shutil.rmtree(self.out / PARTS_FOLDER, ignore_errors=True)
        (self.out / PLAN_NAME).unlink(missing_ok=True)

    def abandon(self) -> None:
        """Removes an unfinished dataset."""
        shutil.rmtree(self.root, ignore_errors=True)


@dataclass(frozen=True)
class RemoteStore:
    """The same for a folder that fsspec reaches (`s3://bucket/dataset`)."""

    out: str

    @property
    def root(self) -> str:
        """Where it is written: the final place, since a bucket cannot rename."""
        return self.out

    def create(self) -> None:
        """Does nothing: a bucket has no empty folders, and a missing bucket is not created."""

    def refuse_foreign(self) -> None:
        """Raises ValueError when OUT has objects that `patchmill shard` did not write."""
        fs, path = self._at("")
        ours = fs.exists(f"{path}/{MANIFEST_NAME}") or fs.exists(f"{path}/{PLAN_NAME}")
        if not ours and fs.exists(path) and fs.ls(path, detail=False):
            raise ValueError(f"{redact(self.out)} is not empty: give the name of a new folder, or delete what is there")

    def published_manifest(self) -> str | None:
        """manifest.json of the finished dataset, None when there is none."""
        return self.read_text(MANIFEST_NAME)

    @contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """A local file to write; it is uploaded when the block ends without an error."""
        with tempfile.NamedTemporaryFile(prefix="patchmill-", buffering=1 << 20) as file:
            yield cast(BinaryIO, file)
            file.flush()
            fs, path = self._at(name)
            fs.put_file(file.name, path)

    def write_text(self, name: str, text: str) -> None:
        """Writes a small file, all of it or nothing."""
        fs, path = self._at(name)
        fs.pipe_file(path, text.encode("utf-8", "surrogateescape"))

    def read_text(self, name: str) -> str | None:
        """The text of a file, None when there is none."""
        fs, path = self._at(name)
        return fs.cat_file(path).decode("utf-8", "surrogateescape") if fs.exists(path) else None

    def has(self, name: str) -> bool:
        """Whether a file exists; if so, it is complete."""
        fs, path = self._at(name)
        return bool(fs.exists(path))

    def sha256(self, name: str) -> str:
        """Hex digest of a finished file. Raises FileNotFoundError when it is missing."""
        fs, path = self._at(name)
        digest = hashlib.sha256()
        with fs.open(path, "rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
        return digest.hexdigest()

    def rename(self, old: str, new: str) -> None:
        fs, path = self._at("")
        fs.mv(f"{path}/{old}", f"{path}/{new}")

    def delete(self, name: str) -> None:
        fs, path = self._at(name)
        if fs.exists(path):
            fs.rm(path)

    def publish(self) -> None:
        """Removes plan and part records: the manifest is already written."""
        self.clean_published()

    def clean_published(self) -> None:
        """Removes plan and part records from a finished dataset; a killed run may have left them."""
        fs, path = self._at(PARTS_FOLDER)
        if fs.exists(path):
            fs.rm(path, recursive=True)
        self.delete(PLAN_NAME)

    def abandon(self) -> None:
        """Removes an unfinished dataset."""
        fs, path = self._at("")
        if fs.exists(path):
            fs.rm(path, recursive=True)

    def _at(self, name: str) -> tuple[Any, str]:
        fs, path = open_filesystem(self.out)
        return fs, f"{path.rstrip('/')}/{name}" if name else path.rstrip("/")


Store = LocalStore | RemoteStore


def store_at(out: str | Path) -> Store:
    """The store of a folder or URL. Raises ValueError for a URL that cannot be written."""
    if str(out).startswith("file://"):
        out = str(out).removeprefix("file://")
    if is_url(str(out)):
        if str(out).startswith(("http:", "https:")):
            raise ValueError(f"{redact(str(out))} cannot be written: give a folder, or a bucket (s3://, gs://, ...)")
        return RemoteStore(str(out))
    path = Path(out) if Path(out).name not in ("", "..") else Path(out).resolve()
    return LocalStore(path, path.with_name(path.name + ".partial"))


def is_disk_full(error: OSError) -> bool:
    """Whether a write failed because the disk or the quota is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
