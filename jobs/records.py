"""Lines of JSON that a run appends as it goes, and what they prove: which samples were really trained on.

Only whole lines count. A process that is killed while writing leaves a torn last line; the next attempt starts on a new line
and readers pass over what is not JSON.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any


class JsonLines:
    """Appends records to a file, one JSON object a line, each handed to the operating system at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)
        if self._file.tell() and not _ends_with_newline(path):
            self._file.write(b"\n")

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line. One write call, so that a kill tears at most this line."""
        self._file.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")

    def close(self) -> None:
        """Close the file; more than once does no harm."""
        self._file.close()

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
