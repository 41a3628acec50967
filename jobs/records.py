"""Lines of JSON that a run appends as it goes, and what they prove: which samples were really trained on.

Only whole lines count. A process that is killed while writing leaves a torn last line; the next attempt starts on a new line
and readers pass over what is not JSON. A full disk does not stop a run: what cannot be written waits in memory and is written
in its order once there is room again.
"""

from __future__ import annotations

import errno
import json
import logging
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

logger = logging.getLogger(__name__)

_LINES_KEPT = 100_000  # a few dozen MB of the longest lines, and hours of training


class JsonLines:
    """Appends records to a file, one JSON object a line, each handed to the operating system at once.

    Args:
        path: The file; made if it is not there.
        lines_kept: How many lines may wait in memory while they cannot be written; beyond that the oldest are lost.
    """

    def __init__(self, path: Path, *, lines_kept: int = _LINES_KEPT) -> None:
        self._path = path
        self._waiting: deque[bytes] = deque()
        self._lines_kept = lines_kept
        self._lost = 0
        self._is_failing = False
        self._file = path.open("ab", buffering=0)
        self._is_torn = bool(self._file.tell()) and not _ends_with_newline(path)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line, after those that still wait. One write call a line, so that a kill tears at most one.

        Where it cannot be written, it waits for the next `append` or `flush`; the first time, a warning says so.
        """
        self._waiting.append(json.dumps(record, separators=(",", ":")).encode() + b"\n")
        self.flush()
        while len(self._waiting) > self._lines_kept:
            self._waiting.popleft()
            self._lost += 1

    def flush(self) -> None:
        """Try again to write what waits; never raises."""
        try:
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            if not self._is_failing:
                logger.warning("%s: cannot be written (%s); its lines are kept in memory", self._path, error.strerror)
            self._is_failing = True
        else:
            if self._is_failing:
                lost = f", but for {self._lost} that were too many to keep" if self._lost else ""
                logger.warning("%s: written again, with all lines that waited%s", self._path, lost)
            self._is_failing, self._lost = False, 0

    def close(self) -> None:
        """Close the file; more than once does no harm. What cannot be written now is lost, which a warning says."""
        if self._file.closed:
            return
        self.flush()
        if self._waiting:
            logger.warning("%s: %d lines are lost", self._path, self._lost + len(self._waiting))
            self._waiting.clear()
        try:
            self._file.close()
        except OSError as error:  # some file systems tell only now that what they took has found no room
            logger.warning("%s: closing it failed (%s); its last lines may be lost", self._path, error.strerror)

    def _write(self, line: bytes) -> None:
        data = b"\n" + line if self._is_torn else line
        written = self._file.write(data) or 0
        if written:
            self._is_torn = data[written - 1 : written] != b"\n"
        if written < len(data) - 1:  # only its newline missing, it is a whole line, and must not come twice
            raise OSError(errno.ENOSPC, "only a part of a line found room")

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects in a file of JSON lines, passing over torn ones; nothing if there is no such file."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


def lineage(records: Iterable[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
    """Keep what the run is made of: for each step the records of the last attempt that trained it.

    An attempt that starts at step s takes the place of everything from s on that earlier attempts did: they were stopped before
    that was saved. Attempts are numbered in the order in which they ran; records may come in any order (several ranks' files).

    Args:
        records: With `attempt` and `step` (the number of steps done before it: the first is 0).

    Returns:
        Step -> its records, in order of steps.
    """
    by_attempt: defaultdict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        by_attempt[int(record["attempt"])].append(record)
    steps: defaultdict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for attempt in sorted(by_attempt):
        start = min(int(record["step"]) for record in by_attempt[attempt])
        for step in [step for step in steps if step >= start]:
            del steps[step]
        for record in by_attempt[attempt]:
            steps[int(record["step"])].append(record)
    return dict(sorted(steps.items()))


@dataclass(frozen=True)
class SampleCount:
    """How a run's samples compare with a run that was never stopped."""

    steps: int
    """Steps that have records."""
    seen: int
    """Samples trained on over the committed lineage."""
    repeated: int
    """Times a sample came again within its epoch."""
    missed: int
    """Samples of a finished epoch that never came, and places of the unfinished one that nothing filled."""


def count_samples(records: Iterable[Mapping[str, Any]], *, keys: Sequence[str], batch_size: int) -> SampleCount:
    """Count repeated and missed samples over all attempts of a run, from what was loaded, not from what should have been.

    A damaged sample that was replaced by another counts as missed, and its replacement as repeated: that is what happened.

    Args:
        records: Lines of every rank's `samples-rank<r>.jsonl`: `attempt`, `step`, `positions` (places in the global batch) and
            `keys` (what was decoded for them).
        keys: Every key of the data set.
        batch_size: The global batch.
    """
    steps = lineage(records)
    epochs: defaultdict[int, Counter[str]] = defaultdict(Counter)
    for step, parts in steps.items():
        for part in parts:
            for position, key in zip(part["positions"], part["keys"], strict=True):
                epochs[(step * batch_size + int(position)) // len(keys)][str(key)] += 1
    seen = sum(counter.total() for counter in epochs.values())
    repeated = sum(count - 1 for counter in epochs.values() for count in counter.values())
    due = (max(steps) + 1) * batch_size if steps else 0
    missed = 0
    for epoch in range(-(-due // len(keys))):
        places = min(len(keys), due - epoch * len(keys))
        missed += max(0, places - len(epochs[epoch]))
    return SampleCount(steps=len(steps), seen=seen, repeated=repeated, missed=missed)


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"
