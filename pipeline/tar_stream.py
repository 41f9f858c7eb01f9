"""plain WebDataset tars -> [tar_stream] -> stream_wds: the members of a tar read front to back, believing nothing.

webdataset and Python's tarfile take a damaged header in the middle for the end of the archive and silently drop what
follows. Here every header's checksum must hold and the archive must end with its end mark, else the tar is damaged.
"""

from collections.abc import Iterator
from typing import Protocol

BLOCK = 512


class Readable(Protocol):
    """Anything to read from front to back; `read` gives no bytes at the end."""

    def read(self, size: int, /) -> bytes: ...


class TarDamage(ValueError):
    """A tar whose structure cannot be trusted; the message names the byte offset."""


def padded(size: int) -> int:
    """Bytes that `size` bytes of content take in a tar."""
    return -(-size // BLOCK) * BLOCK


def tar_members(file: Readable) -> Iterator[tuple[str, bytes]]:
    """Yields name and content of the regular files of an uncompressed tar, in order.

    Knows USTAR, old V7, GNU long names and PAX paths and sizes. Only `file.read` is used: any stream will do.
    """
    offset, long_name, pax = 0, "", dict[str, str]()
    while True:
        header = _exactly(file, BLOCK, offset)
        if not any(header):
            break
        size, kind = checked_header(header, offset)
        size = int(pax.get("size", size))
        content = _exactly(file, padded(size), offset + BLOCK)[:size]
        offset += BLOCK + padded(size)
        if kind == b"L":
            long_name = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif kind == b"x":
            pax = pax_fields(content, offset)
        elif kind != b"g":
            if kind in (b"0", b"\0", b"7"):
                yield long_name or pax.get("path") or header_name(header), content
            long_name, pax = "", {}
    while rest := file.read(1 << 20):
        if any(rest):
            raise TarDamage(f"has an end mark at byte {offset} but data after it: it is damaged there")


def tar_samples(file: Readable) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Groups members that follow each other into samples: (key, content by extension), as WebDataset does.

    `a/b.seg.png` has the key `a/b` and the extension `seg.png`; names without both are passed over.
    """
    key, parts = "", dict[str, bytes]()
    for name, content in tar_members(file):
        split = split_key(name)
        if split is None:
            continue
        if split[0] != key and parts:
            yield key, parts
            parts = {}
        key = split[0]
        parts[split[1].lower()] = content
    if parts:
        yield key, parts


def split_key(name: str) -> tuple[str, str] | None:
    """WebDataset's rule: `a/b.c.jpg` -> (`a/b`, `c.jpg`); None for names without an extension or a stem."""
    folder, _, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not dot or not stem or not extension:
        return None
    return (f"{folder}/{stem}" if folder else stem), extension


def _exactly(file: Readable, size: int, offset: int) -> bytes:
    pieces, missing = [], size
    while missing:
        piece = file.read(missing)
        if not piece:
            raise TarDamage(f"ends at byte {offset + size - missing} without an end mark: it was cut short")
        pieces.append(piece)
        missing -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def checked_header(header: bytes, offset: int) -> tuple[int, bytes]:
    """(size, type flag) of a header whose checksum holds."""
    try:
        stored = int(header[148:156].strip(b"\0 ") or b"x", 8)
        if header[124] & 0x80:  # GNU base-256 sizes, for members of 8 GiB and more
            size = int.from_bytes(header[125:136], "big")
        else:
            size = int(header[124:136].strip(b"\0 ") or b"0", 8)
    except ValueError:
        raise TarDamage(f"has no tar header at byte {offset}: it is damaged there, or no tar") from None
    if stored != sum(header) - sum(header[148:156]) + 8 * 32:
        raise TarDamage(f"has a damaged header at byte {offset} (its checksum is wrong)")
    return size, header[156:157]


def header_name(header: bytes) -> str:
    """The name in a USTAR or older header."""
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].split(b"\0", 1)[0]
        name = prefix + b"/" + name if prefix else name
    return name.decode("utf-8", "surrogateescape")


def pax_fields(content: bytes, offset: int) -> dict[str, str]:
    """Records `length key=value\\n` of a PAX header."""
    found = {}
    try:
        while content.strip(b"\0"):
            length = int(content.split(b" ", 1)[0])
            key, value = content[: length - 1].split(b" ", 1)[1].split(b"=", 1)
            found[key.decode()] = value.decode("utf-8", "surrogateescape")
            content = content[length:]
    except (ValueError, IndexError):
        raise TarDamage(f"has a damaged PAX header at byte {offset}") from None
    return found
