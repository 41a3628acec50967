"""The output directory of a preprocessing run: whose it is, what is done in it, and how it becomes a finished data set.

Everything in it is made by writing beside and renaming, and every task makes the same bytes of the same items, so no task ever
waits for another: a run may be killed anywhere, and go on later with any number of tasks.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.errors import JobError, OutsideError, StateError
from jobs.preprocess_settings import PreprocessConfig
from jobs.settings import flatten
from jobs.shard_index import (
    MANIFEST_NAME,
    TEMPORARY_PREFIX,
    Description,
    Manifest,
    read_manifest,
    replacing,
    write_error,
    write_index,
)
from jobs.shard_scan import BadSample, ShardPart, ShardRecord, file_sha256
from jobs.shards import shard_name

logger = logging.getLogger(__name__)

RUN_NAME = "preprocess.json"
"""What the run is; its presence makes the directory ours."""
ATTRIBUTION_NAME = "ATTRIBUTION"

_ITEMS_NAME = f"{TEMPORARY_PREFIX}items"
_PARTS_NAME = f"{TEMPORARY_PREFIX}parts"
_LOCK_NAME = f"{TEMPORARY_PREFIX}lock"
_FINISH_LOCK_NAME = f"{TEMPORARY_PREFIX}finish-lock"
_NO_LOCKS_HERE = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
_CHUNK_BYTES = 1 << 24


class ItemList(Sequence[str]):
    """The items of a run, one JSON string a line, found by number without holding the strings in memory."""

    def __init__(self, path: Path) -> None:
        self._data = np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.empty(0, dtype=np.uint8)
        ends: list[npt.NDArray[np.int64]] = [np.array([-1])]
        for start in range(0, len(self._data), _CHUNK_BYTES):
            ends.append(np.flatnonzero(self._data[start : start + _CHUNK_BYTES] == ord("\n")) + start)
        self._ends = np.concatenate(ends)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[at] for at in range(*number.indices(len(self)))]
        if not 0 <= number < len(self):
            raise IndexError(number)
        return json.loads(self._data[self._ends[number] + 1 : self._ends[number + 1]].tobytes())


class PreprocessOutput:
    """The output directory of one run; see the module."""

    def __init__(self, config: PreprocessConfig) -> None:
        self._config = config
        self.directory = config.output.absolute()
        self._parts = self.directory / _PARTS_NAME

    @contextmanager
    def claimed(self, owner: str) -> Iterator[None]:
        """Make the directory this run's, or find that it already is, and keep other runs out while the block runs.

        All tasks of one job are one `owner` and share the directory. The kernel lets go of the lock when the last process that
        holds it ends, however it ends. Where the file system has no locks (Lustre mounted without `flock`), a warning says so
        and the run goes on: two runs with the same settings would only write the same bytes twice.

        Raises:
            StateError: It holds something else, or a run with other settings, or somebody is writing into it now.
            OutsideError: It cannot be made or written to.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(self.directory, error) from error
        self._refuse_others_files()
        with self._locked_for(owner):
            mine = {"made_by": "muster jobs.preprocess", "version": 1, "settings": self._config.identity()}
            run_path = self.directory / RUN_NAME
            _publish(run_path, [json.dumps(mine, indent=2, sort_keys=True)])
            self._check_same_run(run_path)
            yield

    def finished(self) -> Manifest | None:
        """Return the manifest of a finished run whose shards are all there, or None.

        If shards have gone since, the manifest is taken back, so that the run makes them again.
        """
        manifest = read_manifest(self.directory)
        if manifest is None:
            return None
        damaged = [record.name for record in manifest.shards if record.samples and not self._has_size(record)]
        if not damaged:
            return manifest
        logger.warning(
            "%s: %s are missing or have another size; making the shards again", self.directory, ", ".join(damaged[:5])
        )
        (self.directory / MANIFEST_NAME).unlink(missing_ok=True)
        return None

    def items(self, listed: Iterable[str]) -> ItemList:
        """Return the run's list of items: the one that a task or an earlier attempt fixed, or else `listed`.

        `listed` is read only if there is no list yet. A source that changes while the run goes on changes nothing in the list.
        """
        path = self.directory / _ITEMS_NAME
        _publish(path, (json.dumps(item) for item in listed))
        return ItemList(path)

    def done_part(self, number: int) -> ShardPart | None:
        """Return what is known of shard `number` if it is done and its file is whole; None if it must be made."""
        part = self._read_part(number)
        if part is None:
            return None
        path = self.directory / shard_name(number)
        try:
            if not part.record.samples or (self._has_size(part.record) and file_sha256(path) == part.record.sha256):
                return part
        except OSError as error:
            raise OutsideError(f"{path}: cannot be read: {error.strerror}; is the file system well?") from error
        logger.warning("%s is damaged (size or checksum differ) and is made again", path)
        return None

    def save_part(self, number: int, part: ShardPart) -> None:
        """Note that shard `number` is done. Its tar file must have its name by now."""
        about = {"record": dataclasses.asdict(part.record), "bad": part.bad}
        try:
            self._parts.mkdir(exist_ok=True)
        except OSError as error:
            raise write_error(self._parts, error) from error
        with replacing(self._part_path(number)) as file:
            np.savez(
                file,
                rows=part.rows,
                keys=np.frombuffer(part.keys, dtype=np.uint8),
                about=np.frombuffer(json.dumps(about).encode(), dtype=np.uint8),
            )

    def count_parts(self) -> int:
        """Return how many shards are done, by any task."""
        try:
            return sum(1 for name in os.listdir(self._parts) if not name.startswith("."))  # noqa: PTH208 - millions of names
        except FileNotFoundError:
            return 0  # another task has finished the run and cleared up

    def finish(self, shards: int, *, items: int, description: Description) -> Manifest | None:
        """Write the index if all shards are done and nobody has, and clear up; None if some are still being made.

        Raises:
            JobError: More pictures are bad than `max_bad` allows; `bad.jsonl` has been written.
        """
        with _locked(self.directory / _FINISH_LOCK_NAME):
            manifest = read_manifest(self.directory)
            if manifest is not None:
                self._clear_up()
                return manifest
            if self.count_parts() < shards:
                return None
            self._check_bad((part.bad for part in self._all_parts(shards)), items)
            terms = [f"{name}: {text}" for name, text in (
                ("Source", description.source), ("Licence", description.licence), ("Attribution", description.attribution),
            ) if text]  # fmt: skip
            with replacing(self.directory / ATTRIBUTION_NAME) as file:
                file.write(("\n".join(terms) + "\n" + _ALTERED).encode())
            manifest = write_index(
                self.directory,
                self._all_parts(shards),
                description=dataclasses.replace(
                    description, preprocessed=True, image_size_px=self._config.image.size_px
                ),
            )
            self._clear_up()
            return manifest

    def write_bad(self, bad: Sequence[BadSample]) -> Path:
        """Write `bad.jsonl` ahead of the end, for a run that stops because of what it names."""
        path = self.directory / "bad.jsonl"
        with replacing(path) as file:
            file.writelines(json.dumps(entry._asdict()).encode() + b"\n" for entry in bad)
        return path

    def too_many_bad(self, bad: Sequence[BadSample], items: int) -> JobError:
        """Make the error for more bad pictures than allowed, and write down which they are."""
        path = self.write_bad(bad)
        named = "\n".join(f"  {entry.name}: {entry.reason}" for entry in bad[:10])
        return JobError(
            f"{len(bad)} of {items} pictures are bad, more than the {self._config.bad_allowed(items)} that max_bad "
            f"({self._config.max_bad}) allows; {path} names them: repair or remove them, or raise max_bad. The first:\n{named}"
        )

    def _refuse_others_files(self) -> None:
        try:
            names = sorted(path.name for path in self.directory.iterdir())
        except OSError as error:
            raise write_error(self.directory, error) from error
        theirs = [name for name in names if not name.startswith(TEMPORARY_PREFIX)]
        if theirs and RUN_NAME not in theirs:
            shown = ", ".join(theirs[:3]) + (", ..." if len(theirs) > 3 else "")
            raise StateError(
                f"output {self.directory}: holds {len(theirs)} files that no preprocessing made ({shown}); nothing was touched"
                ": choose a directory that is empty or absent"
            )

    @contextmanager
    def _locked_for(self, owner: str) -> Iterator[None]:
        path = self.directory / _LOCK_NAME
        with _open_lock(path) as descriptor:
            is_alone = _try_lock(descriptor, fcntl.LOCK_EX, path)
            if is_alone is None:  # nobody can tell who else is here, so nothing of anybody's is touched
                yield
                return
            if is_alone:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, owner.encode(), 0)
                self._remove_leftovers()  # alone here: whatever is unfinished belongs to the dead
            deadline_s = time.monotonic() + 10
            while not _try_lock(descriptor, fcntl.LOCK_SH, path) and time.monotonic() < deadline_s:
                time.sleep(0.05)  # somebody else holds it exclusively for the instant it takes to write its name
            holder = os.pread(descriptor, 4096, 0).decode("utf-8", "replace")
            if holder != owner:
                raise StateError(
                    f"output {self.directory}: {holder} is preprocessing into it right now; wait for it to end, or choose "
                    "another directory"
                )
            yield

    def _remove_leftovers(self) -> None:
        for path in (*self.directory.glob(f"{TEMPORARY_PREFIX}*"), *self._parts.glob(f"{TEMPORARY_PREFIX}*")):
            if path.name not in (_ITEMS_NAME, _PARTS_NAME, _LOCK_NAME, _FINISH_LOCK_NAME):
                path.unlink(missing_ok=True)

    def _check_bad(self, found: Iterable[tuple[BadSample, ...]], items: int) -> None:
        bad: list[BadSample] = []
        for part in found:
            bad += part
        if len(bad) > self._config.bad_allowed(items):
            raise self.too_many_bad(bad, items)

    def _all_parts(self, shards: int) -> Iterator[ShardPart]:
        for number in range(shards):
            part = self._read_part(number)
            if part is None:
                raise OutsideError(
                    f"{self._part_path(number)}: damaged or gone; run it again, and shard {number} is made anew"
                )
            yield part

    def _read_part(self, number: int) -> ShardPart | None:
        path = self._part_path(number)
        try:
            # Opened here: given a path, numpy leaves a file that is no archive open.
            with path.open("rb") as file, np.load(file, allow_pickle=False) as saved:
                about = json.loads(saved["about"].tobytes())
                return ShardPart(
                    record=ShardRecord(**about["record"]),
                    rows=saved["rows"],
                    keys=saved["keys"].tobytes(),
                    bad=tuple(BadSample(*entry) for entry in about["bad"]),
                )
        except FileNotFoundError:
            return None
        except Exception as error:  # numpy and zipfile answer a damaged file with a dozen kinds of exception
            logger.warning("%s is damaged (%s); its shard is made again", path, error)
            path.unlink(missing_ok=True)
            return None

    def _part_path(self, number: int) -> Path:
        return self._parts / f"{shard_name(number)}.npz"

    def _has_size(self, record: ShardRecord) -> bool:
        try:
            return (self.directory / record.name).stat().st_size == record.size
        except FileNotFoundError:
            return False

    def _check_same_run(self, run_path: Path) -> None:
        try:
            settings = json.loads(run_path.read_bytes())["settings"]
            then: Mapping[str, Any] = flatten(settings)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StateError(
                f"{run_path}: not written by a preprocessing run ({error}); choose another directory"
            ) from error
        now = flatten(json.loads(json.dumps(self._config.identity())))
        differing = sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))
        if differing:
            lines = [f"  {key}: {then.get(key)} there, {now.get(key)} asked for" for key in differing]
            raise StateError(
                "\n".join(
                    [
                        f"output {self.directory}: holds shards made with other settings:",
                        *lines,
                        "Choose another directory",
                    ]
                )
            )

    def _clear_up(self) -> None:
        """Remove what only an unfinished run needs. The locks stay: others may hold them."""
        shutil.rmtree(self._parts, ignore_errors=True)
        (self.directory / _ITEMS_NAME).unlink(missing_ok=True)


_ALTERED = "The pictures were scaled and re-encoded by Muster (jobs.preprocess); preprocess.json says how.\n"


def _publish(path: Path, lines: Iterable[str]) -> None:
    """Write a file unless it is there: of several tasks that try, one wins, and nobody ever sees half of it."""
    if path.exists():
        return
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            file.writelines(line.encode() + b"\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        try:
            path.hardlink_to(temporary)  # unlike a rename, fails if the name is taken
        except FileExistsError:
            return
        except OSError:  # no hard links on this file system; all tasks would write the same
            temporary.replace(path)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _open_lock(path: Path) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise write_error(path, error) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, kind: int, path: Path) -> bool | None:
    """Say whether the lock is held now; None where the file system has no locks, so that nobody can hold any."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS_HERE:
            raise write_error(path, error) from error
        logger.warning(
            "%s: this file system has no locks (%s), so nothing keeps a second run out", path.parent, error.strerror
        )
        return None
    return True


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock alone, waiting for it as long as it takes: whoever holds it writes an index, or dies and frees it."""
    with _open_lock(path) as descriptor:
        while _try_lock(descriptor, fcntl.LOCK_EX, path) is False:
            time.sleep(0.1)
        yield
