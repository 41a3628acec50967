"""The attempts of a run: what each was, why it ended, and what the lines of a journal add up to. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import Enum
from typing import Any


class EndReason(str, Enum):
    """Why an attempt ended."""

    FINISHED = "finished"
    PREEMPTED = "preempted"
    TIME_LIMIT = "time limit"
    NODE_FAILURE = "node failure"
    REQUEUED = "requeued"
    """Sent back to the queue by a person, or by Slurm without saying why."""
    SIGNALLED = "signalled"
    """Somebody sent the signal by hand; the run saved and goes on."""
    CANCELLED = "cancelled"
    CRASHED = "crashed"
    UNKNOWN = "unknown"
    """Killed without a word, and Slurm does not remember why either."""

    @property
    def is_failure(self) -> bool:
        """Whether it counts towards giving up. What the cluster does on purpose does not."""
        return self in {EndReason.CRASHED, EndReason.NODE_FAILURE, EndReason.UNKNOWN}


Explanation = tuple[EndReason, str]

_LOST_NODES_FORGIVEN = 3

_AFTER_EFFECTS = (
    "connection closed by peer",
    "connection reset",
    "broken pipe",
    "ranks could not agree",
    "timed out waiting",
    "communicator was aborted",
    "ncclremoteerror",
)
"""What gloo, NCCL, the store and `jobs.interruption` say when another rank is gone."""


@dataclass(frozen=True, kw_only=True)
class CrashNote:
    """What a failing rank could still say."""

    rank: int
    node: str
    message: str
    step: int | None = None
    time: str = ""

    @property
    def is_after_effect(self) -> bool:
        """Whether it only tells that another rank is gone."""
        return any(words in self.message.lower() for words in _AFTER_EFFECTS)


@dataclass(frozen=True)
class Ending:
    """How one rank has settled an attempt for all."""

    code: int
    """Exit code of every rank."""
    reason: EndReason
    message: str = ""
    rank: int | None = None
    """The rank that failed first."""
    node: str | None = None


@dataclass(frozen=True, kw_only=True)
class AttemptRecord:
    """One attempt, from start to end; what is not known is None."""

    number: int
    """From 1, over all jobs that ever worked on this run."""
    job_id: str | None = None
    restart_count: int = 0
    step_id: str | None = None
    cluster: str | None = None
    nodes: tuple[str, ...] = ()
    world_size: int = 1
    started: datetime | None = None
    ended: datetime | None = None
    reason: EndReason | None = None
    """None while it runs, or until the next attempt finds out."""
    message: str = ""
    failing_rank: int | None = None
    failing_node: str | None = None
    first_step: int = 0
    """Step of the checkpoint it began from: the number of steps done before it."""
    last_step: int | None = None
    """Step it had reached when it ended."""
    committed_step: int | None = None
    """Step of its own newest checkpoint; None where it committed none."""
    seconds_lost: float | None = None
    """Time between the newest checkpoint (or the attempt's start) and the end: work that is done again."""

    @property
    def label(self) -> str:
        """The attempt as `RankInfo.attempt_label` names it."""
        return f"{self.job_id or 'local'}.{self.restart_count}.{self.step_id or 0}"

    @property
    def steps_done(self) -> int | None:
        """Steps between its start and its end, lost ones included."""
        return None if self.last_step is None else max(0, self.last_step - self.first_step)

    @property
    def made_progress(self) -> bool:
        """Whether it left a newer checkpoint than it began from."""
        return self.committed_step is not None and self.committed_step > self.first_step


def read_events(text: str) -> list[dict[str, Any]]:
    """Read the lines of a journal; a line that is no event (torn, or foreign) is left out."""
    events = []
    for line in text.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            events.append(event)
    return events


def fold_events(events: Sequence[Mapping[str, Any]]) -> list[AttemptRecord]:
    """Put the events of a journal together into attempts, oldest first."""
    attempts: dict[int, AttemptRecord] = {}
    for event in events:
        number = event.get("attempt")
        if not isinstance(number, int):
            continue
        if event["event"] == "begin":
            attempts[number] = AttemptRecord(
                number=number,
                job_id=event.get("job_id"),
                restart_count=int(event.get("restart_count") or 0),
                step_id=event.get("step_id"),
                cluster=event.get("cluster"),
                nodes=tuple(event.get("nodes") or ()),
                world_size=int(event.get("world_size") or 1),
                started=parse_moment(event.get("time")),
                first_step=int(event.get("first_step") or 0),
            )
        elif number in attempts and event["event"] == "commit":
            step = event.get("step")
            attempts[number] = replace(attempts[number], committed_step=step, last_step=step)
        elif number in attempts and event["event"] == "end":
            attempts[number] = replace(
                attempts[number],
                ended=parse_moment(event.get("time")),
                reason=parse_reason(event.get("reason")),
                message=str(event.get("message") or ""),
                failing_rank=event.get("failing_rank"),
                failing_node=event.get("failing_node"),
                last_step=event.get("step") if event.get("step") is not None else attempts[number].last_step,
                committed_step=event.get("committed_step"),
                seconds_lost=event.get("seconds_lost"),
            )
    return [attempts[number] for number in sorted(attempts)]


def failures_without_progress(attempts: Sequence[AttemptRecord], start_step: int | None) -> list[AttemptRecord]:
    """Return the failed attempts since the last new checkpoint, oldest first.

    Preemptions, time limits and the like in between neither count nor start the count again; only progress does.

    Args:
        attempts: Attempts, oldest first.
        start_step: Step of the newest checkpoint now, where known: it shows progress of the last attempt that it could not
            note down itself.
    """
    failures: list[AttemptRecord] = []
    newest = start_step
    for attempt in reversed(attempts):
        progressed = attempt.made_progress or (newest is not None and newest > attempt.first_step)
        if progressed:
            break
        newest = attempt.first_step
        if attempt.reason is not None and attempt.reason.is_failure:
            failures.append(attempt)
    return failures[::-1]


def has_retries_left(failures: Sequence[AttemptRecord], retries: int) -> bool:
    """Say whether a run may go on after these failures (see `failures_without_progress`).

    `retries` bounds what the program itself has done wrong. A lost node is no fault of the program: a few are forgiven even
    where no crash is. Not any number, as it may be the program that brings the nodes down.
    """
    crashes = [attempt for attempt in failures if attempt.reason is EndReason.CRASHED]
    return len(crashes) <= retries and len(failures) <= max(retries, _LOST_NODES_FORGIVEN)


def first_failure(notes: Sequence[CrashNote]) -> CrashNote | None:
    """Return the earliest note that is more than the loss of another rank, or else the earliest; None if there is none."""
    return next((note for note in notes if not note.is_after_effect), notes[0] if notes else None)


def describe_attempt(attempt: AttemptRecord) -> str:
    """Say in one line how an attempt went."""
    where = f" on {', '.join(attempt.nodes[:8])}{', ...' if len(attempt.nodes) > 8 else ''}" if attempt.nodes else ""
    who = f" (job {attempt.job_id})" if attempt.job_id else ""
    blame = ""
    if attempt.failing_rank is not None:
        blame = f"; rank {attempt.failing_rank} on {attempt.failing_node} failed first"
    steps = f", steps {attempt.first_step} to {attempt.last_step}" if attempt.last_step is not None else ""
    lost = f", {attempt.seconds_lost:.0f} s lost" if attempt.seconds_lost else ""
    why = attempt.reason.value if attempt.reason is not None else "running"
    return (
        f"attempt {attempt.number}{who}{where}{steps}{lost}: {why}"
        f"{': ' + attempt.message if attempt.message else ''}{blame}"
    )


def parse_reason(value: object) -> EndReason:
    """Read a reason as the journal writes it; UNKNOWN if it is none of ours."""
    try:
        return EndReason(value)
    except ValueError:  # a later version's word
        return EndReason.UNKNOWN


def parse_moment(text: object) -> datetime | None:
    """Read a time as the journal writes it; None if it is none."""
    try:
        return datetime.fromisoformat(str(text))
    except ValueError:
        return None
