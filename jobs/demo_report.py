"""What the demo measured, computed from what the run left on disk. Pure but for reading those files.

Nothing here knows how the run should have gone: losses are compared with those of a second run, samples are counted from what
each rank says it decoded, times are differences between records.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any

from cluster.slurm_records import AccountingRecord
from jobs.journal import AttemptRecord
from jobs.records import SampleCount, count_samples, lineage, read_json_lines

STEPS_TO_COMPARE = 20
"""Fewest steps after the resume whose losses must be known in both runs before `resumed_bit_equal` can be true."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The losses of a run that was stopped, beside those of one that was not."""

    first_step: int
    """First step after the resume."""
    compared: int
    """Steps after the resume that both runs have."""
    differing: tuple[int, ...]
    """Steps of all that both runs have, before and after the resume, whose losses are not the same bits."""

    @property
    def is_equal(self) -> bool:
        """Whether enough steps could be compared and none differs."""
        return self.compared >= STEPS_TO_COMPARE and not self.differing


@dataclass(frozen=True, kw_only=True)
class DemoReport:
    """`.muster/demo/report.json`. None stands for what was not measured, never for zero."""

    events: list[dict[str, Any]] = field(default_factory=list)
    preemptions: int
    requeues: int
    steps: int
    samples_seen: int
    samples_repeated: int
    samples_missed: int
    resumed_bit_equal: bool
    steps_compared: int
    preempt_to_high_running_s: float | None
    requeue_to_first_step_s: float | None
    nodes_free_to_first_step_s: float | None
    first_loss: float | None
    last_loss: float | None
    images: list[str] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write the report as JSON, beside and then renamed."""
        beside = path.with_suffix(".new")
        beside.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        beside.replace(path)


def run_lineage(run: Path) -> dict[int, Mapping[str, Any]]:
    """Return step -> the metrics of the attempt that counted, of a run directory."""
    return {step: records[-1] for step, records in lineage(read_json_lines(run / "metrics.jsonl")).items()}


def compare_losses(stopped: Path, reference: Path, *, first_step: int) -> Comparison:
    """Compare the losses of a run that was stopped and resumed at `first_step` with those of a reference, bit by bit."""
    ours, theirs = run_lineage(stopped), run_lineage(reference)
    both = sorted(set(ours) & set(theirs))
    return Comparison(
        first_step=first_step,
        compared=sum(step >= first_step for step in both),
        differing=tuple(step for step in both if ours[step]["loss_hex"] != theirs[step]["loss_hex"]),
    )


def count_run_samples(run: Path, *, keys: Sequence[str], batch_size: int) -> SampleCount:
    """Count the samples that all ranks of a run say they decoded."""
    records = chain.from_iterable(read_json_lines(path) for path in sorted(run.glob("samples-rank*.jsonl")))
    return count_samples(records, keys=keys, batch_size=batch_size)


def mean_loss(steps: Mapping[int, Mapping[str, Any]], *, last: bool, count: int = 20) -> float | None:
    """Return the mean loss of the first or last `count` steps; None if there are none."""
    chosen = list(steps)[-count:] if last else list(steps)[:count]
    return sum(float(steps[step]["loss"]) for step in chosen) / len(chosen) if chosen else None


def seconds_to_first_step(attempts: Sequence[AttemptRecord], run: Path, *, since: datetime | None) -> float | None:
    """Return the seconds from `since` to the end of the second attempt's first step; None if either is not known."""
    if len(attempts) < 2 or since is None:
        return None
    number = attempts[1].number
    times = [record["time"] for record in read_json_lines(run / "metrics.jsonl") if record["attempt"] == number]
    return round(min(times) - since.timestamp(), 2) if times else None


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One job in the timeline: when it waited and when it ran, in seconds since the first submission."""

    label: str
    submitted_s: float
    runs: tuple[tuple[float, float], ...]
    """Start and end of each attempt."""


def bars_of(records: Sequence[AccountingRecord]) -> list[Bar]:
    """Make the timeline of what Slurm's accounting says about some jobs."""
    attempts = [record for record in records if record.step is None and record.submit_time is not None]
    if not attempts:
        return []
    origin = min(record.submit_time for record in attempts if record.submit_time is not None)
    latest = max((record.end_time for record in attempts if record.end_time is not None), default=origin)
    bars: dict[str, Bar] = {}
    for record in attempts:
        assert record.submit_time is not None
        bar = bars.get(record.job_id) or Bar(
            label=f"{record.name} ({record.partition})",
            submitted_s=(record.submit_time - origin).total_seconds(),
            runs=(),
        )
        if record.start_time is not None:
            end = record.end_time or latest
            run = ((record.start_time - origin).total_seconds(), (end - origin).total_seconds())
            bar = replace(bar, runs=(*bar.runs, run))
        bars[record.job_id] = bar
    return list(bars.values())


def draw_bar(bar: Bar, *, width: int, total_s: float) -> str:
    """Draw a job as `width` characters: dots while it waits, blocks while it runs, blank before and after."""
    cells = [" "] * width
    end_s = max((end for _, end in bar.runs), default=total_s)

    def fill(start_s: float, until_s: float, character: str) -> None:
        first = min(width - 1, int(start_s / total_s * width))
        for cell in range(first, max(first + 1, min(width, round(until_s / total_s * width)))):
            cells[cell] = character

    fill(bar.submitted_s, end_s, "·")
    for start_s, until_s in bar.runs:
        fill(start_s, until_s, "█")
    return "".join(cells)
