"""What scripts read is JSON that any language can read; what logs hold is one line a record."""

from __future__ import annotations

import json
import logging
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from cluster.output import print_json, print_table, set_up_logging


def test_json_has_no_python_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Times are ISO 8601, lengths of time are seconds, sets are lists, no limit is null."""
    value = {
        "at": datetime(2026, 11, 21, 12, tzinfo=timezone.utc),
        "limit": timedelta(days=2),
        "none": timedelta.max,
        "flags": frozenset({"b", "a"}),
        "path": Path("/x"),
    }
    print_json(value)
    expected = {"at": "2026-11-21T12:00:00+00:00", "limit": 172800.0, "none": None, "flags": ["a", "b"], "path": "/x"}
    assert json.loads(capsys.readouterr().out) == expected


def test_a_log_has_one_line_a_record(capsys: pytest.CaptureFixture[str]) -> None:
    """A long warning in a pipe is neither folded nor padded."""
    set_up_logging(0)
    logging.getLogger("x").warning("word " * 60)
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.rstrip("\n").endswith("word ")
    set_up_logging(0)


def test_a_table_in_a_pipe_keeps_every_cell_whole(capsys: pytest.CaptureFixture[str]) -> None:
    """Cells are not cut where nobody watches; an absent value is an empty cell."""
    print_table(["job", "state"], [["12_3", "cancelled"], [None, "x" * 100]])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["12_3", "cancelled"]
    assert lines[2].strip() == "x" * 100
