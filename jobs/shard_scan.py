"""Reads the structure of a tar shard and survives what disks and transfers do to tar files.

`tarfile` takes a damaged header in the middle of a file for the end of the archive and says nothing, so a shard cut or zeroed
in transit would just look shorter. Here damage is named, and reading goes on at the next header that is sound.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cluster.errors import OutsideError

SAMPLE_DTYPE = np.dtype(
    [
        ("shard", "<u4"),
        ("caption_kind", "u1"),
        ("key_size", "<u2"),
        ("key_offset", "<u8"),
        ("image_offset", "<u8"),
        ("image_size", "<u4"),
        ("caption_offset", "<u8"),
        ("caption_size", "<u4"),
        ("checksum", "<u8"),
    ]
)
"""One sample in 47 bytes. Offsets are into the shard, except `key_offset`, which is into the file of keys."""

CAPTION_KINDS = ("", "txt", "json", "cls")
"""What the caption of a sample is stored as, by number; of several, the first in this order is taken."""

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm")
"""Extensions of members and files that are taken for images."""

_BLOCK = 512
_CHUNK_BYTES = 1 << 20
_MAX_MEMBER_BYTES = 1 << 28  # 256 MiB: no single picture or caption is larger; a size beyond it is a damaged header
_MAX_EXTENSION_BYTES = 1 << 20  # a pax or GNU long-name record: real ones have some hundred bytes
_MAX_KEY_BYTES = 0xFFFF
_KEY_AND_EXTENSION = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
_PAX_RECORD = re.compile(rb"(\d{1,9}) ([^=]+)=")
_GNU_LONG_NAME, _PAX, _PAX_GLOBAL, _GNU_LONG_LINK = b"L", b"x", b"g", b"K"
_REGULAR = (b"0", b"\0", b"7")


class BadSample(NamedTuple):
    """Something that was met and could not be used."""

    name: str
    """What it is: `shard.tar: key`, `shard.tar @ byte`, or the path of a file."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """What the index remembers of one shard."""

    name: str
    size: int
    """Bytes of the tar file."""
    sha256: str
    samples: int
    bad: int = 0
    """Samples and damaged stretches that are not in the index."""


@dataclass(frozen=True, kw_only=True)
class ShardPart:
    """The part of an index that one shard contributes. `rows["shard"]` is 0 and `key_offset` counts within `keys`."""

    record: ShardRecord
    rows: npt.NDArray[np.void]
    keys: bytes
    bad: tuple[BadSample, ...] = ()


class _Member(NamedTuple):
    name: str
    offset: int
    size: int


class _Damage(NamedTuple):
    offset: int
    reason: str


@dataclass
class _Group:
    """Consecutive members that share a key: one sample."""

    key: str = ""
    after_damage: bool = False
    members: dict[str, _Member] = field(default_factory=dict)
    problem: str = ""


def sample_checksum(key: bytes, kind: int, image: bytes, caption: bytes) -> int:
    """Return 64 bits that stand for a sample: its key, the kind of its caption, and the bytes of both members."""
    digest = hashlib.blake2b(struct.pack("<BQQ", kind, len(key), len(image)), digest_size=8)
    for part in (key, image, caption):
        digest.update(part)
    return int.from_bytes(digest.digest(), "little")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def scan_shard(path: Path) -> ShardPart:
    """Find every sample of a tar file: consecutive members with one key, at least an image among them.

    Never fails on content: what is damaged is in `bad`, by name or by byte offset, and reading goes on behind it.

    Raises:
        OutsideError: The file cannot be opened or read.
    """
    try:
        sha256 = file_sha256(path)
        with _TarReader(path) as reader:
            builder = _PartBuilder(path.name, reader)
            for item in reader.walk():
                builder.add(item)
            rows, keys = builder.finish()
            size = reader.size
    except OSError as error:
        raise OutsideError(f"{path}: cannot be read: {error.strerror}; check the file system it is on") from error
    record = ShardRecord(name=path.name, size=size, sha256=sha256, samples=len(rows), bad=len(builder.bad))
    return ShardPart(record=record, rows=rows, keys=keys, bad=tuple(builder.bad))


def split_member_name(name: str) -> tuple[str, str] | None:
    """Split `dir/key.seg.png` into `dir/key` and `seg.png` as webdataset does; None for names that are no part of a sample."""
    match = _KEY_AND_EXTENSION.fullmatch(name.removeprefix("./"))
    return None if match is None else (match[1], match[2].lower())


class _TarReader:
    """Walks the blocks of one tar file by pread, so that a file that shrinks meanwhile ends in an error and not in SIGBUS."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._fd).st_size

    def __enter__(self) -> _TarReader:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def read(self, offset: int, size: int) -> bytes:
        """Return up to `size` bytes; fewer only at the end of the file."""
        parts = []
        while size > 0 and (part := os.pread(self._fd, size, offset)):
            parts.append(part)
            offset += len(part)
            size -= len(part)
        return b"".join(parts)

    def walk(self) -> Iterator[_Member | _Damage]:
        """Yield regular members and damaged stretches in order."""
        if self.read(0, 2) == b"\x1f\x8b" or self.read(0, 4) == b"\x28\xb5\x2f\xfd":
            yield _Damage(0, "is compressed; samples can be read at random from plain tar files only: decompress it")
            return
        offset, name = 0, ""
        while offset < self.size:
            block = self.read(offset, _BLOCK)
            if not block.strip(b"\0"):
                resumed = self._next_header(offset)
                if resumed is None:
                    if self.size - offset < 2 * _BLOCK:
                        yield _Damage(offset, "the archive's end mark is cut off; samples behind it may be missing")
                    return
                yield _Damage(offset, f"{resumed - offset} bytes of zeros, or of something else, amid the samples")
                offset, name = resumed, ""
                continue
            header, reason = _parse_header(block)
            if header is None or offset + _BLOCK + header.size > self.size:
                if header is not None:
                    there = max(0, self.size - offset - _BLOCK)
                    reason = f"{header.name}: cut off, {there} of {header.size} bytes are there"
                resumed = self._next_header(offset + _BLOCK)
                yield _Damage(offset, reason)
                if resumed is None:
                    return
                offset, name = resumed, ""
                continue
            data = offset + _BLOCK
            size = header.size
            if header.type in (_GNU_LONG_NAME, _PAX):
                name = _extended_name(header.type, self.read(data, min(size, _MAX_EXTENSION_BYTES))) or name
            elif header.type not in (_PAX_GLOBAL, _GNU_LONG_LINK):
                if header.type in _REGULAR:
                    yield _Member(name or header.name, data, size)
                name = ""
            offset = data + -(-size // _BLOCK) * _BLOCK
        yield _Damage(self.size, "the archive's end mark is missing; samples behind it may be cut off")

    def _next_header(self, offset: int) -> int | None:
        """Return the offset of the next block that is a sound header, looking only at blocks that carry the ustar mark."""
        while offset < self.size:
            chunk = self.read(offset, _CHUNK_BYTES)
            position = chunk.find(b"ustar")
            while position >= 0:
                block_at = position - 257
                if (
                    block_at >= 0
                    and block_at % _BLOCK == 0
                    and _parse_header(chunk[block_at : block_at + _BLOCK])[0] is not None
                ):
                    return offset + block_at
                position = chunk.find(b"ustar", position + 1)
            offset += _CHUNK_BYTES
        return None


def _parse_header(block: bytes) -> tuple[tarfile.TarInfo | None, str]:
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        return None, f"damaged header ({error})"
    if header.size < 0 or (header.type in (_GNU_LONG_NAME, _PAX) and header.size > _MAX_EXTENSION_BYTES):
        return None, f"damaged header (a size of {header.size} bytes)"
    return header, ""


def _extended_name(kind: bytes, data: bytes) -> str:
    r"""Return the path in a GNU long-name or pax record; empty if it holds none.

    A pax record is `27 path=some/long/name.png\n`, the number counting the whole record.
    """
    if kind == _GNU_LONG_NAME:
        return data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
    name, position = "", 0
    while match := _PAX_RECORD.match(data, position):
        end = position + int(match[1])
        if end <= match.end() or end > len(data):
            break
        if match[2] == b"path":
            name = data[match.end() : end - 1].decode("utf-8", "surrogateescape")
        position = end
    return name


class _PartBuilder:
    """Gathers members into samples."""

    def __init__(self, shard_name: str, reader: _TarReader) -> None:
        self._shard_name = shard_name
        self._reader = reader
        self._group = _Group()
        self._rows: list[tuple[int, ...]] = []
        self._keys = bytearray()
        self.bad: list[BadSample] = []

    def add(self, item: _Member | _Damage) -> None:
        if isinstance(item, _Damage):
            self._close_group(beside_damage=True)
            self.bad.append(BadSample(f"{self._shard_name} @ {item.offset}", item.reason))
            self._group = _Group(after_damage=True)
            return
        split = split_member_name(item.name)
        if split is None:
            return
        key, extension = split
        if key != self._group.key:
            self._close_group()
            after_damage = self._group.after_damage and not self._group.key
            self._group = _Group(key, after_damage)
        if extension in self._group.members:
            self._group.problem = f"two members are named {item.name}"
        elif item.size > _MAX_MEMBER_BYTES:
            self._group.problem = f"member {item.name} has {item.size} bytes, at most {_MAX_MEMBER_BYTES} are read"
        self._group.members[extension] = item

    def finish(self) -> tuple[npt.NDArray[np.void], bytes]:
        self._close_group()
        return np.array(self._rows, dtype=SAMPLE_DTYPE), bytes(self._keys)

    def _close_group(self, *, beside_damage: bool = False) -> None:
        group = self._group
        if not group.key:
            return
        image = _choose_image(group.members)
        kind = next((number for number, name in enumerate(CAPTION_KINDS) if name and name in group.members), 0)
        key = group.key.encode("utf-8", "surrogateescape")
        if not group.problem and image is None:
            group.problem = f"has no image (members: {', '.join(sorted(group.members))})"
        if not group.problem and kind == 0 and (beside_damage or group.after_damage):
            group.problem = "stands next to a damaged stretch and has no caption; part of it may be lost"
        if not group.problem and len(key) > _MAX_KEY_BYTES:
            group.problem = f"its key has {len(key)} bytes, at most {_MAX_KEY_BYTES} are allowed"
        self._group = _Group()
        if group.problem or image is None:
            shown = group.key.encode("utf-8", "backslashreplace").decode("utf-8")[:200]
            self.bad.append(BadSample(f"{self._shard_name}: {shown}", group.problem))
            return
        caption = group.members.get(CAPTION_KINDS[kind], _Member("", 0, 0))
        checksum = sample_checksum(
            key, kind, self._reader.read(image.offset, image.size), self._reader.read(caption.offset, caption.size)
        )
        self._rows.append(
            (0, kind, len(key), len(self._keys), image.offset, image.size, caption.offset, caption.size, checksum)
        )
        self._keys += key


def _choose_image(members: dict[str, _Member]) -> _Member | None:
    """Return the member `key.png` (by the order of IMAGE_EXTENSIONS), or else the first like `key.left.png`."""
    for extension in IMAGE_EXTENSIONS:
        if extension in members:
            return members[extension]
    return next((member for name, member in members.items() if name.rpartition(".")[2] in IMAGE_EXTENSIONS), None)
