"""Single values as Slurm writes them, in text and in JSON.

Every function takes anything and returns None, or an empty collection, for what it cannot read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta, timezone
from typing import Any

from cluster.errors import InputError
from cluster.hostlist import expand
from cluster.slurm_records import UNLIMITED

INFINITE = object()
"""What `read_number` returns for a number that Slurm calls infinite."""

# slurm.h: INFINITE is the largest value of a width and NO_VAL the one before it. Versions before 23.02 print them as they are;
# -1 and -2 are the same two after a cast.
_NO_VALUES = frozenset({0xFFFE, 0xFFFFFFFE, 0xFFFFFFFFFFFFFFFE, -2})
_INFINITES = frozenset({0xFFFF, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF, -1})

_NOTHING = frozenset({"", "(null)", "n/a", "n/s", "none", "unknown", "none assigned", "not_set", "invalid"})
"""What Slurm prints where there is no value (lower case)."""

_CLOCK = re.compile(r"(?:(\d{1,6})-)?(\d{1,6})(?::(\d{1,2}))?(?::(\d{1,2})(?:\.\d+)?)?")
_GPU = re.compile(
    r"(?:^|,)(?:gres[/:])?gpu(?::([A-Za-z0-9_.+-]*[A-Za-z_.+-][A-Za-z0-9_.+-]*))?(?:[:=](\d{1,9}))?(?=[,(]|$)"
)
_INDICES = re.compile(r"\(IDX:([0-9,-]+)\)")

# The one-letter marks that sinfo and squeue put behind a node's state (sinfo(1), "NODE STATE CODES").
_STATE_MARKS = {
    "*": "NOT_RESPONDING",
    "~": "POWERED_DOWN",
    "#": "POWERING_UP",
    "!": "POWER_DOWN",
    "%": "POWERING_DOWN",
    "$": "MAINTENANCE",
    "@": "REBOOT_REQUESTED",
    "^": "REBOOT_ISSUED",
    "-": "PLANNED",
}
_STATE_SYNONYMS = {
    "ALLOC": "ALLOCATED",
    "COMP": "COMPLETING",
    "INVAL": "INVALID_REG",
    "MAINT": "MAINTENANCE",
    "MIX": "MIXED",
    "NO_RESPOND": "NOT_RESPONDING",
    "UNK": "UNKNOWN",
}

JOB_STATE_FLAGS = (
    "COMPLETING",
    "STAGE_OUT",
    "CONFIGURING",
    "RESIZING",
    "REQUEUED",
    "REQUEUE_FED",
    "REQUEUE_HOLD",
    "SPECIAL_EXIT",
    "STOPPED",
    "REVOKED",
    "RESV_DEL_HOLD",
    "SIGNALING",
)
"""Job state flags in the order in which Slurm lets them hide the base state when it prints one word (job_state_string)."""


def says_nothing(value: object) -> bool:
    """Tell whether a value is one of Slurm's ways to say that there is none, or no limit, rather than something unreadable."""
    if isinstance(value, str):
        return read_text(value) is None or read_number(value) in (INFINITE, 0)
    if isinstance(value, Mapping):
        return value.get("set") is not True or read_number(value) in (INFINITE, None, 0)
    if isinstance(value, int | float):
        return read_number(value) in (INFINITE, None, 0)
    return not value


def read_text(value: object) -> str | None:
    """Return a text value, or None for every way in which Slurm says that there is none."""
    if not isinstance(value, str):
        return None
    text = value.strip()
    return None if text.lower() in _NOTHING else text


def read_number(value: object) -> Any:
    """Return an int or float, `INFINITE`, or None.

    Takes plain numbers, numbers in text, and `{"set": true, "infinite": false, "number": 5}` of Slurm >= 23.02.
    """
    if isinstance(value, Mapping):
        if value.get("infinite") is True:
            return INFINITE
        return read_number(value.get("number")) if value.get("set") is True else None
    if isinstance(value, str):
        text = value.strip()
        if text.upper() in {"UNLIMITED", "INFINITE"}:
            return INFINITE
        if re.fullmatch(r"-?\d{1,20}", text):
            value = int(text)
        elif re.fullmatch(r"-?\d{1,20}\.\d{1,20}", text):
            value = float(text)
        else:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if value in _INFINITES:
        return INFINITE
    return None if value in _NO_VALUES else value


def read_count(value: object) -> int | None:
    """Return a whole number of things, zero or more; None also for an infinite one."""
    number = read_number(value)
    return int(number) if isinstance(number, int | float) and 0 <= number < 2**63 else None


def read_signed(value: object) -> int | None:
    """Return a whole number that may be negative, such as a nice value. No sentinel values are looked for."""
    if isinstance(value, Mapping):
        return read_signed(value.get("number")) if value.get("set") is True else None
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,18}", value.strip()):
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31 else None


def read_time(value: object) -> datetime | None:
    """Return a point in time in UTC from seconds since 1970 or `YYYY-MM-DDTHH:MM:SS`. 0, None and Unknown are None.

    Text without a zone is taken as UTC: `SlurmCliClient` runs every query with TZ=UTC and SLURM_TIME_FORMAT=%s.
    """
    number = read_number(value)
    if isinstance(number, int | float):
        # The upper bound is the year 9999, the last one that datetime knows.
        return datetime.fromtimestamp(number, timezone.utc) if 0 < number < 253_402_300_800 else None
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value.strip())
        except ValueError:
            return None
        return moment.replace(tzinfo=timezone.utc) if moment.tzinfo is None else _as_utc(moment)
    return None


def _as_utc(moment: datetime) -> datetime | None:
    try:
        return moment.astimezone(timezone.utc)
    except OverflowError:
        return None


def read_minutes(value: object) -> timedelta | None:
    """Return a time limit that is given in minutes, `UNLIMITED` for an infinite one."""
    return _read_length(value, seconds_per_unit=60)


def read_seconds(value: object) -> timedelta | None:
    """Return a length of time that is given in seconds, `UNLIMITED` for an infinite one."""
    return _read_length(value, seconds_per_unit=1)


def _read_length(value: object, *, seconds_per_unit: int) -> timedelta | None:
    number = read_number(value)
    if number is INFINITE:
        return UNLIMITED
    if not isinstance(number, int | float) or not 0 <= number < 10**12:
        return None
    return timedelta(seconds=number * seconds_per_unit)


def read_clock(value: object) -> timedelta | None:
    """Return a length of time from `MM:SS`, `HH:MM:SS`, `D-HH:MM:SS`, `D-HH`, or `UNLIMITED`. A bare number is refused."""
    if not isinstance(value, str):
        return None
    text = value.strip()
    if text.upper() in {"UNLIMITED", "INFINITE"}:
        return UNLIMITED
    match = _CLOCK.fullmatch(text)
    if match is None:
        return None
    days, first, second, third = match.groups()
    if days is None and second is None:
        return None
    parts = [int(part) for part in (first, second, third) if part is not None]
    if days is not None:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    else:
        hours, minutes, seconds = (0, *parts)[-3:] if len(parts) == 2 else (*parts, 0)[:3]
    return timedelta(days=int(days or 0), hours=hours, minutes=minutes, seconds=seconds)


def read_names(value: object) -> tuple[str, ...]:
    """Return the names of a hostlist (text or a list of names); empty where there are none or it cannot be read."""
    if isinstance(value, list):
        value = ",".join(item for item in value if isinstance(item, str))
    if not isinstance(value, str):
        return ()
    try:
        return tuple(expand(value))
    except InputError:
        return ()


def read_list(value: object) -> tuple[str, ...]:
    """Return the words of a comma-separated text or a JSON list."""
    if isinstance(value, str):
        text = read_text(value)
        value = text.split(",") if text else []
    if not isinstance(value, list):
        return ()
    return tuple(item.strip() for item in value if isinstance(item, str) and item.strip())


def read_tres(value: object) -> dict[str, str]:
    """Return `cpu=2,mem=32000M,gres/gpu=8` as a mapping, values as written."""
    pairs = (item.partition("=") for item in read_list(value))
    return {name: amount for name, separator, amount in pairs if separator and name}


def read_gpus(value: object) -> dict[str, int]:
    """Return GPUs by type from a GRES text: `gpu:a100:4(IDX:0-3),gpu:2` is {"a100": 4, "": 2}; zero counts are left out."""
    text = re.sub(r"\([^()]*\)", "", value) if isinstance(value, str) else ""
    counts: dict[str, int] = {}
    for match in _GPU.finditer(text):
        count = int(match.group(2)) if match.group(2) else 1
        if count:
            counts[match.group(1) or ""] = counts.get(match.group(1) or "", 0) + count
    return counts


def read_tres_gpus(tres: Mapping[str, str]) -> dict[str, int]:
    """Return GPUs by type from trackable resources, where `gres/gpu` counts those of all types once more."""
    by_name = {name: read_count(amount) for name, amount in tres.items() if name.startswith("gres/gpu")}
    typed = {name.partition(":")[2]: count for name, count in by_name.items() if name.startswith("gres/gpu:") and count}
    untyped = (by_name.get("gres/gpu") or 0) - sum(typed.values())
    return {**typed, "": untyped} if untyped > 0 else typed


def read_gpu_indices(value: object) -> tuple[int, ...]:
    """Return the GPU indices in `gpu:a100:4(IDX:0-2,5)`: (0, 1, 2, 5)."""
    indices: list[int] = []
    for part in _INDICES.findall(value) if isinstance(value, str) and "gpu" in value else ():
        try:
            indices.extend(int(name) for name in expand(f"[{part}]"))
        except InputError:
            return ()
    return tuple(indices)


def read_node_states(*values: object) -> frozenset[str]:
    """Return base state and flags of a node from `IDLE+DRAIN`, `down*`, or lists of words, in Slurm's long words."""
    words: set[str] = set()
    for value in values:
        for item in value if isinstance(value, list) else [value]:
            for word in item.upper().split("+") if isinstance(item, str) else ():
                bare = word.strip()
                while bare and bare[-1] in _STATE_MARKS:
                    words.add(_STATE_MARKS[bare[-1]])
                    bare = bare[:-1]
                if bare:
                    words.add(_STATE_SYNONYMS.get(bare, bare))
    return frozenset(words)


def read_job_state(value: object) -> tuple[str, frozenset[str]]:
    """Return a job's state in one word and the words beside it, from one word or a list of them."""
    words = [item.strip().upper() for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)]
    words = [word for word in words if word]
    if not words:
        return "UNKNOWN", frozenset()
    state = next((flag for flag in JOB_STATE_FLAGS if flag in words), words[0])
    return state, frozenset(words) - {state}


def read_exit_status(value: object) -> tuple[int | None, int | None]:
    """Return exit code and signal from `1:0`, a raw wait status, or the verbose object of Slurm >= 23.02.

    A signal of 0 is None: the process was not killed by one.
    """
    if isinstance(value, Mapping):
        signal = value.get("signal")
        number = signal.get("id", signal.get("signal_id")) if isinstance(signal, Mapping) else None
        return read_count(value.get("return_code")), read_count(number) or None
    if isinstance(value, str):
        code, separator, signal_text = value.strip().partition(":")
        return (read_count(code), read_count(signal_text) or None) if separator else (None, None)
    status = read_count(value)
    return (None, None) if status is None else (status >> 8 & 0xFF, status & 0x7F or None)


def read_user_and_id(value: object) -> tuple[str | None, int | None]:
    """Return name and number from `root(0)`."""
    match = re.fullmatch(r"(.+)\((\d{1,10})\)", value.strip()) if isinstance(value, str) else None
    return (match.group(1), int(match.group(2))) if match else (None, None)


def pair_gpus(nodes: tuple[str, ...], details: Iterable[object]) -> dict[str, tuple[int, ...]]:
    """Return GPU indices by node from one detail text a node; empty where their numbers do not agree."""
    texts = list(details)
    if len(texts) != len(nodes):
        return {}
    return {node: indices for node, text in zip(nodes, texts, strict=True) if (indices := read_gpu_indices(text))}
