"""Writes WebDataset shards: tar files that are the same to the byte whenever the same samples go in."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jobs.shard_index import replacing

_KEY = re.compile(
    r"[A-Za-z0-9_-]{1,90}"
)  # with its extension it fits ustar's 100 bytes; a dot would end it for webdataset
_NOT_IN_KEYS = re.compile(r"[^A-Za-z0-9_]+")
_SLUG_CHARACTERS = 60


class ShardWriter:
    """Adds samples to an open shard; see `new_shard`."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        self.samples = 0

    def add(self, key: str, *, image: bytes, extension: str, caption: str) -> None:
        """Append one sample: `key.png` (or whatever `extension` says), then `key.txt`.

        Raises:
            ValueError: The key is not of letters, digits, - and _, or is longer than 90 characters.
        """
        if not _KEY.fullmatch(key):
            raise ValueError(f"key {key!r}: keys are 1 to 90 letters, digits, - and _; use shard_key()")
        self._add_member(f"{key}.{extension}", image)
        self._add_member(f"{key}.txt", caption.encode("utf-8", "replace"))
        self.samples += 1

    def _add_member(self, name: str, data: bytes) -> None:
        header = tarfile.TarInfo(name)  # mtime, uid and gid are 0 and the names empty: nothing of this machine or hour
        header.size = len(data)
        header.mode = 0o444
        self._tar.addfile(header, io.BytesIO(data))


@contextmanager
def new_shard(path: Path) -> Iterator[ShardWriter]:
    """Write a shard beside `path` and give it its name when the block ends well; otherwise nothing is left.

    Raises:
        OutsideError: It cannot be written; a full disk is named as such.
    """
    with replacing(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        yield ShardWriter(tar)


def shard_key(number: int, name: str) -> str:
    """Make a sample's key of its place in the source and its name there: `00000042-animals-cat`.

    The number makes it unique: in a folder, `cat.png`, `cat.jpg` and `ca.t.png` may lie side by side.
    """
    slug = _NOT_IN_KEYS.sub("-", name).strip("-")[-_SLUG_CHARACTERS:]
    return f"{number:08d}-{slug}".rstrip("-")


def shard_name(number: int) -> str:
    """Return the file name of shard `number`."""
    return f"shard-{number:06d}.tar"
