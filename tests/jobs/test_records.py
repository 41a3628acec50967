from __future__ import annotations

import errno
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as test_settings
from hypothesis import strategies as st

from jobs.order import SampleOrder
from jobs.records import JsonLines, SampleCount, count_samples, lineage, read_json_lines

KEYS = [f"k{number}" for number in range(10)]
BATCH = 4


def record(attempt: int, step: int, *, ranks: int = 1, rank: int = 0) -> dict[str, Any]:
    """What an honest trainer writes for one rank's part of a step."""
    positions = np.arange(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    indices = SampleOrder(len(KEYS), 0).locate(step * BATCH + positions)[1]
    return {"attempt": attempt, "step": step, "positions": positions.tolist(), "keys": [KEYS[i] for i in indices]}


def test_an_uninterrupted_run_repeats_and_misses_nothing() -> None:
    """Three and a half epochs in order: every sample once an epoch, the unfinished epoch filled as far as it goes."""
    counted = count_samples([record(1, step) for step in range(9)], keys=KEYS, batch_size=BATCH)
    assert counted == SampleCount(steps=9, seen=36, repeated=0, missed=0)


def test_work_that_was_not_saved_does_not_count() -> None:
    """An attempt that went to step 6 and was resumed from step 4 is replaced from step 4 on."""
    records = [record(1, step) for step in range(7)] + [record(2, step) for step in range(4, 9)]
    assert count_samples(records, keys=KEYS, batch_size=BATCH) == SampleCount(steps=9, seen=36, repeated=0, missed=0)


@test_settings(deadline=None)  # a machine under load is slow, not wrong
@given(ends=st.lists(st.tuples(st.integers(1, 8), st.integers(0, 7)), max_size=5), shuffle=st.randoms())
def test_any_chain_of_exact_resumes_counts_as_uninterrupted(ends: list[tuple[int, int]], shuffle: Any) -> None:
    """However often it is stopped and however much is done again, with records of two ranks in any order of files."""
    records, start, attempt = [], 0, 1
    for steps, lost in ends:
        records += [
            record(attempt, step, ranks=2, rank=rank) for step in range(start, start + steps) for rank in (0, 1)
        ]
        start, attempt = max(start, start + steps - lost), attempt + 1
    records += [record(attempt, step, ranks=2, rank=rank) for step in range(start, start + 5) for rank in (0, 1)]
    shuffle.shuffle(records)
    counted = count_samples(records, keys=KEYS, batch_size=BATCH)
    assert (counted.repeated, counted.missed) == (0, 0)
    assert counted.seen == counted.steps * BATCH == (start + 5) * BATCH


def test_a_restarted_epoch_repeats_and_misses() -> None:
    """The usual resume, which begins the epoch's order anew, is seen for what it is."""
    first = [record(1, 0)]
    again = {**record(1, 0), "attempt": 2, "step": 1}  # the same four keys once more
    assert count_samples([*first, again], keys=KEYS, batch_size=BATCH) == SampleCount(
        steps=2, seen=8, repeated=4, missed=4
    )


def test_a_hole_is_missed() -> None:
    """Steps without any record are missed samples, not an absence of evidence."""
    counted = count_samples([record(1, 0), record(1, 2)], keys=KEYS, batch_size=BATCH)
    assert (counted.repeated, counted.missed) == (0, 4)


def test_one_sided_records_are_missed() -> None:
    """If one rank's file is lost, its share of the samples is missed."""
    counted = count_samples([record(1, step, ranks=2, rank=0) for step in range(5)], keys=KEYS, batch_size=BATCH)
    assert (counted.seen, counted.missed) == (10, 10)


def test_nothing_is_nothing() -> None:
    """A run without records has seen, repeated and missed nothing."""
    assert count_samples([], keys=KEYS, batch_size=BATCH) == SampleCount(steps=0, seen=0, repeated=0, missed=0)


def test_lineage_is_in_order_of_steps() -> None:
    """The steps that count come in order, each with the records of the attempt that counts."""
    steps = lineage([record(2, 1), record(1, 1), record(1, 0), record(2, 2)])
    assert [(step, parts[0]["attempt"]) for step, parts in steps.items()] == [(0, 1), (1, 2), (2, 2)]


def test_a_torn_line_is_passed_over_and_not_grown(tmp_path: Path) -> None:
    """A kill in the middle of a line costs that line alone: what the next attempt appends stands on lines of its own."""
    path = tmp_path / "lines.jsonl"
    with JsonLines(path) as lines:
        lines.append({"step": 0})
        lines.append({"step": 1})
    path.write_bytes(path.read_bytes()[:-4])
    with JsonLines(path) as lines:
        lines.append({"step": 1, "attempt": 2})
    assert list(read_json_lines(path)) == [{"step": 0}, {"step": 1, "attempt": 2}]


def test_lines_are_there_before_the_file_is_closed(tmp_path: Path) -> None:
    """A record survives the death of the process that wrote it."""
    lines = JsonLines(tmp_path / "lines.jsonl")
    lines.append({"step": 0})
    assert list(read_json_lines(tmp_path / "lines.jsonl")) == [{"step": 0}]
    lines.close()


def test_no_file_is_no_records(tmp_path: Path) -> None:
    """Reading records that were never written gives none."""
    assert list(read_json_lines(tmp_path / "none.jsonl")) == []


class FullDisk:
    """A file that takes so many bytes more, as a disk that fills up does: a part of the last write, then an error."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room
        self.closed = False

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        part = data[: self.room]
        self.room -= len(part)
        return int(self.file.write(part))

    def close(self) -> None:
        self.closed = True
        self.file.close()


@given(rooms=st.lists(st.integers(0, 25), min_size=1, max_size=12))
def test_a_full_disk_loses_no_line_and_writes_none_twice(rooms: list[int]) -> None:
    """Wherever in a line the disk fills up, and however often: afterwards every line is there once, in order."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lines.jsonl"
        lines = JsonLines(path)
        disk = FullDisk(lines._file, 0)
        lines._file = disk  # type: ignore[assignment] # the two methods that are used
        for number, room in enumerate(rooms):
            disk.room = room
            lines.append({"step": number})
        disk.room = 1_000_000
        lines.flush()
        assert [record["step"] for record in read_json_lines(path)] == list(range(len(rooms)))
        lines.close()


def test_a_full_disk_is_a_warning_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One warning when it begins, one when it is over, one at the end for what is lost; memory does not grow without end."""
    lines = JsonLines(tmp_path / "lines.jsonl", lines_kept=3)
    disk = FullDisk(lines._file, 0)
    lines._file = disk  # type: ignore[assignment] # the two methods that are used
    for number in range(5):
        lines.append({"step": number})
    disk.room = 1_000
    lines.append({"step": 5})
    assert [record["step"] for record in read_json_lines(tmp_path / "lines.jsonl")] == [2, 3, 4, 5]
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "No space left on device" in caplog.records[0].message
    assert "but for 2" in caplog.records[1].message
    disk.room = 0
    lines.append({"step": 6})
    lines.close()
    lines.close()
    assert "1 lines are lost" in caplog.text
