"""What happened to a run: its attempts, why each ended, what was lost, whether it is finished or has given up.

    RUN/attempts.jsonl    one event a line, only ever appended to: begin, commit, end, cleared
    RUN/finished          there once the run has reached its end
    RUN/failed            there once the run has given up, with the reasons; `clear_failures` takes it away
    RUN/lock.json         who works here; replaced by one rename, believed only together with Slurm or the heartbeat
    RUN/heartbeat.json    sign of life and step of whoever holds the lock
    RUN/crashes/          what a failing rank could still say; one file a rank, so that no two ever write to one

The journal never decides where a run goes on: that is the newest committed checkpoint (`jobs.checkpoint`). It explains.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from cluster.errors import StateError
from jobs.attempts import (
    AttemptRecord,
    CrashNote,
    Ending,
    EndReason,
    Explanation,
    describe_attempt,
    failures_without_progress,
    first_failure,
    fold_events,
    has_retries_left,
    parse_moment,
    parse_reason,
    read_events,
)
from jobs.process_group import RankInfo
from jobs.run_lock import RunLock

logger = logging.getLogger(__name__)

__all__ = ["AttemptRecord", "CrashNote", "EndReason", "Ending", "RunDirectory", "describe_attempt"]
"""What users of a journal need, in one place; the records themselves are in `jobs.attempts`."""

_MESSAGE_CHARS = 2_000
_TAIL_BYTES = 64 * 1024


class RunDirectory:
    """The directory of one run, and its journal.

    Args:
        path: The directory; `begin_attempt` makes it where it is not there.
        clock: Seconds since 1970, as `time.time`.
        heartbeat_s: Seconds between signs of life.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time, heartbeat_s: float = 10.0) -> None:
        self.path = path
        self._clock = clock
        self._lock = RunLock(path, clock=clock, heartbeat_s=heartbeat_s)
        self._current: AttemptRecord | None = None

    @property
    def checkpoints(self) -> Path:
        """Directory of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def is_finished(self) -> bool:
        """Whether the run has reached its end."""
        return (self.path / "finished").exists()

    @property
    def failure(self) -> str | None:
        """Why the run has given up, one reason a line; None where it has not."""
        try:
            return (self.path / "failed").read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    @property
    def current(self) -> AttemptRecord | None:
        """This process's own attempt, between `begin_attempt` and its end; None on ranks other than 0."""
        return self._current

    def attempts(self) -> list[AttemptRecord]:
        """Return every attempt, oldest first. Lines that cannot be read (a crash may tear the last one) are left out."""
        return fold_events(self._events())

    def lock(self, info: RankInfo, *, is_job_alive: Callable[[str], bool | None] | None = None) -> None:
        """Become the only one who may write here, before anything is changed. Only rank 0 does anything.

        `begin_attempt` then goes on with this lock; where it is never reached, `release` gives it back.

        Args:
            info: Who this process is.
            is_job_alive: See `begin_attempt`.

        Raises:
            StateError: Another job works on this run, or this process has locked it already.
        """
        if not info.is_first:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock.take(info, is_job_alive=is_job_alive)

    def release(self) -> None:
        """Give the lock back where no attempt came of it; nothing where it is not held. An attempt's end does the same."""
        if self._current is None:
            self._lock.release()

    def begin_attempt(
        self,
        info: RankInfo,
        start_step: int,
        *,
        retries: int = 3,
        is_job_alive: Callable[[str], bool | None] | None = None,
        explain: Callable[[AttemptRecord], Explanation | None] | None = None,
    ) -> AttemptRecord | None:
        """Lock the run and note that an attempt begins. Only rank 0 does anything; on others it returns None.

        An earlier attempt that died without a word is completed first: why, as far as can be found out, and what it lost.

        Args:
            info: Who this process is.
            start_step: Step of the checkpoint that the attempt goes on from; 0 at the very beginning.
            retries: How often a failed attempt may be followed by another without a new checkpoint in between; see
                `jobs.attempts.has_retries_left`.
            is_job_alive: Tells whether a Slurm job still lives (`Requeuer.is_job_alive`); None where it cannot say.
            explain: Tells from Slurm's memory why an earlier attempt ended (`Requeuer.explain`).

        Raises:
            StateError: The run is finished; or another job works on it; or it has given up, now or earlier: the message says
                why and what clears it.
        """
        if not info.is_first:
            return None
        if self._current is not None or not self._lock.is_held:
            self._refuse_if_over()  # before anything is written
            self.lock(info, is_job_alive=is_job_alive)
        try:
            self._refuse_if_over()
            self._complete_earlier(start_step, explain)
            attempts = self.attempts()
            failures = failures_without_progress(self._since_cleared(), start_step)
            if not has_retries_left(failures, retries):
                self._give_up(failures)
                self._refuse_if_given_up()
            number = attempts[-1].number + 1 if attempts else 1
            # Outside Slurm all attempts share a label, and a cluster that is built anew begins again with job 1: what an
            # earlier attempt of this name left is not this one's.
            if info.job_id is None or any(attempt.label == info.attempt_label for attempt in attempts):
                shutil.rmtree(self._crash_folder(info.attempt_label), ignore_errors=True)
            self._append_begin(number, info, start_step)
            self._current = self.attempts()[-1]
        except BaseException:
            self._lock.release()
            raise
        return self._current

    def note_step(self, step: int) -> None:
        """Remember how far the attempt is; costs nothing, the heartbeat writes it down.

        Raises:
            StateError: Another attempt has taken the run over, so this one must not write any more.
        """
        self._lock.note_step(step)

    def note_commit(self, step: int) -> None:
        """Note that a checkpoint of `step` is committed; rank 0 only, others do nothing."""
        if self._current is not None:
            self._append("commit", attempt=self._current.number, step=step)
            self._current = replace(self._current, committed_step=step)

    def note_crash(self, info: RankInfo, error: BaseException, *, step: int | None = None) -> Path | None:
        """Leave word of this rank's failure for whoever completes the journal. Any rank may; never raises.

        Returns:
            The file written; None where even that failed.
        """
        path = self._crash_folder(info.attempt_label) / f"rank-{info.rank}.json"
        message = f"{type(error).__name__}: {error}"[:_MESSAGE_CHARS]
        note = CrashNote(rank=info.rank, node=info.node, message=message, step=step, time=self._now_text())
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_atomically(path, json.dumps(asdict(note)))
        except OSError as write_error:  # the disk may be what failed; the traceback in the log has to do
            logger.warning("cannot note the crash of rank %d: %s", info.rank, write_error)
            return None
        return path

    def crash_notes(self, label: str) -> list[CrashNote]:
        """Return what the failing ranks of one attempt said, earliest first.

        Args:
            label: The attempt, as `RankInfo.attempt_label` or `AttemptRecord.label`.
        """
        values = (_read_json(path) for path in self._crash_folder(label).glob("rank-*.json"))
        notes = []
        for value in values:
            with contextlib.suppress(TypeError):  # not ours, or a later version's
                notes.append(CrashNote(**(value or {})))
        return sorted(notes, key=lambda note: note.time)

    def claim_ending(self, info: RankInfo) -> bool:
        """Become the one rank that ends this attempt after a crash; True for exactly one of those that ask."""
        folder = self._crash_folder(info.attempt_label)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            os.close(os.open(folder / "ending", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            return False
        except OSError as error:  # nowhere to write: better two requeues (the second is refused) than none
            logger.warning("cannot settle which rank ends the attempt: %s", error)
        return True

    def note_done(self, info: RankInfo) -> None:
        """Leave word that this rank has done its part; for programs whose ranks do not meet at the end. See `ranks_done`."""
        path = self._crash_folder(info.attempt_label) / f"done-{info.rank}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def ranks_done(self, info: RankInfo) -> int:
        """Return how many ranks of this attempt have done their part."""
        return sum(1 for _ in self._crash_folder(info.attempt_label).glob("done-*"))

    def write_ending(self, info: RankInfo, ending: Ending) -> None:
        """Tell the other ranks, and the next attempt, how this one ends; see `claim_ending`."""
        try:
            _write_atomically(self._crash_folder(info.attempt_label) / "ending", json.dumps(asdict(ending)))
        except OSError as error:
            logger.warning("cannot tell the other ranks how the attempt ends: %s", error)

    def read_ending(self, info: RankInfo) -> Ending | None:
        """Return how the claiming rank has settled the attempt; None while it has not."""
        return self._ending(info.attempt_label)

    def is_ending_claimed(self, info: RankInfo) -> bool:
        """Say whether some rank is about to settle this attempt, or has."""
        return (self._crash_folder(info.attempt_label) / "ending").exists()

    def end_unbegun(self, info: RankInfo, ending: Ending) -> None:
        """Note an attempt that failed before rank 0 could begin it, so that it counts; nothing if it has begun."""
        attempts = self.attempts()
        last = attempts[-1] if attempts else None
        if last is not None and last.label == info.attempt_label:
            return
        first_step = max(map(_newest_step, attempts), default=0)
        number = last.number + 1 if last is not None else 1
        self._append_begin(number, info, first_step)
        self._append(
            "end",
            attempt=number,
            reason=ending.reason.value,
            message=ending.message[:_MESSAGE_CHARS],
            step=first_step,
            committed_step=None,
            seconds_lost=None,
            failing_rank=ending.rank,
            failing_node=ending.node,
        )

    def _ending(self, label: str) -> Ending | None:
        value = _read_json(self._crash_folder(label) / "ending")
        try:
            return None if value is None else Ending(**{**value, "reason": parse_reason(value.get("reason"))})
        except TypeError:
            return None

    def end_attempt(
        self,
        reason: EndReason,
        step: int | None,
        *,
        message: str = "",
        committed_step: int | None = None,
        failing_rank: int | None = None,
        failing_node: str | None = None,
    ) -> None:
        """Note why the attempt ends and unlock the run; rank 0 only, others do nothing.

        Args:
            reason: Why.
            step: Step it has reached; the last one given to `note_step` if None.
            message: In words, for people.
            committed_step: Step of the newest checkpoint, where it is not the last one given to `note_commit`.
            failing_rank: Rank that failed first.
            failing_node: Its node.
        """
        current = self._current
        if current is None:
            return
        committed = current.committed_step if committed_step is None else committed_step
        step = self._lock.step if step is None else step
        if reason is EndReason.FINISHED:
            seconds_lost: float | None = 0.0
        elif step is None and committed is None:  # a program without steps: what it keeps of its work is its own affair
            seconds_lost = None
        else:
            seconds_lost = self._seconds_lost(current, committed, step, self._clock())
        try:
            self._append(
                "end",
                attempt=current.number,
                reason=reason.value,
                message=message[:_MESSAGE_CHARS],
                step=step,
                committed_step=committed,
                seconds_lost=seconds_lost,
                failing_rank=failing_rank,
                failing_node=failing_node,
            )
        finally:  # also where the disk is full: the next attempt completes the journal, and must be able to begin
            self._current = None
            self._lock.release()

    def mark_finished(self, step: int) -> None:
        """Note that the run has reached its end, at `step`; rank 0 only, others do nothing."""
        if self._current is None:
            return
        _write_atomically(self.path / "finished", json.dumps({"step": step, "time": self._now_text()}) + "\n")
        self.end_attempt(EndReason.FINISHED, step, committed_step=self._current.committed_step)

    def may_retry(self, info: RankInfo, *, retries: int = 3, reason: EndReason = EndReason.CRASHED) -> bool:
        """Say whether one more failure, for `reason`, of `info`'s attempt still leaves a retry. Any rank may ask."""
        attempts = self._since_cleared()
        own = [number for number, attempt in enumerate(attempts) if attempt.label == info.attempt_label]
        if own:  # others may stand after it: jobs that were refused because this one works here
            attempts[own[-1]] = replace(attempts[own[-1]], reason=reason)
        else:  # it failed before it had begun: count what is there, and this
            attempts.append(
                AttemptRecord(number=0, first_step=max(map(_newest_step, attempts), default=0), reason=reason)
            )
        return has_retries_left(failures_without_progress(attempts, None), retries)

    def give_up(self, message: str) -> None:
        """Stop the run for good, until `clear_failures`; the reasons are those of its last attempts and `message`."""
        self._give_up(failures_without_progress(self._since_cleared(), None), message)

    def clear_failures(self) -> None:
        """Let a run that has given up try again; its failures so far no longer count."""
        self._append("cleared", by=getpass.getuser())
        (self.path / "failed").unlink(missing_ok=True)

    def _refuse_if_over(self) -> None:
        if self.is_finished:
            raise StateError(
                f"{self.path}: this run is finished; choose another run directory, or remove {self.path / 'finished'} "
                "to train it further"
            )
        self._refuse_if_given_up()

    def _refuse_if_given_up(self) -> None:
        reasons = self.failure
        if reasons is not None:
            raise StateError(
                f"{self.path}: this run has given up:\n{reasons.rstrip()}\nWhen the cause is mended, remove "
                f"{self.path / 'failed'} (`muster jobs clear`), and submit it again"
            )

    def _give_up(self, failures: Sequence[AttemptRecord], message: str = "") -> None:
        lines = [f"{len(failures)} attempts in a row failed without a new checkpoint:"] if failures else []
        lines += [f"  {describe_attempt(attempt)}" for attempt in failures]
        _write_atomically(self.path / "failed", "\n".join([*lines, *([message] if message else [])]) + "\n")
        logger.error("%s: given up; %s says why", self.path, self.path / "failed")

    def _complete_earlier(self, start_step: int, explain: Callable[[AttemptRecord], Explanation | None] | None) -> None:
        """Write the end of an attempt that could not do so itself."""
        attempts = self.attempts()
        unended = [number for number, attempt in enumerate(attempts) if attempt.reason is None]
        if not unended:
            return
        earlier = attempts[unended[-1]]
        if (
            earlier is not attempts[-1]
        ):  # later ones were refused while it worked, or have ended: only what it left counts
            start_step = min(start_step, attempts[unended[-1] + 1].first_step)
        notes = self.crash_notes(earlier.label)
        step, alive_s = self._last_sign(earlier)
        ending = self._ending(earlier.label)
        first = first_failure(notes)
        step = max([step, *(note.step or 0 for note in notes)])
        if ending is None and first is not None:
            ending = Ending(1, EndReason.CRASHED, first.message, first.rank, first.node)
        if ending is None and explain is not None:
            told = explain(earlier)
            ending = None if told is None else Ending(1, *told)
        if ending is None:
            ending = Ending(1, EndReason.UNKNOWN, "killed without a word")
        committed = max(earlier.committed_step or 0, start_step) or None
        self._append(
            "end",
            time=_iso(alive_s),
            attempt=earlier.number,
            reason=ending.reason.value,
            message=ending.message[:_MESSAGE_CHARS],
            step=max(step, start_step) if committed else step,
            committed_step=committed if (committed or 0) > earlier.first_step else earlier.committed_step,
            seconds_lost=self._seconds_lost(earlier, committed, step, alive_s),
            failing_rank=ending.rank,
            failing_node=ending.node,
            found_by_next=True,
        )

    def _last_sign(self, attempt: AttemptRecord) -> tuple[int, float]:
        """Return the last step and time (seconds since 1970) that anything shows of an attempt."""
        started_s = attempt.started.timestamp() if attempt.started is not None else self._clock()
        step, alive_s = attempt.first_step, started_s
        heartbeat = self._lock.earlier_sign
        if heartbeat.get("attempt") == attempt.label:
            step = max(step, int(heartbeat.get("step") or 0))
            alive_s = max(alive_s, float(heartbeat.get("time_s") or 0.0))
        metrics = self.path / "metrics.jsonl"
        try:
            written_s = metrics.stat().st_mtime
        except OSError:
            return step, alive_s
        if written_s >= started_s:
            last = _last_json_line(metrics)
            step = max(step, int(last.get("step") or 0))
            alive_s = max(alive_s, written_s)
        return step, alive_s

    def _seconds_lost(
        self, attempt: AttemptRecord, committed: int | None, step: int | None, ended_s: float
    ) -> float | None:
        if committed is not None and step is not None and committed >= step:
            return 0.0
        since_s = attempt.started.timestamp() if attempt.started is not None else ended_s
        for event in self._events():
            if event["event"] == "commit" and event.get("attempt") == attempt.number:
                since_s = max(since_s, _seconds(event.get("time")) or since_s)
        return round(max(0.0, ended_s - since_s), 3)

    def _since_cleared(self) -> list[AttemptRecord]:
        events = self._events()
        cleared = max((number for number, event in enumerate(events) if event["event"] == "cleared"), default=-1)
        old = {event.get("attempt") for event in events[: cleared + 1]}
        return [attempt for attempt in fold_events(events) if attempt.number not in old]

    def _events(self) -> list[dict[str, Any]]:
        try:
            text = (self.path / "attempts.jsonl").read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        return read_events(text)

    def _append_begin(self, number: int, info: RankInfo, first_step: int) -> None:
        self._append(
            "begin",
            attempt=number,
            job_id=info.job_id,
            restart_count=info.restart_count,
            step_id=info.step_id,
            cluster=info.cluster,
            nodes=list(info.nodes),
            world_size=info.world_size,
            first_step=first_step,
        )

    def _append(self, event: str, **fields: Any) -> None:
        """Append one line, whole or not at all as far as readers see: a torn line before it is closed off first."""
        path = self.path / "attempts.jsonl"
        line = json.dumps({"event": event, "time": self._now_text(), **fields}, ensure_ascii=False) + "\n"
        self.path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            os.write(descriptor, (("\n" if torn else "") + line).encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _crash_folder(self, label: str) -> Path:
        return self.path / "crashes" / label

    def _now_text(self) -> str:
        return _iso(self._clock())


def _newest_step(attempt: AttemptRecord) -> int:
    return attempt.committed_step or attempt.first_step


def _write_atomically(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _last_json_line(path: Path) -> dict[str, Any]:
    """Return the last whole line of a file of JSON lines, {} where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            return value
    return {}


def _seconds(text: object) -> float | None:
    moment = parse_moment(text)
    return None if moment is None else moment.timestamp()


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, tz=timezone.utc).isoformat(timespec="milliseconds")
