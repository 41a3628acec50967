"""Lengths of time as people and Slurm write them."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Annotated

from pydantic import BeforeValidator, PlainSerializer

_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_HUMAN = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|m|h|d)")
_SLURM = re.compile(r"(?:(\d+)-)?(\d+):(\d\d)(?::(\d\d))?")


def parse_duration(value: object) -> timedelta:
    """Read `90s`, `15m`, `48h`, `2d`, `1h30m`, or Slurm's `HH:MM:SS`, `D-HH:MM`, `D-HH:MM:SS`.

    A bare number other than 0 is refused: it is seconds to some tools and minutes to Slurm.

    Raises:
        ValueError: It is none of these.
    """
    if isinstance(value, timedelta):
        return value
    text = str(value).strip().lower()
    if text == "0":
        return timedelta(0)
    rest = _HUMAN.sub("", text).strip()
    if not rest and text:
        return timedelta(seconds=sum(float(number) * _UNITS[unit] for number, unit in _HUMAN.findall(text)))
    match = _SLURM.fullmatch(text)
    if match is None:
        raise ValueError("is not a length of time; write it like 90s, 15m, 48h, 2d or D-HH:MM:SS")
    days, first, second, third = match.groups()
    if third is None and days is None:  # Slurm reads MM:SS here, people mean HH:MM: refuse to guess
        raise ValueError("could be HH:MM or MM:SS; write it like 90s, 15m, 48h or HH:MM:SS")
    return timedelta(days=int(days or 0), hours=int(first), minutes=int(second), seconds=int(third or 0))


def format_duration(value: timedelta) -> str:
    """Write a duration the way `parse_duration` reads it, in the largest units that are exact: `2d`, `1h30m`, `45s`."""
    seconds = value.total_seconds()
    if seconds != int(seconds):
        return f"{seconds:g}s"
    left = int(seconds)
    parts = []
    for unit in ("d", "h", "m", "s"):
        count, left = divmod(left, _UNITS[unit])
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts) or "0s"


def slurm_time(value: timedelta) -> str:
    """Write a duration as slurm.conf and sbatch take it: `D-HH:MM:SS`, rounded up to whole seconds."""
    seconds = -int(-value.total_seconds() // 1)
    days, rest = divmod(seconds, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{days}-{hours:02d}:{minutes:02d}:{seconds:02d}"


Duration = Annotated[timedelta, BeforeValidator(parse_duration), PlainSerializer(format_duration, return_type=str)]
"""A pydantic field type for a length of time; see `parse_duration` for what may be written."""
