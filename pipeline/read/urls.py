"""Opens URLs through fsspec: which are allowed, how they appear in messages, and which errors are worth a retry.

fsspec comes with the extra `remote`. Only the schemes below are opened, and never a link-local address, not even
through a redirect: a list of shards from someone else must not run a shell or read the keys of a cloud machine from its
metadata service. Messages never contain passwords or query strings, which hold signatures.
"""

import ipaddress
import re
import socket
import sys
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit, urlunsplit

SCHEMES = frozenset(["http", "https", "s3", "gs", "gcs", "az", "abfs", "hf", "memory", "file"])
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
STALL_SECONDS = 60  # without a byte, a connection counts as dead; a whole shard has no time limit


def is_url(text: str) -> bool:
    """Whether the text starts with a scheme (`s3://...`, also `pipe:...`)."""
    return "://" in text or text.startswith("pipe:")


def redact(url: str) -> str:
    """The URL without user, password, query and fragment."""
    if url.startswith("pipe:"):
        return "pipe:..."
    if not is_url(url):
        return url
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def join(url: str, name: str) -> str:
    """The URL of a file in a folder; keeps a query, such as a signature."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def beside(url: str, suffix: str) -> str:
    """The same URL or path with another suffix; keeps a query."""
    if not is_url(url):
        return str(Path(url).with_suffix(suffix))
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=str(PurePosixPath(parts.path).with_suffix(suffix))))


def expand_braces(text: str) -> list[str]:
    """Expands `shard-{000..002}.tar` into three names; returns text without such braces unchanged."""
    found = BRACES.search(text)
    if not found:
        return [text]
    first, last = found.groups()
    numbers = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return [name for n in numbers for name in expand_braces(text[: found.start()] + n + text[found.end() :])]


def open_filesystem(url: str) -> tuple[Any, str]:
    """Returns (fsspec file system, path in it). Raises ValueError for a scheme not allowed or a missing package."""
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        raise ValueError(f"{parts.scheme}: URLs are not opened; use one of {', '.join(sorted(SCHEMES))}")
    try:
        import fsspec

        if parts.scheme in ("http", "https"):
            # not url_to_fs, which takes the :: of an IPv6 address for its own separator
            return fsspec.filesystem(parts.scheme, get_client=_http_client), url
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ValueError(
            f"{parts.scheme}: URLs need another package ({error}): pip install 'patchmill[remote]'"
        ) from None


def transient_errors() -> tuple[type[BaseException], ...]:
    """Errors that a retry may mend: OSError and those of the network libraries that are loaded."""
    names = {"aiohttp": "ClientError", "botocore.exceptions": "BotoCoreError", "requests": "RequestException"}
    loaded = [getattr(sys.modules[module], name) for module, name in names.items() if module in sys.modules]
    return (OSError, TimeoutError, EOFError, *loaded)


def is_forbidden(error: BaseException) -> bool:
    """Whether an error means missing credentials: a retry does not help."""
    return isinstance(error, PermissionError) or getattr(error, "status", 0) in (401, 403)


class LinkLocalError(ValueError):
    """A URL, or a redirect from it, leads to a link-local address."""


async def _http_client(**options: Any) -> Any:
    """The aiohttp session that fsspec asks for; it checks every address before connecting, also after a redirect."""
    import aiohttp

    class Resolver(aiohttp.ThreadedResolver):
        async def resolve(self, *args: Any, **kwargs: Any) -> Any:
            found = await super().resolve(*args, **kwargs)
            for each in found:
                _refuse_link_local(each["host"])
            return found

    # the resolver never sees a literal address; the socket factory does
    connector = aiohttp.TCPConnector(resolver=Resolver(), socket_factory=_open_socket)
    # the default ends every request after five minutes, even if data still arrive
    timeout = aiohttp.ClientTimeout(total=None, sock_read=STALL_SECONDS)
    return aiohttp.ClientSession(connector=connector, timeout=timeout, **options)


def _open_socket(info: tuple[Any, ...]) -> socket.socket:
    """An unconnected socket for an entry of getaddrinfo."""
    family, kind, protocol, _, address = info
    _refuse_link_local(address[0])
    return socket.socket(family, kind, protocol)


def _refuse_link_local(address: str) -> None:
    host = ipaddress.ip_address(address.split("%")[0])
    if (getattr(host, "ipv4_mapped", None) or host).is_link_local:
        raise LinkLocalError(f"{address} is a link-local address, where cloud machines offer their keys: not opened")
