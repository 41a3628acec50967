"""Random access to the samples of WebDataset shards, by number.

The order of training is a permutation of sample numbers that can be entered anywhere, so a sample must cost the same wherever
it lies: one look into a memory-mapped index, then reads at known offsets of plain tar files.
"""

from __future__ import annotations

import functools
import json
import logging
import operator
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex

from cluster.errors import JobError, OutsideError
from jobs.images import BadImageError, Pixels, decode_rgb, fit_square, to_pixels
from jobs.shard_index import Manifest, ensure_index, load_index
from jobs.shard_scan import CAPTION_KINDS, BadSample, sample_checksum

logger = logging.getLogger(__name__)

_OPEN_FILES = 32
_PROBES = 64  # random stand-ins tried for a bad sample before every other sample is tried in turn
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture with its caption."""

    key: str
    image: Pixels
    """uint8, height x width x 3, RGB; writable and owned by the sample."""
    caption: str
    replaces: str = ""
    """Name of the bad sample that this one stands in for; empty as a rule."""


class ShardDataset:
    """The samples of a directory of shards, in the order of its index.

    A sample that cannot be read (cut off, changed since it was indexed, not a picture) is replaced by another one, which one
    depending on its number alone, so that every rank, worker and attempt sees the same. Each is named once in the log, and too
    many of them are an error. A file system that fails is not a bad sample: that is raised, as a later attempt may read it.

    Objects may be handed to worker processes by fork or by spawn; files are opened where they are first read. Each process
    counts for itself; `Sample.replaces` tells the trainer what its workers met.
    """

    def __init__(
        self,
        directory: Path,
        *,
        max_bad: int,
        size_px: int | None = None,
        background: str = "#ffffff",
        index_directory: Path | None = None,
    ) -> None:
        """Open the shards in `directory`, and index them first if nobody has.

        Args:
            directory: Where the tar files lie: our own from `jobs.preprocess`, or any others that webdataset reads.
            max_bad: Most samples that may be bad before reading stops with an error.
            size_px: Centre-crop and scale every picture to this size; as stored by default. Ours have their size already.
            background: What shows through transparent pictures.
            index_directory: Where indexes go whose shards cannot be written beside; see `ensure_index`.

        Raises:
            NotFoundError: There are no shards.
            StateError: The index is damaged, or shards were added since it was made.
            JobError: More than `max_bad` samples are known to be bad already, or the shards are compressed.
        """
        self._directory = Path(directory)
        self._max_bad = max_bad
        self._size_px = size_px
        self._background = background
        self._place = ensure_index(self._directory, cache_directory=index_directory)
        self._bad: dict[int, BadSample] = {}
        self._left_out = 0
        self._open_index()
        self._note_left_out()
        self._note_short_shards()
        if not len(self):
            raise JobError(
                f"{self._directory}: the shards hold no usable sample; {self.manifest.bad} bad ones were left out"
            )

    def __len__(self) -> int:
        return self.manifest.samples

    def __getitem__(self, number: SupportsIndex) -> Sample:
        """Return sample `number`, or what stands in for it.

        Raises:
            IndexError: There is no such number; negative ones are not taken.
            JobError: More than `max_bad` samples have turned out bad.
            OutsideError: The file system fails.
        """
        wanted = operator.index(number)
        if not 0 <= wanted < len(self):
            raise IndexError(f"sample {wanted} of {len(self)}")
        sample = self._try(wanted)
        if sample is not None:
            return sample
        for candidate in self._stand_ins(wanted):
            sample = self._try(candidate)
            if sample is not None:
                return Sample(sample.key, sample.image, sample.caption, replaces=self._bad[wanted].name)
        raise JobError(f"{self._directory}: not one of the {len(self)} samples can be read")

    @property
    def fingerprint(self) -> str:
        """Identity of the data in 64 hexadecimal digits: another one if any sample, or their order, is another.

        How they are split into shards, and where those lie, does not matter.
        """
        return self.manifest.fingerprint

    @property
    def manifest(self) -> Manifest:
        """What `shards.json` says: source, licence, attribution, shards."""
        return self._index.manifest

    @property
    def bad(self) -> list[BadSample]:
        """The bad samples that this process has met, in the order of their numbers."""
        return [self._bad[number] for number in sorted(self._bad)]

    def key(self, number: int) -> str:
        """Return the name of a sample without reading the sample."""
        row = self._index.rows[number]
        return self._key_bytes(row).decode("utf-8", "backslashreplace")

    def read_raw(self, number: int) -> tuple[bytes, str]:
        """Return the image of sample `number` as it is stored, and its caption.

        Raises:
            BadImageError: The sample is damaged.
            OutsideError: The file system fails.
        """
        row = self._index.rows[number]
        name = self.manifest.shards[int(row["shard"])].name
        image = self._read(name, int(row["image_offset"]), int(row["image_size"]))
        caption = self._read(name, int(row["caption_offset"]), int(row["caption_size"]))
        kind = int(row["caption_kind"])
        if sample_checksum(self._key_bytes(row), kind, image, caption) != int(row["checksum"]):
            raise BadImageError("is not what was indexed (checksum differs); the shard is damaged or has been changed")
        return image, decode_caption(CAPTION_KINDS[kind], caption)

    def sample_name(self, number: int) -> str:
        """Return a sample's name for messages: shard and key."""
        return f"{self.manifest.shards[int(self._index.rows[number]['shard'])].name}: {self.key(number)}"

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in ("_index", "_open_shard"):  # mapped and opened anew in the process that unpickles
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_index()

    def _open_index(self) -> None:
        self._index = load_index(self._place)
        self._open_shard = functools.lru_cache(maxsize=_OPEN_FILES)(self._open_shard_file)

    def _open_shard_file(self, name: str) -> _OpenFile | None:
        try:
            return _OpenFile(self._directory / name)
        except FileNotFoundError:
            return None

    def _read(self, shard_name: str, offset: int, size: int) -> bytes:
        """Read by pread, which moves no file position, so that forked workers may share the file."""
        if size == 0:
            return b""
        try:
            file = self._open_shard(shard_name)
            if file is None:
                raise BadImageError("its shard is missing")
            data = file.read(offset, size)
        except OSError as error:
            raise OutsideError(
                f"{self._directory / shard_name}: reading {size} bytes at {offset} failed: {error.strerror}; "
                "the file system is at fault, not the data: is it mounted and well?"
            ) from error
        if len(data) != size:
            raise BadImageError(f"cut off: {len(data)} of {size} bytes are there")
        return data

    def _key_bytes(self, row: Any) -> bytes:
        start = int(row["key_offset"])
        return self._index.keys[start : start + int(row["key_size"])].tobytes()

    def _try(self, number: int) -> Sample | None:
        if number in self._bad:
            return None
        try:
            data, caption = self.read_raw(number)
            at_least_px = None if self._size_px is None else 2 * self._size_px
            image = decode_rgb(data, background=self._background, at_least_px=at_least_px, checked=True)
        except BadImageError as error:
            self._note_bad(number, str(error))
            return None
        if self._size_px is not None:
            image = fit_square(image, self._size_px)
        return Sample(self.key(number), to_pixels(image), caption)

    def _stand_ins(self, number: int) -> Iterator[int]:
        """Yield other sample numbers, spread over all shards and depending on `number` alone; in the end, every one."""
        for probe in range(_PROBES):
            yield _mix(number * _PROBES + probe) % len(self)
        yield from range(number + 1, len(self))
        yield from range(number)

    def _note_bad(self, number: int, reason: str) -> None:
        bad = BadSample(self.sample_name(number), reason)
        self._bad[number] = bad
        logger.warning("bad sample %s: %s; another one stands in for it", *bad)
        if len(self._bad) + self._left_out > self._max_bad:
            named = "\n".join(f"  {bad.name}: {bad.reason}" for bad in self.bad[:10])
            raise JobError(
                f"{self._directory}: {len(self._bad) + self._left_out} bad samples, more than the {self._max_bad} that max_bad "
                f"allows; restore the shards or raise max_bad\n{named}"
            )

    def _note_left_out(self) -> None:
        """Count what the index of foreign shards had to leave out. Our own were judged by the preprocessing's own limit."""
        if self.manifest.bad and not self.manifest.preprocessed:
            self._left_out = self.manifest.bad
            logger.warning("%s: %d bad samples are not in the index", self._directory, self._left_out)
            if self._left_out > self._max_bad:
                raise JobError(
                    f"{self._directory}: {self._left_out} samples are damaged or incomplete, more than the {self._max_bad} "
                    f"that max_bad allows; {self._place / 'bad.jsonl'} names them: restore the shards or raise max_bad"
                )

    def _note_short_shards(self) -> None:
        """Name at once the shards that are gone or shorter than they were; their samples are met one by one."""
        wrong = []
        for record in self.manifest.shards:
            path = self._directory / record.name
            try:
                size = path.stat().st_size if record.samples else record.size
            except FileNotFoundError:
                wrong.append((record.samples, f"{record.name} is missing ({record.samples} samples)"))
                continue
            except OSError as error:
                raise OutsideError(
                    f"{path}: cannot be looked at: {error.strerror}; is the file system well?"
                ) from error
            if size != record.size:
                wrong.append((0, f"{record.name} has {size} bytes and had {record.size} when it was indexed"))
        if not wrong:
            return
        shown = "; ".join(text for _, text in wrong[:10])
        missing = sum(samples for samples, _ in wrong)
        if missing + self._left_out > self._max_bad:
            raise JobError(
                f"{self._directory}: {missing} samples are missing, more than the {self._max_bad} that max_bad allows: {shown}"
                f"; restore them, or remove {self._place / 'shards.json'} to have the rest indexed anew"
            )
        logger.warning("%s: %d shards are not as they were: %s", self._directory, len(wrong), shown)


def decode_caption(kind: str, data: bytes) -> str:
    """Return the text of a caption member: `txt` as it is, `json` by its key caption, text or prompt, `cls` as `class 7`.

    Raises:
        BadImageError: It is not UTF-8, not JSON, or holds no text.
    """
    try:
        text = data.decode("utf-8").strip()
        if kind == "cls":
            return f"class {text}"
        if kind != "json":
            return text
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadImageError(f"its .{kind} caption is damaged: {error}"[:300]) from error
    if isinstance(value, dict):
        value = next((value[name] for name in ("caption", "text", "prompt") if name in value), "")
    if not isinstance(value, str):
        raise BadImageError(f"its .json caption is no text ({type(value).__name__})")
    return value


class _OpenFile:
    """A file descriptor that closes itself when the last reader lets go of it, so that the cache may drop it at any time."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, offset: int, size: int) -> bytes:
        data = os.pread(self._descriptor, size, offset)
        while len(data) < size and (more := os.pread(self._descriptor, size - len(data), offset + len(data))):
            data += more
        return data

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


def _mix(number: int) -> int:
    """Spread numbers evenly over 64 bits (the finaliser of SplitMix64, Steele et al. 2014)."""
    number = (number + 0x9E3779B97F4A7C15) & _MASK
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _MASK
    return number ^ (number >> 31)
