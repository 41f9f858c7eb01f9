"""Opens files, URLs and commands as streams; a remote stream resumes after a lost connection."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from patchmill.pipeline.read.remote import ATTEMPTS, FIRST_PAUSE_SECONDS
from patchmill.pipeline.read.tar import Readable
from patchmill.pipeline.read.urls import (
    LinkLocalError,
    is_forbidden,
    is_url,
    open_filesystem,
    redact,
    transient_errors,
)

BLOCK_BYTES = 8 << 20  # of one request


@contextmanager
def open_stream(url: str) -> Iterator[Readable]:
    """Opens a path, a URL, or the output of a shell command (`pipe:zstdcat shard.tar.zst`).

    The caller has checked that commands are allowed (data.allow_pipe).
    """
    if url.startswith("pipe:"):
        yield from _pipe(url.removeprefix("pipe:"))
    elif is_url(url):
        stream = RemoteStream(url)
        try:
            yield stream
        finally:
            stream.close()
    else:
        with open(url, "rb") as file:
            yield file


class RemoteStream:
    """A remote file, read from front to back. After a lost connection it continues at the same byte."""

    def __init__(self, url: str) -> None:
        self.name = redact(url)
        self._filesystem, self._path = open_filesystem(url)
        self._position = 0
        self._file: Any = None

    def read(self, size: int) -> bytes:
        """Returns up to `size` bytes, none at the end. Raises OSError after ATTEMPTS failures in a row."""
        failure = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
            try:
                if self._file is None:
                    self._file = self._opened()
                data = self._file.read(size)
                self._position += len(data)
                return data
            except (FileNotFoundError, LinkLocalError) as error:
                # fsspec asks for the size first, and reports any failure of that as "not found"
                cause = error.__cause__ if isinstance(error, FileNotFoundError) else error
                if isinstance(cause, LinkLocalError):
                    raise ValueError(f"{self.name}: {cause}") from None
                raise FileNotFoundError(f"nothing at {self.name}: check the address") from None
            except transient_errors() as error:
                if is_forbidden(error):
                    raise PermissionError(f"no permission to read {self.name}: check the credentials") from None
                failure = type(error).__name__  # its text may contain the whole address with its signature
                self._file = None
        raise OSError(f"{self.name} could not be read past byte {self._position} (the last: {failure})")

    def close(self) -> None:
        """Closes the connection."""
        if self._file is not None:
            self._file.close()

    def _opened(self) -> Any:
        """Opens the file at the current position. HTTP is one stream: not every server supports ranges."""
        http = "http" in self._filesystem.protocol
        file = self._filesystem.open(self._path, "rb", block_size=0 if http else BLOCK_BYTES)
        if not http:
            file.seek(self._position)
            return file
        missing = self._position
        while missing:
            skipped = len(file.read(min(missing, BLOCK_BYTES)))
            if not skipped:
                raise EOFError(f"{self.name} is shorter than before")
            missing -= skipped
        return file


def _pipe(command: str) -> Iterator[Readable]:
    process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        yield process.stdout
        if process.wait() != 0:
            raise ValueError(f"a pipe: command of data.path ended with exit code {process.returncode}")
    finally:
        process.stdout.close()
        process.terminate()
        process.wait()
