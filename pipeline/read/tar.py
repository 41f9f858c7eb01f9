"""Reads tars strictly, from a stream (`tar_members`) or by headers only (`walk_tar`), and writes shards and indexes.

tarfile and webdataset take a damaged header for the end of the archive and silently drop what follows. Here every
header's checksum is verified, and an archive without an end mark, or with data after it, is an error.

A shard is a plain USTAR archive: mode 0644, owner 0, time 0, no user names, regular files only. The same samples give
the same bytes on any machine. Its DALI index is text: `v1.2 N`, then for each sample one line with `extension offset
size name` of each component.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from patchmill.pipeline.read.image_headers import IMAGE_EXTENSIONS
from patchmill.pipeline.read.manifest import ImageFormat

BLOCK = 512
END_OF_ARCHIVE = bytes(2 * BLOCK)
REGULAR_FILES = (b"0", b"\0", b"7")
GNU_LONG_NAME, PAX, PAX_GLOBAL = EXTENSIONS = (b"L", b"x", b"g")  # headers whose content is about other members


class Readable(Protocol):
    """Anything that is read from front to back; `read` returns no bytes at the end."""

    def read(self, size: int, /) -> bytes: ...


class TarDamage(ValueError):
    """A tar whose structure cannot be trusted; the message names the byte offset."""


def padded(size: int) -> int:
    """Bytes in a tar of `size` bytes of content."""
    return -(-size // BLOCK) * BLOCK


def tar_members(file: Readable) -> Iterator[tuple[str, bytes]]:
    """Yields name and content of the regular files of an uncompressed tar, in order.

    Knows USTAR, old V7, GNU long names and PAX paths and sizes. Needs only `file.read`.
    """
    offset, extended = 0, dict[str, str]()
    while True:
        header = _exactly(file, BLOCK, offset)
        if not any(header):
            break
        size, kind = checked_header(header, offset)
        size = int(extended.get("size", size))
        content = _exactly(file, padded(size), offset + BLOCK)[:size]
        if kind in EXTENSIONS:
            extended |= extension_fields(kind, content, offset)
        else:
            if kind in REGULAR_FILES:
                yield member_name(header, extended), content
            extended = {}
        offset += BLOCK + padded(size)
    while rest := file.read(1 << 20):
        if any(rest):
            raise TarDamage(f"has an end mark at byte {offset} but data after it: it is damaged there")


def tar_samples(file: Readable) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Groups consecutive members into samples, (key, content by extension), as WebDataset does.

    `a/b.seg.png` has the key `a/b` and the extension `seg.png`; names without both are skipped.
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
        raise TarDamage(f"has no tar header at byte {offset}: it is damaged there, or not a tar") from None
    if stored != sum(header) - sum(header[148:156]) + 8 * 32:
        raise TarDamage(f"has a damaged header at byte {offset} (its checksum is wrong)")
    return size, header[156:157]


def member_name(header: bytes, extended: dict[str, str]) -> str:
    """The name of a member with these `extension_fields` before its USTAR or older header."""
    if found := extended.get("long name") or extended.get("path"):
        return found
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].split(b"\0", 1)[0]
        name = prefix + b"/" + name if prefix else name
    return name.decode("utf-8", "surrogateescape")


def extension_fields(kind: bytes, content: bytes, offset: int) -> dict[str, str]:
    """What an extension header at byte `offset` says about the next member: GNU's "long name", or PAX records.

    A PAX record is `length key=value\\n`. Global PAX headers are ignored.
    """
    if kind == GNU_LONG_NAME:
        return {"long name": content.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    found: dict[str, str] = {}
    if kind != PAX:
        return found
    try:
        while content.strip(b"\0"):
            length = int(content.split(b" ", 1)[0])
            key, value = content[: length - 1].split(b" ", 1)[1].split(b"=", 1)
            found[key.decode()] = value.decode("utf-8", "surrogateescape")
            content = content[length:]
    except (ValueError, IndexError):
        raise TarDamage(f"has a damaged PAX header at byte {offset}") from None
    return found


@dataclass(frozen=True, slots=True)
class TarMember:
    """A regular file in a tar: full name, offset of its first byte, size in bytes."""

    name: str
    offset: int
    size: int

    def read(self, file: BinaryIO) -> bytes:
        """Its content, from the open tar."""
        file.seek(self.offset)
        return file.read(self.size)


def tar_header(name: str, size: int) -> bytes:
    """The 512-byte USTAR header of a regular file; `name` is ASCII of at most 100 bytes."""
    encoded = name.encode("ascii")
    assert 0 < len(encoded) <= 100, name
    assert size < 8**11, size
    header = bytearray(BLOCK)
    header[0 : len(encoded)] = encoded
    header[100:108] = b"0000644\0"
    header[108:116] = header[116:124] = b"0000000\0"
    header[124:136] = b"%011o\0" % size
    header[136:148] = b"00000000000\0"
    header[148:156] = b" " * 8
    header[156:157] = b"0"
    header[257:265] = b"ustar\00000"
    header[329:337] = header[337:345] = b"0000000\0"
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


class ShardWriter:
    """Writes one shard and its index: `add` each sample with all its components, then `finish`.

    Keeps only the index lines in memory, and hashes the tar while it writes.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.bytes = 0
        self.samples = 0
        self._digest = hashlib.sha256()
        self._lines: list[str] = []

    def add(self, key: str, components: list[tuple[str, bytes]]) -> list[int]:
        """Appends `<key>.<extension>` for each (extension, content); returns the offset of each content."""
        offsets, line = [], []
        for extension, content in components:
            name = f"{key}.{extension}"
            self._write(tar_header(name, len(content)))
            offsets.append(self.bytes)
            line.append(f"{extension} {self.bytes} {len(content)} {name}")
            self._write(content)
            self._write(bytes(padded(len(content)) - len(content)))
        self._lines.append(" ".join(line))
        self.samples += 1
        return offsets

    def finish(self) -> tuple[str, str]:
        """Ends the archive; returns (sha256 hex of the tar, text of its index)."""
        self._write(END_OF_ARCHIVE)
        return self._digest.hexdigest(), index_text(self._lines)

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self._digest.update(data)
        self.bytes += len(data)


def index_text(lines: list[str]) -> str:
    """The text of a DALI index, version 1.2, with these lines of samples."""
    return f"v1.2 {len(lines)}\n" + "".join(line + "\n" for line in lines)


def index_of(members: list[TarMember]) -> str:
    """The text of the DALI index of a tar with these members; consecutive members with one key are a sample."""
    lines: list[list[str]] = []
    last = None
    for member in members:
        split = split_key(member.name)
        if split is None:
            continue
        if split[0] != last:
            lines.append([])
            last = split[0]
        lines[-1].append(f"{split[1]} {member.offset} {member.size} {member.name}")
    return index_text([" ".join(line) for line in lines])


def image_format(name: str) -> ImageFormat | None:
    """The image format of a member, by its WebDataset extension; None when a dataset cannot hold it as an image."""
    split = split_key(name)
    return IMAGE_EXTENSIONS.get(split[1].lower()) if split else None


def walk_tar(file: BinaryIO) -> Iterator[TarMember]:
    """Yields the regular files of an uncompressed tar in order, reading headers only.

    Knows USTAR, old V7, GNU long names and PAX paths and sizes.

    Raises:
        TarDamage: a wrong header checksum, a member that exceeds the file, data after the end mark, or no end mark (a
            writer was killed, and the last members may be lost).
    """
    end = file.seek(0, 2)
    offset, extended = 0, dict[str, str]()
    while True:
        file.seek(offset)
        header = file.read(BLOCK)
        if len(header) < BLOCK:
            raise TarDamage(f"ends at byte {end} without an end mark: it was cut short")
        if not any(header):
            break
        size, kind = checked_header(header, offset)
        size = int(extended.get("size", size))
        data = offset + BLOCK
        if data + size > end:
            raise TarDamage(f"member at byte {offset} claims {size} bytes past the end of the file: it was cut short")
        if kind in EXTENSIONS:
            extended |= extension_fields(kind, file.read(size), offset)
        else:
            if kind in REGULAR_FILES:
                yield TarMember(member_name(header, extended), data, size)
            extended = {}
        offset = data + padded(size)
    _require_only_zeros(file, offset, end)


def walk_tar_file(path: Path) -> list[TarMember]:
    """`walk_tar` of a local file as a list; TarDamage names the file."""
    with path.open("rb") as file:
        try:
            return list(walk_tar(file))
        except TarDamage as damage:
            raise TarDamage(f"{path} {damage}") from None


def _require_only_zeros(file: BinaryIO, offset: int, end: int) -> None:
    """Checks that nothing follows the end mark: zeroed headers in the middle hide the rest from every reader."""
    file.seek(offset)
    while chunk := file.read(1 << 20):
        if chunk.count(0) != len(chunk):
            raise TarDamage(f"has an end mark at byte {offset} but data after it: it is damaged there")
    if end - offset < BLOCK:
        raise TarDamage(f"ends at byte {end} without an end mark: it was cut short")
