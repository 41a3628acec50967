"""Lengths of time are read as people and Slurm write them, and never guessed."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.durations import format_duration, parse_duration, slurm_time


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90),
        ("15m", 900), ("15 min", 900), ("48h", 172_800), ("2d", 172_800), ("1h30m", 5_400), ("1.5h", 5_400), ("0", 0), (0, 0),
        ("2-00:00:00", 172_800), ("1-12:30", 131_400), ("48:00:00", 172_800), ("00:05:00", 300),
    ],
)  # fmt: skip
def test_forms(text: object, seconds: int) -> None:
    """Every documented form has the length it says."""
    assert parse_duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["", "soon", "30", 30, "12:30", "-5m", "5 weeks", "1h-2", None, "h", "1:2:3:4"])
def test_what_is_ambiguous_or_wrong_is_refused(text: object) -> None:
    """Bare numbers (minutes to Slurm, seconds to others), MM:SS and nonsense raise ValueError."""
    with pytest.raises(ValueError, match="write it like"):
        parse_duration(text)


@given(st.integers(min_value=0, max_value=10**8))
def test_format_and_parse_are_inverse(seconds: int) -> None:
    """What is written is read back as the same length, in our own form and in Slurm's."""
    value = timedelta(seconds=seconds)
    assert parse_duration(format_duration(value)) == value
    assert parse_duration(slurm_time(value)) == value


def test_slurm_time_rounds_up() -> None:
    """A fraction of a second is never cut off a time limit."""
    assert slurm_time(timedelta(seconds=59.2)) == "0-00:01:00"


@given(st.text(max_size=20))
def test_any_text_gives_a_duration_or_a_value_error(text: str) -> None:
    """No text makes the parser fail in another way."""
    try:
        assert parse_duration(text) >= timedelta(0)
    except ValueError:
        pass
