"""Hostlists: `gpu-[001-003,7],login1` to names and back, as Slurm writes them.

Grammar, as `scontrol show hostnames` of 22.05 behaves: items are separated by commas or white space; an item is text with any
number of bracketed groups; a group is a comma-separated list of numbers and ranges `low-high`; the width of `low` pads the
whole range (`n[08-11]` is n08 n09 n10 n11, `n[8-11]` is n8 n9 n10 n11). Several groups multiply, the last one turning fastest.
Text after the last bracket (`n[1-2]-ib`) is read too, although 22.05 refuses it; `fold` never writes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import product

from cluster.errors import InputError

MAX_NAMES = 65_536
"""Most names that one hostlist may stand for; as many as Slurm's own MAX_RANGE (64 Ki). A larger one is a typing mistake."""

_NO_NODES = frozenset({"", "(null)", "none assigned", "n/a"})
"""What Slurm prints in place of a hostlist where there are no nodes (lower case)."""

_GROUP = re.compile(r"\[([^\[\]]*)\]")
_RANGE = re.compile(r"([0-9]{1,18})(?:\s*-\s*([0-9]{1,18}))?")
_ENDS_IN_NUMBER = re.compile(r"(.+?)([0-9]{1,18})")
_NAME = re.compile(r"[^\s,\[\]()/]+")


def expand(text: str) -> list[str]:
    """Return the names that a hostlist stands for, in its order, duplicates kept as Slurm keeps them.

    `""`, `(null)`, `None assigned` and the like, which Slurm prints where there are no nodes, give an empty list.

    Raises:
        InputError: It is not a hostlist (a bracket without its partner, a range that runs backwards or is not made of
            numbers), or it stands for more than `MAX_NAMES` names.
    """
    if text.strip().lower() in _NO_NODES:
        return []
    names: list[str] = []
    for item in _split_items(text):
        room = MAX_NAMES - len(names)
        names.extend(_expand_item(item, text, room))
    return names


def fold(names: Iterable[str]) -> str:
    """Return a hostlist for `names` that Slurm accepts: `gpu-[1-3,7],login1`.

    Duplicates are dropped, and names that differ only in the number at their end are gathered, so the order is: prefixes as
    they first appear, numbers ascending within them. `expand(fold(names))` is the same set of names, and folding that again
    gives the same text. Numbers elsewhere in a name are left alone: Slurm 22.05 refuses `gpu[1-2]-ib`. No names give "".

    Raises:
        InputError: A name is empty or holds a comma, a slash, a bracket or white space, which no hostlist can carry.
    """
    split = [_split_name(name) for name in names]
    padded_widths = {(prefix, len(digits)) for prefix, digits in split if _is_padded(digits)}
    groups: dict[tuple[str, int], list[int]] = {}
    order: dict[tuple[str, int] | str, None] = {}
    for prefix, digits in split:
        if not digits:
            order[prefix] = None
            continue
        # n10 goes with n09, which it pads to, and n10 with n9 where nothing is padded; n09 never goes with n9.
        width = len(digits) if (prefix, len(digits)) in padded_widths else 0
        groups.setdefault((prefix, width), []).append(int(digits))
        order[(prefix, width)] = None
    return ",".join(key if isinstance(key, str) else _fold_numbers(*key, groups[key]) for key in order)


def _split_name(name: str) -> tuple[str, str]:
    """Return a name's text and the digits at its end, which are empty where there are none or nothing but digits."""
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{name!r} is not a node name: commas, slashes, brackets and white space cannot stand in one; "
            "pass one name at a time"
        )
    match = _ENDS_IN_NUMBER.fullmatch(name)
    return (match.group(1), match.group(2)) if match else (name, "")


def _is_padded(digits: str) -> bool:
    return len(digits) > 1 and digits.startswith("0")


def _fold_numbers(prefix: str, width: int, numbers: list[int]) -> str:
    runs: list[tuple[int, int]] = []
    for number in sorted(set(numbers)):
        if runs and runs[-1][1] == number - 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    parts = [f"{low:0{width}d}" if low == high else f"{low:0{width}d}-{high:0{width}d}" for low, high in runs]
    text = ",".join(parts)
    return f"{prefix}{text}" if text.isdecimal() else f"{prefix}[{text}]"


def _split_items(text: str) -> Iterator[str]:
    """Split at commas and white space that stand outside brackets."""
    depth = 0
    item = ""
    for character in text:
        if character == "[":
            depth += 1
        elif character == "]":
            depth -= 1
        if depth not in (0, 1):
            raise InputError(
                f"{_short(text)}: brackets of a hostlist come in pairs and are not nested; write it like gpu-[1-3,7]"
            )
        if depth == 0 and (character == "," or character.isspace()):
            if item:
                yield item
            item = ""
        else:
            item += character
    if depth:
        raise InputError(f"{_short(text)}: the last [ has no ]; write it like gpu-[1-3,7]")
    if item:
        yield item


def _expand_item(item: str, text: str, room: int) -> Iterator[str]:
    pieces = _GROUP.split(item)  # text, group, text, group, ..., text
    choices: list[list[str]] = []
    count = 1
    for index, piece in enumerate(pieces):
        if index % 2 == 0:
            choices.append([piece])
            continue
        ranges = [_parse_range(part.strip(), text) for part in piece.split(",")]
        count *= sum(high - low + 1 for low, high, _ in ranges)
        if count > room:
            break
        choices.append([f"{number:0{width}d}" for low, high, width in ranges for number in range(low, high + 1)])
    if count > room:
        raise InputError(
            f"{_short(text)}: stands for more than {MAX_NAMES} names, the most a hostlist may; is a range mistyped?"
        )
    return ("".join(parts) for parts in product(*choices))


def _parse_range(part: str, text: str) -> tuple[int, int, int]:
    """Return low, high and the width to pad to."""
    match = _RANGE.fullmatch(part)
    if match is None:
        raise InputError(
            f"{_short(text)}: {_short(part)} in brackets is not a number or a range of numbers; write it like gpu-[1-3,7]"
        )
    low, high = match.group(1), match.group(2) or match.group(1)
    if int(high) < int(low):
        raise InputError(f"{_short(text)}: the range {part} runs backwards; write the smaller number first")
    return int(low), int(high), len(low)


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
