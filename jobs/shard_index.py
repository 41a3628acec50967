"""The index over a directory of shards: which bytes of which tar file hold sample number i.

Three files: `index.npy` (one fixed-size row a sample, memory-mapped), `index.keys` (the samples' names, one blob) and
`shards.json`, which is written last and makes the other two valid. Nothing here holds more than one shard's
rows in memory.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.errors import JobError, NotFoundError, OutsideError, StateError
from jobs.shard_scan import SAMPLE_DTYPE, ShardPart, ShardRecord, scan_shard

logger = logging.getLogger(__name__)

MANIFEST_NAME = "shards.json"
INDEX_NAME = "index.npy"
KEYS_NAME = "index.keys"
BAD_NAME = "bad.jsonl"
TEMPORARY_PREFIX = ".muster-"
"""Everything unfinished starts with this, so that nobody takes it for data and a later run may clear it away."""

_FORMAT_VERSION = 1
_COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")
_MOST_THREADS = 8  # more would only wait for the interpreter lock between two reads


class Manifest(BaseModel):
    """What `shards.json` says."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    format_version: int = _FORMAT_VERSION
    samples: int = Field(ge=0)
    bad: int = Field(ge=0)
    """Samples and damaged stretches left out of the index; each is named in `bad.jsonl`."""
    fingerprint: str
    """Identity of the samples and their order; the split into shards does not matter."""
    keys_size: int
    """Bytes of the file of keys."""
    source: str = ""
    """Where the pictures are from, for people."""
    licence: str = ""
    attribution: str = ""
    preprocessed: bool = False
    """Whether `jobs.preprocess` wrote these shards, and so has judged their bad samples by its own limit."""
    image_size_px: int | None = None
    """Height and width of every image, if all are squares of one size."""
    shards: tuple[ShardRecord, ...]


class ShardIndex(NamedTuple):
    """An open index."""

    manifest: Manifest
    rows: npt.NDArray[np.void]
    """Memory-mapped, of `SAMPLE_DTYPE`."""
    keys: npt.NDArray[np.uint8]
    """Memory-mapped."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a manifest says about where its pictures are from."""

    source: str = ""
    licence: str = ""
    attribution: str = ""
    preprocessed: bool = False
    image_size_px: int | None = None


def write_index(directory: Path, parts: Iterable[ShardPart], *, description: Description) -> Manifest:
    """Write the index of the shards that `parts` describe, in their order, and return its manifest.

    Two processes that do so at once for the same shards write the same bytes, so that either may win.

    Raises:
        OutsideError: The directory cannot be written to, or the disk is full.
    """
    fingerprint = hashlib.sha256(b"muster-samples-1")
    records: list[ShardRecord] = []
    samples = keys_size = 0
    with (
        replacing(directory / INDEX_NAME) as index_file,
        replacing(directory / KEYS_NAME) as keys_file,
        replacing(directory / BAD_NAME) as bad_file,
    ):
        header_size = _write_npy_header(index_file, 0)
        for number, part in enumerate(parts):
            rows = part.rows.copy()
            rows["shard"] = number
            rows["key_offset"] += np.uint64(keys_size)
            index_file.write(rows.tobytes())
            keys_file.write(part.keys)
            bad_file.writelines(json.dumps(bad._asdict()).encode() + b"\n" for bad in part.bad)
            fingerprint.update(rows["checksum"].tobytes())
            samples += len(rows)
            keys_size += len(part.keys)
            records.append(part.record)
        index_file.seek(0)
        if _write_npy_header(index_file, samples) != header_size:
            raise AssertionError("numpy no longer leaves room in its header for a growing first axis")
    manifest = Manifest(
        samples=samples,
        bad=sum(record.bad for record in records),
        fingerprint=fingerprint.hexdigest(),
        keys_size=keys_size,
        source=description.source,
        licence=description.licence,
        attribution=description.attribution,
        preprocessed=description.preprocessed,
        image_size_px=description.image_size_px,
        shards=tuple(records),
    )
    with replacing(directory / MANIFEST_NAME) as file:
        file.write(manifest.model_dump_json(indent=2).encode() + b"\n")
    return manifest


def read_manifest(directory: Path) -> Manifest | None:
    """Return the manifest in `directory`, or None if there is none.

    Raises:
        StateError: It is damaged, or of another version.
        OutsideError: It cannot be read.
    """
    path = directory / MANIFEST_NAME
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise OutsideError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        version = json.loads(text).get("format_version")
        if version != _FORMAT_VERSION:
            raise StateError(
                f"{path}: format version {version}, this Muster reads {_FORMAT_VERSION}; {_remove_index_hint(directory)}"
            )
        return Manifest.model_validate_json(text)
    except (ValueError, AttributeError, ValidationError) as error:
        raise StateError(f"{path}: damaged or not Muster's; {_remove_index_hint(directory)}") from error


def load_index(directory: Path) -> ShardIndex:
    """Open the index in `directory`.

    Raises:
        NotFoundError: There is none.
        StateError: Its files do not fit together.
    """
    manifest = read_manifest(directory)
    if manifest is None:
        raise NotFoundError(f"{directory}: no {MANIFEST_NAME} there; was the preprocessing finished?")
    try:
        rows = np.load(directory / INDEX_NAME, mmap_mode="r" if manifest.samples else None, allow_pickle=False)
        keys_path = directory / KEYS_NAME
        keys = np.memmap(keys_path, dtype=np.uint8, mode="r") if manifest.keys_size else np.empty(0, dtype=np.uint8)
    except (OSError, ValueError, EOFError) as error:
        raise StateError(f"{directory}: the index is damaged ({error}); {_remove_index_hint(directory)}") from error
    if rows.dtype != SAMPLE_DTYPE or rows.shape != (manifest.samples,) or len(keys) != manifest.keys_size:
        raise StateError(
            f"{directory}: {INDEX_NAME} and {KEYS_NAME} are not those that {MANIFEST_NAME} was written for "
            f"({rows.shape} rows, {manifest.samples} expected); {_remove_index_hint(directory)}"
        )
    return ShardIndex(
        manifest, np.asarray(rows), np.asarray(keys)
    )  # plain views of the maps: memmap's own indexing is slow


def ensure_index(directory: Path, *, cache_directory: Path | None = None) -> Path:
    """Return the directory that holds the index of the shards in `directory`, and index them now if nobody has.

    The index is written beside the shards, or, where that is not allowed, in a folder of its own under `cache_directory`.

    Args:
        directory: Where the tar files lie.
        cache_directory: `~/.cache/muster/shard-index` (by XDG_CACHE_HOME) by default.

    Raises:
        NotFoundError: There is no such directory, or it holds no tar files.
        JobError: Its shards are compressed, so that they cannot be read at random.
        StateError: An index is there, and the shards have been changed, added to or removed since.
    """
    shards = find_shards(directory)
    cached = (cache_directory or _default_cache()) / hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:16]
    for place in (directory, cached):
        manifest = read_manifest(place)
        if manifest is not None:
            _check_same_shards(directory, shards, manifest, place)
            return place
    place = directory if _can_write(directory) else cached
    place.mkdir(parents=True, exist_ok=True)
    logger.info("indexing %d shards of %s", len(shards), directory)
    manifest = write_index(place, _scan_all(shards), description=Description(source=f"existing shards in {directory}"))
    if manifest.bad:
        logger.warning(
            "%s: %d damaged or incomplete samples left out, %d usable; %s names them",
            directory, manifest.bad, manifest.samples, place / BAD_NAME,
        )  # fmt: skip
    return place


def find_shards(directory: Path) -> list[Path]:
    """Return the tar files directly in `directory`, by name.

    Raises:
        NotFoundError: There is no such directory, or there are none.
        JobError: There are only compressed ones.
    """
    try:
        names = sorted(name for name in os.listdir(directory) if not name.startswith("."))  # noqa: PTH208 - names, not paths
    except OSError as error:
        raise NotFoundError(f"{directory}: cannot be listed: {error.strerror}") from error
    shards = [directory / name for name in names if name.endswith(".tar")]
    compressed = [name for name in names if name.endswith(_COMPRESSED_SUFFIXES)]
    if compressed:
        raise JobError(
            f"{directory}: {compressed[0]} is compressed ({len(compressed)} such files); samples can be read at random from "
            "plain tar files only: decompress them, the pictures inside are compressed anyway"
        )
    if not shards:
        raise NotFoundError(f"{directory}: no .tar files there; give the directory that holds the shards themselves")
    return shards


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write a file beside `path` and rename it over `path` once it is complete and on the disk; on an error leave nothing.

    Raises:
        OutsideError: It cannot be written; a full disk is named as such.
    """
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f"{TEMPORARY_PREFIX}{path.name}-", dir=path.parent)
    except OSError as error:
        raise write_error(path, error) from error
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # noqa: PTH101 - mkstemp makes files private
        os.replace(temporary, path)  # noqa: PTH105
    except OSError as error:
        _remove(temporary)
        raise write_error(path, error) from error
    except BaseException:
        _remove(temporary)
        raise


def write_error(path: Path, error: OSError) -> OutsideError:
    """Make the error for a file that could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutsideError(
            f"{path}: the disk or the quota is full ({error.strerror}); what was finished is kept, the unfinished file is "
            "removed: free some space and run it again"
        )
    return OutsideError(f"{path}: cannot be written: {error.strerror}; check the directory's owner and mode")


def _write_npy_header(file: BinaryIO, samples: int) -> int:
    """Write the header of a .npy file. numpy pads it so that it has the same length whatever the number of rows."""
    header = {"descr": np.lib.format.dtype_to_descr(SAMPLE_DTYPE), "fortran_order": False, "shape": (samples,)}
    np.lib.format.write_array_header_1_0(file, header)
    return file.tell()


def _scan_all(shards: Sequence[Path]) -> Iterator[ShardPart]:
    """Scan shards in order, a few at a time.

    By threads: reading and hashing, which is most of the work for pictures of some size, need no interpreter lock. Processes
    would run the caller's main script again, which a script that only opens a data set need not be prepared for.
    """
    workers = min(len(os.sched_getaffinity(0)), len(shards), _MOST_THREADS)
    with ThreadPoolExecutor(workers, thread_name_prefix="scan-shard") as pool:
        waiting = deque(pool.submit(scan_shard, shard) for shard in shards[: 2 * workers])
        for shard in shards[2 * workers :]:
            yield waiting.popleft().result()
            waiting.append(pool.submit(scan_shard, shard))
        while waiting:
            yield waiting.popleft().result()


def _check_same_shards(directory: Path, shards: Sequence[Path], manifest: Manifest, place: Path) -> None:
    """Refuse shards that the index does not know. Missing and changed ones show when they are read, and are counted there."""
    added = sorted({shard.name for shard in shards} - {record.name for record in manifest.shards})
    if added:
        raise StateError(
            f"{directory}: {', '.join(added[:3])} ({len(added)} in all) came after the index was made; "
            f"{_remove_index_hint(place)}"
        )


def _can_write(directory: Path) -> bool:
    try:
        with tempfile.TemporaryFile(prefix=TEMPORARY_PREFIX, dir=directory):
            return True
    except OSError:
        return False


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "muster" / "shard-index"


def _remove_index_hint(directory: Path) -> str:
    return f"remove {directory / MANIFEST_NAME} to have the shards indexed anew"


def _umask() -> int:
    # There is no way to read the umask without setting it; Linux shows it per process.
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    return 0o077


def _remove(path: str) -> None:
    Path(path).unlink(missing_ok=True)
