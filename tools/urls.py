"""URLs of users -> [urls] -> fsspec: what may be opened, and what may be shown.

fsspec comes with the extra `remote`. Only the schemes below are opened: webdataset's `pipe:` runs a shell, which a URL
from a file that someone else wrote must not do. Query strings and passwords never reach a message.
"""

import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

SCHEMES = frozenset(["http", "https", "s3", "gs", "gcs", "az", "abfs", "hf", "memory", "file"])
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


def is_url(text: str) -> bool:
    """Whether this names something by a scheme (`s3://...`, and also `pipe:...`, which is refused)."""
    return "://" in text or text.startswith("pipe:")


def redact(url: str) -> str:
    """The URL without user, password, query and fragment."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def open_filesystem(url: str) -> tuple[Any, str]:
    """(fsspec file system, path in it) of a URL; ValueError for a scheme that is not opened or lacks its package."""
    scheme = url.partition(":")[0]
    if scheme not in SCHEMES:
        raise ValueError(f"{scheme}: URLs are not opened; there are: {', '.join(sorted(SCHEMES))}")
    try:
        import fsspec

        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ValueError(f"{scheme}: URLs need another package ({error}): pip install 'patchmill[remote]'") from None


def expand_braces(text: str) -> list[str]:
    """`shard-{000..002}.tar` -> the three names; text without such braces as it is."""
    found = BRACES.search(text)
    if not found:
        return [text]
    first, last = found.groups()
    numbers = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return [name for n in numbers for name in expand_braces(text[: found.start()] + n + text[found.end() :])]


def download(url: str, folder: Path) -> Path:
    """Copies a remote file into `folder` unless it is there already with its size; returns the local path."""
    fs, path = open_filesystem(url)
    local = folder / Path(urlsplit(url).path).name
    try:
        size = fs.size(path)
        if local.is_file() and local.stat().st_size == size:
            return local
        folder.mkdir(parents=True, exist_ok=True)
        temporary = local.with_name(local.name + ".tmp")
        fs.get_file(path, str(temporary))
    except FileNotFoundError:
        raise FileNotFoundError(f"nothing at {redact(url)}") from None
    temporary.replace(local)
    return local
