"""The demo's report is computed from records: each way a run can go wrong shows in it."""

from __future__ import annotations

import io
import json
import math
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from rich.console import Console

from cluster.errors import StateError
from cluster.slurm_records import AccountingRecord
from jobs.demo import MARKER, _own_directory
from jobs.demo_report import (
    STEPS_TO_COMPARE,
    Bar,
    bars_of,
    compare_losses,
    draw_bar,
    mean_loss,
    run_lineage,
    seconds_to_first_step,
)
from jobs.demo_screen import Screen
from jobs.journal import AttemptRecord

NOON = datetime(2026, 11, 21, 12, tzinfo=timezone.utc)


def write_metrics(run: Path, steps: list[tuple[int, int, float]]) -> Path:
    """Write (attempt, step, loss) as a run's metrics; step n ends at 100 + n seconds."""
    run.mkdir()
    lines = [
        {"attempt": attempt, "step": step, "loss": loss, "loss_hex": loss.hex(), "time": 100.0 + step}
        for attempt, step, loss in steps
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_equal_losses_over_enough_steps_are_equal(tmp_path: Path) -> None:
    """A resumed run whose every loss is the reference's is equal."""
    losses = [1 / (step + 1) for step in range(60)]
    stopped = write_metrics(tmp_path / "a", [(1 + (s >= 30), s, losses[s]) for s in range(60)])
    reference = write_metrics(tmp_path / "b", [(1, s, losses[s]) for s in range(55)])
    result = compare_losses(stopped, reference, first_step=30)
    assert (result.compared, result.differing, result.is_equal) == (25, (), True)


def test_one_bit_is_enough_to_differ(tmp_path: Path) -> None:
    """The smallest change of one loss after the resume is seen."""
    losses = [1 / (step + 1) for step in range(60)]
    reference = write_metrics(tmp_path / "b", [(1, s, losses[s]) for s in range(60)])
    losses[41] = math.nextafter(losses[41], 1.0)
    stopped = write_metrics(tmp_path / "a", [(1 + (s >= 30), s, losses[s]) for s in range(60)])
    result = compare_losses(stopped, reference, first_step=30)
    assert (result.differing, result.is_equal) == ((41,), False)


def test_too_few_steps_prove_nothing(tmp_path: Path) -> None:
    """Equality over fewer steps than the report promises is not called equal."""
    both = [(1, s, 0.5) for s in range(30 + STEPS_TO_COMPARE - 1)]
    result = compare_losses(write_metrics(tmp_path / "a", both), write_metrics(tmp_path / "b", both), first_step=30)
    assert not result.is_equal


def test_steps_that_were_done_again_count_once(tmp_path: Path) -> None:
    """What an attempt did after its last checkpoint is replaced by what the next attempt did."""
    run = write_metrics(tmp_path / "a", [(1, 0, 9.0), (1, 1, 8.0), (1, 2, 7.0), (2, 1, 6.0), (2, 2, 5.0)])
    assert [record["loss"] for record in run_lineage(run).values()] == [9.0, 6.0, 5.0]


def test_mean_loss_of_the_ends(tmp_path: Path) -> None:
    """The first and last losses are means over the steps at either end."""
    steps = run_lineage(write_metrics(tmp_path / "a", [(1, s, float(s)) for s in range(10)]))
    assert (mean_loss(steps, last=False, count=2), mean_loss(steps, last=True, count=2)) == (0.5, 8.5)
    assert mean_loss({}, last=True) is None


def test_the_time_back_ends_with_the_first_step_of_the_second_attempt(tmp_path: Path) -> None:
    """Waiting, start-up and the first step all count; without a second attempt, or a beginning, nothing was measured."""
    run = write_metrics(tmp_path / "a", [(1, 0, 1.0), (2, 1, 1.0), (2, 2, 1.0)])
    since = datetime.fromtimestamp(90.5, tz=timezone.utc)
    both = [AttemptRecord(number=1), AttemptRecord(number=2)]
    assert seconds_to_first_step(both, run, since=since) == pytest.approx(10.5)
    assert seconds_to_first_step(both[:1], run, since=since) is None
    assert seconds_to_first_step(both, run, since=None) is None


def test_the_timeline_shows_waiting_and_both_attempts() -> None:
    """A job that waited, ran, waited and ran again is drawn so, next to one that ran in between."""

    def record(job: str, submit: float, start: float, end: float) -> AccountingRecord:
        times = [NOON + timedelta(seconds=value) for value in (submit, start, end)]
        return AccountingRecord(
            id=job,
            raw_id=job,
            name=f"job{job}",
            partition="low",
            submit_time=times[0],
            start_time=times[1],
            end_time=times[2],
        )

    bars = bars_of([record("1", 0, 10, 40), record("2", 30, 40, 60), record("1", 40, 60, 100)])
    assert [bar.label for bar in bars] == ["job1 (low)", "job2 (low)"]
    assert [draw_bar(bar, width=10, total_s=100) for bar in bars] == ["·███··████", "   ·██    "]


def test_a_very_short_job_is_still_seen() -> None:
    """A job that takes less than a character's worth of time has one block."""
    assert draw_bar(Bar(label="x", submitted_s=0, runs=((0.0, 0.1),)), width=10, total_s=100) == "█         "


def test_a_directory_of_somebody_else_is_not_touched(tmp_path: Path) -> None:
    """Only what a demo has made is removed before the next one."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(StateError, match="no demo has put there"):
        _own_directory(mine)
    assert (mine / "thesis.tex").exists()


def test_an_earlier_demo_is_cleared_away(tmp_path: Path) -> None:
    """A second demo starts from an empty directory."""
    directory = _own_directory(tmp_path / "demo")
    (directory / "runs").mkdir()
    assert [path.name for path in _own_directory(tmp_path / "demo").iterdir()] == [MARKER]


def test_events_carry_their_time_and_plain_output_has_no_escapes() -> None:
    """Events are kept with the seconds since the start; in a pipe they are plain lines."""
    times = iter([0.0, *([2.5] * 20)])
    out = io.StringIO()
    with Screen(Console(file=out, force_terminal=False), clock=lambda: next(times)) as screen:
        screen.event("cluster up", "4 nodes [32 GPUs]")
    assert screen.events == [{"t_s": 2.5, "event": "cluster up", "detail": "4 nodes [32 GPUs]"}]
    assert out.getvalue() == "   2.5 s  cluster up             4 nodes [32 GPUs]\n"
