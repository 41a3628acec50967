"""A finding: one thing that is wrong, or worth knowing, in a file that a person wrote."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any


class Level(str, Enum):
    """How bad a finding is. The worst one of a check decides its exit code."""

    ERROR = "error"
    """It will not work, or it will lose work."""
    WARNING = "warning"
    """It will work and somebody will regret it."""
    NOTE = "note"
    """Worth knowing."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One finding: where, what stands there, which rule it breaks, and what to write instead."""

    id: str
    """Stable name of the rule, such as `unknown-key` or `preemption-grace-without-requeue-exit`."""
    level: Level
    field: str
    """Path in the file, such as `queues[1].grace`."""
    value: str
    """What stands there, as written."""
    rule: str
    remedy: str
    line: int | None = None
    source: str = ""
    """The file, or the document that the rule comes from."""

    def __str__(self) -> str:
        where = f"line {self.line}: " if self.line is not None else ""
        value = f" ({self.value})" if self.value else ""
        return f"{where}{self.field}{value}: {self.rule}; {self.remedy}"

    def as_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {**asdict(self), "level": self.level.value}


def worst_level(findings: Iterable[Finding]) -> Level | None:
    """Return the worst level among `findings`, or None if there are none."""
    order = (Level.ERROR, Level.WARNING, Level.NOTE)
    levels = {finding.level for finding in findings}
    return next((level for level in order if level in levels), None)
