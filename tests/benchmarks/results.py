"""What a benchmark found: two things measured side by side in one run, and their ratio."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

from cluster.errors import MusterError
from cluster.shell import LocalShell, find_program


@dataclass(frozen=True, kw_only=True)
class Result:
    """One comparison. Less is better in all of them."""

    name: str
    ours: float
    other: float | None
    """None where there is nothing to compare with: then it is only a figure."""
    other_is: str
    """What `other` was measured on."""
    unit: str
    ratio: float | None
    """`ours` by `other`; None where the other side measured nothing or 0."""
    note: str = ""
    rounds: tuple[tuple[float, float], ...] = ()
    """Both sides' figures of each round, where rounds were compared one by one; the best for us first."""


def compare(
    name: str, ours: Sequence[float], other: Sequence[float], *, other_is: str, unit: str, note: str = ""
) -> Result:
    """Make the result of rounds in which both sides were measured, `ours[i]` next to `other[i]`.

    The figures are those of the round whose ratio is the median (of two middle ones the worse for us): two figures taken next
    to each other share what else the machine was doing then, the medians of each side's own figures do not.
    """
    rounds = sorted(zip(ours, other, strict=True), key=lambda pair: pair[0] / pair[1])
    mine, theirs = rounds[len(rounds) // 2]
    if len(rounds) > 1:
        lowest, highest = (pair[0] / pair[1] for pair in (rounds[0], rounds[-1]))
        note = f"{note}; " * bool(note) + f"{len(rounds)} rounds, ratios {lowest:.2f}-{highest:.2f}"
    return Result(
        name=name,
        ours=mine,
        other=theirs,
        other_is=other_is,
        unit=unit,
        ratio=mine / theirs,
        note=note,
        rounds=tuple(rounds),
    )


def machine() -> dict[str, Any]:
    """Say what the figures were measured on. The load is that of the minute before: anything near 0 is a quiet machine."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "system": _system(),
        "python": platform.python_version(),
        "slurm": _slurm_version(),
        "torch": version("torch"),
        "load_before": round(os.getloadavg()[0], 2),
    }


def as_plain(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return the results as JSON can hold them."""
    return [asdict(result) for result in results]


def row(result: Result) -> tuple[str, ...]:
    """Return the cells of a result in the table: name, ours, other, ratio, what the other is, note."""
    other = "" if result.other is None else f"{figure(result.other)} {result.unit}"
    ratio = "" if result.ratio is None else f"{result.ratio:.2f}"
    return result.name, f"{figure(result.ours)} {result.unit}", other, ratio, result.other_is, result.note


def markdown(conditions: dict[str, Any], results: Sequence[Result]) -> str:
    """Return the section "Figures" of docs/performance.md."""
    where = f"{conditions['cores']} cores of {conditions['processor']}, {conditions['system']}, {conditions['slurm']}"
    lines = [
        f"{conditions['date'][:10]}: {where}, Python {conditions['python']}, torch {conditions['torch']}. "
        f"Load before the run: {conditions['load_before']}.",
        "",
        "| measured | ours | other | ratio | the other is | note |",
        "|---|---|---|---|---|---|",
        *(f"| {' | '.join(row(result))} |" for result in results),
    ]
    return "\n".join(lines) + "\n"


def figure(value: float) -> str:
    """Write a number with three digits that mean something, and no exponent."""
    return f"{value:.0f}" if value == round(value) or abs(value) >= 100 else f"{value:.3g}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123 - a line at a time, not the whole of it
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def _system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:
        return platform.platform()


def _slurm_version() -> str | None:
    try:
        # Not scontrol: that one wants a configuration, and so a cluster, before it tells its version.
        return LocalShell().run([find_program("slurmctld"), "-V"], timeout_s=10).stdout.strip()
    except MusterError:
        return None
