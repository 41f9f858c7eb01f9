"""packed samples -> [tar + .idx] -> loader: the bytes of a shard, written deterministically and walked strictly.

A shard is a plain USTAR archive: mode 0644, owner 0, time 0, no names of users, regular files only, so that the same
samples give the same bytes on any machine. Its DALI index is text: `v1.2 N`, then one line a sample with
`extension offset size name` for each component. The offsets are known while writing, so the index costs nothing.

`walk_tar` reads headers only and believes none of them: tarfile and webdataset take a damaged header for the end of the
archive and silently drop what follows.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from patchmill.pipeline.image_headers import IMAGE_EXTENSIONS
from patchmill.pipeline.manifest import ImageFormat
from patchmill.pipeline.tar_stream import (
    BLOCK,
    TarDamage,
    checked_header,
    header_name,
    padded,
    pax_fields,
    split_key,
)

END_OF_ARCHIVE = bytes(2 * BLOCK)


@dataclass(frozen=True, slots=True)
class TarMember:
    """A regular file in a tar: full name, offset of its first byte, size in bytes."""

    name: str
    offset: int
    size: int


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
    """Writes one shard and its index; `add` a sample's components together, then `finish`.

    Holds only the index lines in memory. `sha256` is of the whole tar, hashed while it is written.
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
    """The DALI index, version 1.2, of these sample lines."""
    return f"v1.2 {len(lines)}\n" + "".join(line + "\n" for line in lines)


def index_of(members: list[TarMember]) -> str:
    """The text of the DALI index of a tar with these members: consecutive members of one key make a sample."""
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
    """The format that a member's WebDataset extension stands for; None when it is no image of a dataset."""
    split = split_key(name)
    return IMAGE_EXTENSIONS.get(split[1].lower()) if split else None


def walk_tar(file: BinaryIO) -> Iterator[TarMember]:
    """Yields the regular files of an uncompressed tar in order, reading headers only.

    Knows USTAR, old V7, GNU long names and PAX paths and sizes. TarDamage for a bad header checksum, data past the end
    of the file, entries after the end mark, or a missing end mark (a writer was killed: what came last may be lost).
    """
    end = file.seek(0, 2)
    offset, long_name, pax = 0, "", dict[str, str]()
    while True:
        file.seek(offset)
        header = file.read(BLOCK)
        if len(header) < BLOCK:
            raise TarDamage(f"ends at byte {end} without an end mark: it was cut short")
        if not any(header):
            break
        size, kind = checked_header(header, offset)
        size = int(pax.get("size", size))
        data = offset + BLOCK
        if data + size > end:
            raise TarDamage(f"member at byte {offset} claims {size} bytes past the end of the file: it was cut short")
        if kind in (b"L", b"x", b"g"):
            content = file.read(size)
            if kind == b"L":
                long_name = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif kind == b"x":
                pax = pax_fields(content, offset)
        else:
            if kind in (b"0", b"\0", b"7"):
                yield TarMember(long_name or pax.get("path") or header_name(header), data, size)
            long_name, pax = "", {}
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
    """Nothing may follow the end mark: two zeroed headers in the middle hide the rest from every reader."""
    file.seek(offset)
    while chunk := file.read(1 << 20):
        if chunk.count(0) != len(chunk):
            raise TarDamage(f"has an end mark at byte {offset} but data after it: it is damaged there")
    if end - offset < BLOCK:
        raise TarDamage(f"ends at byte {end} without an end mark: it was cut short")
