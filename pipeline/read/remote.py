"""Fetches whole shards of a remote dataset ahead of their use into a cache of limited size.

Samples are small and requests are slow: a shard is one request. Its sha256 is checked before it gets its name; the
cache never holds a partial or wrong shard, and reading it is the same as for local data.

Processes on one machine share the cache: with a lock file, one of them fetches a shard while the others wait for it.
"""

import fcntl
import hashlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from io import FileIO
from pathlib import Path
from typing import TypeVar

from patchmill.pipeline.atomic import whole_file
from patchmill.pipeline.read.manifest import MANIFEST_NAME, SAMPLES_NAME, Dataset, Manifest, open_samples
from patchmill.pipeline.read.threads import Pool
from patchmill.pipeline.read.urls import LinkLocalError, is_forbidden, join, open_filesystem, redact, transient_errors

ATTEMPTS = 5
FIRST_PAUSE_SECONDS = 0.5  # before the second attempt; doubles each time
DOWNLOADS = 4  # shards fetched at the same time

Result = TypeVar("Result")


def open_remote_dataset(url: str, cache: Path, limit_bytes: int) -> tuple[Dataset, "ShardCache"]:
    """Fetches the manifest and the sample table of a packed dataset; the shards follow on demand.

    Args:
        url: of the folder with manifest.json.
        cache: folder for copies; each dataset has a folder in it, named by its fingerprint.
        limit_bytes: size of the shards kept.
    """
    address = join(url, MANIFEST_NAME)
    text = with_retries(lambda: _cat(address), redact(address))
    manifest = Manifest.from_json(text.decode("utf-8", "replace"), redact(address))
    folder = cache / manifest.fingerprint()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / SAMPLES_NAME
    fetch(join(url, SAMPLES_NAME), table, manifest.samples_sha256)
    shards = ShardCache(url, manifest, folder, limit_bytes)
    return Dataset(folder, manifest, open_samples(table, manifest.num_samples)), shards


class ShardCache:
    """Local copies of a remote dataset's shards; above a limit, the least recently used are deleted.

    Deleting a file that is being read is safe: its bytes stay until the reader closes it.
    """

    def __init__(self, url: str, manifest: Manifest, folder: Path, limit_bytes: int) -> None:
        self.url, self.shards, self.folder, self.limit_bytes = url, manifest.shards, folder, limit_bytes
        self._pool = Pool(DOWNLOADS, "patchmill-fetch")
        self._lock = threading.Lock()
        self._fetched: OrderedDict[int, Future] = OrderedDict()

    def require_room(self, shards: int) -> None:
        """Raises ValueError unless the `shards` largest shards, and as many fetched ahead, fit into the cache."""
        needed = sum(sorted((info.bytes for info in self.shards), reverse=True)[: 2 * shards])
        if needed > self.limit_bytes:
            raise ValueError(
                f"the shards in use at one time need {needed / (1 << 30):.2f} GiB, but data.cache_limit_gib is "
                f"{self.limit_bytes / (1 << 30):.2f}: raise it, or use data.shuffle=window with fewer "
                "data.window_shards"
            )

    def open(self, shard: int) -> FileIO:
        """Opens a shard's copy, after waiting for the download. Raises OSError when that failed."""
        while True:
            path = self._want(shard).result()
            try:
                return FileIO(path)
            except FileNotFoundError:  # deleted since, here or by another process that shares the cache
                with self._lock:
                    self._fetched.pop(shard, None)

    def want(self, shards: list[int]) -> None:
        """Starts to fetch shards that will be read soon."""
        for shard in shards:
            self._want(shard)

    def close(self) -> None:
        """Stops the downloads."""
        self._pool.close()

    def _want(self, shard: int) -> Future:
        with self._lock:
            future = self._fetched.get(shard)
            if future is None:  # a failed download stays here and is not tried again: its samples are bad
                future = self._fetched[shard] = self._pool.submit(self._fetch, shard)
            self._fetched.move_to_end(shard)
            return future

    def _fetch(self, shard: int) -> Path:
        info = self.shards[shard]
        path = self.folder / info.name
        fetch(join(self.url, info.name), path, info.sha256)
        with self._lock:
            self._drop_oldest()
        return path

    def _drop_oldest(self) -> None:
        """Deletes copies, the least recently used first, until the rest is within the limit."""
        there = {shard: self.folder / self.shards[shard].name for shard in self._fetched}
        there = {shard: path for shard, path in there.items() if path.exists()}
        kept = sum(self.shards[shard].bytes for shard in there)
        for shard, path in list(there.items())[:-1]:
            if kept <= self.limit_bytes:
                break
            kept -= self.shards[shard].bytes
            del self._fetched[shard]
            path.unlink(missing_ok=True)


def fetch(url: str, path: Path, sha256: str) -> None:
    """Copies a remote file to `path`, complete and with this sha256 (hex), or not at all. Keeps an existing copy."""
    lock = os.open(path.with_name(path.name + ".lock"), os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            with whole_file(path) as unfinished:
                with_retries(lambda: _fetch_once(url, unfinished, sha256), redact(url))
    finally:
        os.close(lock)


def with_retries(action: Callable[[], Result], name: str) -> Result:
    """Returns `action()`, after up to ATTEMPTS tries with growing pauses; the final error gives `name` and reason."""
    failure = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
        try:
            return action()
        except FileNotFoundError:
            raise FileNotFoundError(f"nothing at {name}: check the address") from None
        except LinkLocalError as error:
            raise ValueError(f"{name}: {error}") from None
        except WrongBytes as error:
            failure = str(error)
        except transient_errors() as error:
            if is_forbidden(error):
                raise PermissionError(f"no permission to read {name}: check the credentials") from None
            failure = type(error).__name__  # its text may contain the whole address with its signature
    raise OSError(f"{name} could not be fetched in {ATTEMPTS} attempts (the last: {failure})")


class WrongBytes(ValueError):
    """A copy whose sha256 is not the manifest's."""


def _fetch_once(url: str, temporary: Path, sha256: str) -> None:
    filesystem, remote = open_filesystem(url)
    filesystem.get_file(remote, str(temporary))
    with temporary.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise WrongBytes(f"received {temporary.stat().st_size} bytes whose sha256 differs from the manifest's")


def _cat(url: str) -> bytes:
    filesystem, remote = open_filesystem(url)
    return filesystem.cat_file(remote)
