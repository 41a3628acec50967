"""Leaving an attempt so that the run goes on: find out why it has to leave, ask Slurm to bring the job back, and go.

What was tried on slurmctld 22.05.8 and stands behind the order of things here (docs/preemption.md has the figures):

- Exit code 0 or 1 within the grace of a preemption ends the job for good. `scontrol requeue` of one's own job brings it back in
  every preemption mode: also under CANCEL without grace, and past the time limit, when the job is already final (PREEMPTED,
  TIMEOUT) and only its processes still run.
- Slurm holds a requeued job for `cred_expire` (120 s by default) from the moment its last process is gone, unless its start
  time then lies in the future. So `StartTime=now` does nothing while the job still ends, and `now+6seconds` lifts the hold.
- The requeue sends TERM to every process of the step, `scontrol` itself included: what is started here must ignore it.
- `scontrol requeue` revives a cancelled job as well. So nothing is requeued before it is known that nobody cancelled it.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from cluster.errors import InputError, InterruptedRunError, MissingError, MusterError, NotFoundError, StateError
from cluster.hostlist import fold
from cluster.slurm import SlurmCliClient, SlurmClient
from cluster.slurm_records import UNLIMITED, Job
from jobs.attempts import AttemptRecord, CrashNote, Ending, EndReason, Explanation, first_failure
from jobs.causes import ACCOUNTING_REASONS, Cause, judge
from jobs.journal import RunDirectory
from jobs.process_group import RankInfo, read_rank_info

if TYPE_CHECKING:
    from jobs.collectives import Ranks
    from jobs.interruption import StopSignals

logger = logging.getLogger(__name__)

REQUEUE_EXIT_CODE = InterruptedRunError.exit_code
"""75, with which slurm.conf's RequeueExit brings a job back: the second line of defence."""
CANCELLED_EXIT_CODE = 130
"""What a cancelled attempt exits with: like Ctrl-C, and nothing brings it back."""
CRASHED_EXIT_CODE = 1

_SLURM_TIMEOUT_S = 10.0
_TRIES = 3
_ASKING_TRIES = 5  # more than for acting: without an answer nothing may be done
_PAUSE_S = 0.3
_START_DELAY_S = 6
_OTHERS_FIRST_S = 2.0  # a rank whose peers vanished waits so long for the one that knows why
_ENDING_TIMEOUT_S = 60.0
_WAITS_FOR_NODES = {None, "None", "Resources", "Priority"}  # and not for a person, a date or another job
_FULL_DISK = {errno.ENOSPC, errno.EDQUOT}


class Requeuer:
    """Ends an attempt. Made on every rank; rank 0 speaks to Slurm, the others follow it.

    Args:
        info: Who this process is.
        run: The run's journal.
        stop: The signals that came, if they are watched.
        slurm: How to talk to Slurm; its command-line programs with short deadlines unless given.
        retries: How often a failed attempt is followed by another without a new checkpoint in between.
        start_delay_s: Earliest restart after the requeue, in seconds. It must outlast the ending of the job's processes and its
            epilog, or Slurm's own, longer hold applies.
        clock: Seconds since 1970.
        sleep: As `time.sleep`.
    """

    def __init__(
        self,
        info: RankInfo,
        run: RunDirectory,
        *,
        stop: StopSignals | None = None,
        slurm: SlurmClient | None = None,
        retries: int = 3,
        start_delay_s: int = _START_DELAY_S,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._info = info
        self._run = run
        self._stop = stop
        self._slurm = SlurmCliClient(timeout_s=_SLURM_TIMEOUT_S) if slurm is None else slurm
        self._retries = retries
        self._start_delay_s = start_delay_s
        self._clock = clock
        self._sleep = sleep
        self._end_s: float | None = None
        self._end_asked_s: float | None = None

    # What Slurm knows

    def is_job_alive(self, job_id: str) -> bool | None:
        """Say whether a job runs or will run again; None where Slurm does not answer. For `RunDirectory.begin_attempt`."""
        try:
            return not self._slurm.job(job_id).is_ended
        except NotFoundError:
            return False
        except MusterError as error:
            logger.warning("cannot ask Slurm about job %s: %s", job_id, error)
            return None

    def explain(self, attempt: AttemptRecord) -> Explanation | None:
        """Say from Slurm's accounting why an earlier attempt ended; None where it does not know. For `begin_attempt`."""
        if attempt.job_id is None or self._info.job_id is None or attempt.cluster != self._info.cluster:
            return None
        try:
            records = self._slurm.accounting(job_ids=[attempt.job_id])
        except MusterError as error:
            logger.info("accounting says nothing about attempt %d: %s", attempt.number, error)
            return None
        matching = [
            record
            for record in records
            if record.step is None and record.raw_id == attempt.job_id and record.restarts == attempt.restart_count
        ]
        if not matching:
            return None
        known = ACCOUNTING_REASONS.get(matching[-1].state)
        return (
            None if known is None else (known, f"killed without a word; Slurm's accounting says {matching[-1].state}")
        )

    def time_left_s(self) -> float | None:
        """Return the seconds until the job's time limit; None without one, or where Slurm does not say. Asks rarely."""
        if self._info.job_id is None:
            return None
        now_s = self._clock()
        if (
            self._end_asked_s is None or now_s - self._end_asked_s > 600
        ):  # an admin may have changed the limit meanwhile
            self._end_asked_s = now_s
            job = self._own_job(tries=1)
            if job is not None:
                limited = job.time_limit not in (None, UNLIMITED) and job.end_time is not None
                self._end_s = job.end_time.timestamp() if limited and job.end_time is not None else None
        return None if self._end_s is None else self._end_s - now_s

    def find_cause(self) -> Cause:
        """Ask Slurm why this attempt has been signalled."""
        if self._info.job_id is None:
            name = (self._stop.requested if self._stop is not None else None) or "a request"
            return Cause(EndReason.SIGNALLED, f"{name}, outside Slurm: start it again to go on", comes_back=False)
        job = self._own_job()
        signal_name = self._stop.requested if self._stop is not None else None
        return judge(job, self._info, signal_name=signal_name, now=self._now(), down_nodes=self._down_nodes(job))

    # Leaving

    def leave(self, step: int, *, ranks: Ranks | None = None, committed_step: int | None = None) -> int:
        """End this attempt after its state has been committed; returns the exit code to leave with, at once.

        A collective call: rank 0 finds the cause, writes the journal, and requeues the job while it still runs, which frees the
        nodes at once. The others hear the exit code from it, so that none ends before the requeue (a rank that ends badly would
        take the whole step with it under `srun --kill-on-bad-exit`).

        Args:
            step: Step that the run has reached.
            ranks: How the ranks talk; needed where there are several.
            committed_step: Newest committed step, where it is not `step`.
        """
        with _deaf_to_signals():
            code: int | None = None
            if self._info.is_first:
                code = self._leave_first(step, step if committed_step is None else committed_step)
            if ranks is None or self._info.world_size == 1:
                return REQUEUE_EXIT_CODE if code is None else code
            try:
                return ranks.broadcast(code)
            except RuntimeError as error:  # rank 0 is gone, so the requeue is done, or Slurm has killed it
                logger.info("rank 0 left without a word (%s)", str(error).splitlines()[0])
                return REQUEUE_EXIT_CODE

    def leave_early(self) -> int:
        """End this attempt when a stop came before the ranks could agree on it (start-up); returns the exit code.

        Not a collective call: whichever rank comes first requeues the job, the others follow it. Nothing is lost, because
        nothing has been done.
        """
        with _deaf_to_signals():
            if self._info.job_id is None:
                return REQUEUE_EXIT_CODE
            if not self._run.claim_ending(self._info):
                return self._follow_ending()
            cause = self.find_cause()
            logger.info("leaving before the first step: %s (%s)", cause.reason.value, cause.message)
            code = self._act(cause)
            self._settle(Ending(code, cause.reason, cause.message), step=None)
            return code

    def leave_after_crash(self, error: BaseException, *, step: int | None = None, is_rank: bool = True) -> int:
        """End this attempt after an error; returns the exit code to leave with, at once. Not a collective call.

        Every failing rank leaves a note; one of them decides for all: requeue without the failed node, or, after too many
        failures without progress, give up. A rank that only lost its peers gives way to the one that knows why. What a person
        has to mend (a wrong setting, a run in use) is not tried again.

        Args:
            error: What went wrong.
            step: Step that the run has reached, where the caller knows it.
            is_rank: Whether it went wrong in this very rank. The batch script only sees that the step is over: it blames no
                rank and no node, except those that could still say what happened to them.
        """
        info = self._info
        own_code = error.exit_code if isinstance(error, MusterError) else CRASHED_EXIT_CODE
        with _deaf_to_signals():
            note = CrashNote(rank=info.rank, node=info.node, message=f"{type(error).__name__}: {error}", step=step)
            if is_rank:
                self._run.note_crash(info, error, step=step)
                if note.is_after_effect and info.job_id is not None:
                    self._let_others_speak()
            if not self._run.claim_ending(info):
                return self._follow_ending(step)
            first = first_failure(self._run.crash_notes(info.attempt_label)) or (note if is_rank else None)
            message = note.message if first is None else first.message
            blamed = None if first is None or first.is_after_effect else first
            if isinstance(error, (InputError, StateError, MissingError)):
                ending = _crash_ending(own_code, message, blamed)
            else:
                ending = self._end_crashed(message, blamed, own_code, is_disk_full=_is_disk_full(error))
            # A job that was refused the run has no attempt in it: it must not stand in the journal of the job that works there.
            self._settle(ending, step=step, is_attempt=not isinstance(error, StateError))
            return ending.code

    def _let_others_speak(self) -> None:
        deadline = self._clock() + _OTHERS_FIRST_S
        while self._clock() < deadline and self._run.read_ending(self._info) is None:
            notes = self._run.crash_notes(self._info.attempt_label)
            if any(not note.is_after_effect for note in notes):
                return
            self._sleep(_PAUSE_S)

    def _settle(self, ending: Ending, *, step: int | None, is_attempt: bool = True) -> None:
        """Tell the other ranks, and the journal (of an attempt that rank 0 has begun, rank 0 or the next attempt does that)."""
        self._run.write_ending(self._info, ending)
        with contextlib.suppress(OSError):
            self._end_in_journal(ending, step)
            if is_attempt:
                self._run.end_unbegun(self._info, ending)

    def _end_in_journal(self, ending: Ending, step: int | None, committed_step: int | None = None) -> None:
        self._run.end_attempt(
            ending.reason,
            step,
            message=ending.message,
            committed_step=committed_step,
            failing_rank=ending.rank,
            failing_node=ending.node,
        )

    def _leave_first(self, step: int, committed_step: int) -> int:
        if self._run.is_ending_claimed(
            self._info
        ):  # the signal came because another rank has failed, and it settles that
            return self._follow_ending(step, committed_step)
        cause = self.find_cause()
        logger.info("leaving at step %d: %s (%s)", step, cause.reason.value, cause.message)
        code = self._act(cause)
        if cause.reason is EndReason.REQUEUED and self._is_wanted_by_others():
            cause = Cause(EndReason.PREEMPTED, "a job of a higher tier needs the nodes, and there is no grace")
        with contextlib.suppress(OSError):  # a journal that cannot be written must not keep the job from coming back
            self._end_in_journal(Ending(code, cause.reason, cause.message), step, committed_step)
        return code

    def _is_wanted_by_others(self) -> bool:
        """Say whether a job of a higher tier waits for, or has just got, nodes of this job's queue.

        What Slurm itself remembers of a preemption is gone once the job is requeued; this is as near as one can get.
        """
        job = self._own_job(tries=1)
        try:
            partitions = {partition.name: partition for partition in self._slurm.partitions()}
            own = partitions.get((job.partition if job is not None else None) or "")
            if own is None:
                return False
            above = [
                partition.name
                for partition in partitions.values()
                if (partition.tier or 0) > (own.tier or 0) and set(partition.nodes) & set(self._info.nodes)
            ]
            others = self._slurm.jobs(partitions=above) if above else []
        except MusterError as error:
            logger.info("cannot tell whether this was a preemption: %s", error)
            return False
        recent = self._now() - timedelta(seconds=60)
        return any(
            (other.is_pending and other.reason in _WAITS_FOR_NODES)
            or (other.is_running and other.start_time is not None and other.start_time > recent)
            for other in others
        )

    def _act(self, cause: Cause, *, exclude: Sequence[str] = ()) -> int:
        """Do what the cause asks for, and return the exit code."""
        if not cause.comes_back:
            return REQUEUE_EXIT_CODE if self._info.job_id is None else CANCELLED_EXIT_CODE
        assert self._info.slurm_id is not None
        if cause.reason is EndReason.UNKNOWN:
            return self._leave_it_to_the_exit_code("nobody knows whether it was cancelled")
        if cause.is_requeued or self._requeue(self._info.slurm_id):
            self._lift_hold(self._info.slurm_id, exclude)
        else:
            return self._leave_it_to_the_exit_code("Slurm refuses or does not answer")
        return REQUEUE_EXIT_CODE

    def _leave_it_to_the_exit_code(self, why: str) -> int:
        """Return the exit code that slurm.conf's RequeueExit brings a job back with; the log says why nothing else does."""
        logger.warning(
            "job %s is not requeued (%s); it exits with %d, which RequeueExit turns into a requeue",
            self._info.slurm_id,
            why,
            REQUEUE_EXIT_CODE,
        )
        return REQUEUE_EXIT_CODE

    def _requeue(self, job_id: str, *, hold: bool = False) -> bool:
        for last in (False, False, True)[-_TRIES:]:
            try:
                self._slurm.requeue(job_id, hold=hold)
            except MusterError as error:
                # Refused because it is in the queue already (somebody was quicker), or the answer got lost on the way.
                job = self._own_job(tries=1)
                if job is not None and (job.restarts or 0) > self._info.restart_count:
                    return True
                logger.warning("requeue of job %s: %s", job_id, error)
                if last:
                    return False
                self._sleep(_PAUSE_S)
            else:
                logger.info("job %s is back in the queue", job_id)
                return True
        return False

    def _lift_hold(self, job_id: str, exclude: Sequence[str]) -> None:
        """Give the job an early start time, and nodes to stay away from. Without it, it only waits longer."""
        changes = {"StartTime": f"now+{self._start_delay_s}seconds"}
        if exclude:
            changes["ExcNodeList"] = fold(sorted(exclude))
        for _ in range(_TRIES):
            try:
                self._slurm.update_job(job_id, **changes)
            except MusterError as error:
                logger.warning("job %s keeps Slurm's own hold after a requeue: %s", job_id, error)
                self._sleep(_PAUSE_S)
            else:
                return

    def _end_crashed(
        self, message: str, blamed: CrashNote | None, own_code: int, *, is_disk_full: bool = False
    ) -> Ending:
        """Find out whether the failure came from outside, and requeue, give up, or leave it at that."""
        info = self._info
        if info.job_id is None:
            return _crash_ending(own_code, message, blamed)
        job = self._own_job()
        down_nodes = self._down_nodes(job)
        crashed = self._stop is None or self._stop.requested is None
        cause = judge(job, info, signal_name=None, now=self._now(), down_nodes=down_nodes, crashed=crashed)
        bad = down_nodes
        if cause.reason in {EndReason.SIGNALLED, EndReason.UNKNOWN}:  # nothing from outside: the fault is in here
            bad = (blamed.node,) if blamed is not None else self._silent_nodes()
            suspects = f"; nothing was heard from {', '.join(bad)}" if blamed is None and bad else ""
            cause = Cause(EndReason.CRASHED, message + suspects)
        elif cause.reason is EndReason.NODE_FAILURE:
            cause = replace(cause, message=f"{cause.message}; {message}")
        if not cause.comes_back:
            code = CANCELLED_EXIT_CODE
        elif cause.reason.is_failure and not self._run.may_retry(info, retries=self._retries, reason=cause.reason):
            who = "" if blamed is None else f"rank {blamed.rank} on {blamed.node}: "
            self._give_up(f"the last one: {who}{cause.message}")
            code = own_code
        elif job is None:
            code = self._leave_it_to_the_exit_code("nobody knows whether it was cancelled")
        elif cause.reason is EndReason.CRASHED and is_disk_full and info.restart_count >= self._retries:
            code = self._hold(own_code)
        else:
            code = self._act(cause, exclude=self._excludable(job, bad))
        if cause.reason is not EndReason.CRASHED:
            return Ending(code, cause.reason, cause.message)
        return _crash_ending(code, cause.message, blamed)

    def _give_up(self, message: str) -> None:
        try:
            self._run.give_up(message)
        except OSError as error:  # the job ends all the same; only its file `failed` is not there
            logger.error("%s gives up (%s), and cannot write that down: %s", self._run.path, message, error)

    def _hold(self, own_code: int) -> int:
        """Requeue the job so that it waits for a person; ends it with `own_code` where that fails.

        On a full disk no failure gets into the journal, so counting them would never come to an end.
        """
        assert self._info.slurm_id is not None
        job_id = self._info.slurm_id
        if not self._requeue(job_id, hold=True):
            return own_code
        logger.error(
            "%s: the disk is full (or the quota), and the journal with it; job %s is held: make room, then "
            "`scontrol release %s`",
            self._run.path,
            job_id,
            job_id,
        )
        return REQUEUE_EXIT_CODE

    def _silent_nodes(self) -> tuple[str, ...]:
        """Return the nodes from which no note came, where others left some: the likely cause when all only lost a peer.

        None where they are many: then their ranks are only slow to notice, and no suspicion falls on any.
        """
        nodes = self._info.nodes
        heard = {note.node for note in self._run.crash_notes(self._info.attempt_label)}
        silent = tuple(node for node in nodes if node not in heard) if heard else ()
        return silent if len(silent) <= max(1, len(nodes) // 8) else ()

    def _follow_ending(self, step: int | None = None, committed_step: int | None = None) -> int:
        """Wait for the rank that settles the attempt; its exit code is everybody's. Rank 0 puts it into the journal."""
        deadline = self._clock() + _ENDING_TIMEOUT_S
        while self._clock() < deadline:
            ending = self._run.read_ending(self._info)
            if ending is not None:
                with contextlib.suppress(OSError):
                    self._end_in_journal(ending, step, committed_step)
                return ending.code
            self._sleep(_PAUSE_S)
        return REQUEUE_EXIT_CODE

    def _excludable(self, job: Job | None, nodes: Sequence[str]) -> list[str]:
        """Return all nodes to exclude from now on; none if too few would be left to run on."""
        if job is None or not nodes:
            return []
        excluded = {*job.excluded_nodes, *nodes}
        try:
            partitions = {partition.name: partition for partition in self._slurm.partitions()}
            queue = partitions.get(job.partition or "")
            usable = (
                {node.name for node in self._slurm.nodes(queue.nodes) if node.is_usable} if queue is not None else set()
            )
        except MusterError as error:
            logger.warning("cannot tell which nodes are left, so none is excluded: %s", error)
            return []
        needed = job.node_count or len(self._info.nodes)
        if len(usable - excluded) < needed:
            logger.warning("%s is not excluded: fewer than %d usable nodes would be left", ", ".join(nodes), needed)
            return []
        return sorted(excluded)

    def _down_nodes(self, job: Job | None) -> tuple[str, ...]:
        if job is None or self._info.job_id is None:
            return ()
        try:
            nodes = self._slurm.nodes(self._info.nodes)
        except MusterError as error:
            logger.warning("cannot ask Slurm about the nodes: %s", error)
            return ()
        return tuple(node.name for node in nodes if node.states & {"DOWN", "NOT_RESPONDING", "FAIL"})

    def _own_job(self, tries: int = _ASKING_TRIES) -> Job | None:
        assert self._info.slurm_id is not None
        for _ in range(tries):
            try:
                return self._slurm.job(self._info.slurm_id)
            except MusterError as error:
                logger.warning("cannot ask Slurm about job %s: %s", self._info.slurm_id, error)
                self._sleep(_PAUSE_S)
        return None

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock(), tz=timezone.utc)


def _crash_ending(code: int, message: str, blamed: CrashNote | None) -> Ending:
    if blamed is None:
        return Ending(code, EndReason.CRASHED, message)
    return Ending(code, EndReason.CRASHED, message, blamed.rank, blamed.node)


def _is_disk_full(error: BaseException) -> bool:
    """Say whether a full disk, or a quota, is behind an error: itself, or what it was raised from."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if isinstance(cause, OSError) and cause.errno in _FULL_DISK:
            return True
        cause = cause.__cause__ or cause.__context__
    # From another rank an error comes without what it was raised from.
    return any(os.strerror(number) in str(error) for number in _FULL_DISK)


@contextlib.contextmanager
def _deaf_to_signals() -> Iterator[None]:
    """Ignore TERM and USR2, here and in the commands started meanwhile: Slurm sends them to every process of the step."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGUSR2)
    earlier = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)  # unlike a handler, this is inherited by commands
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def quit_now(code: int) -> NoReturn:
    """End this process with `code` at once, what it has written flushed.

    Leaving as usual waits for torch's threads and destructors: 3-4 s were seen here, in which the nodes stay taken and a rank
    with broken peers may hang until it is killed.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def after_step(
    environ: Mapping[str, str], run: RunDirectory, status: int, *, slurm: SlurmClient | None = None, retries: int = 3
) -> int:
    """Settle an attempt from the batch script, after its `srun` ended with `status`; returns what the script exits with.

    Only for what the ranks could not do themselves: all of them were killed at once (out of memory, a crash of the interpreter,
    a signal before the handlers stood). Whatever a rank settled is left as it is.
    """
    info = read_rank_info({**environ, "SLURM_NTASKS": "1"})  # the batch shell is one process, whatever its step was
    attempts = run.attempts()
    if attempts and (attempts[-1].job_id, attempts[-1].restart_count) == (info.job_id, info.restart_count):
        info = replace(info, step_id=attempts[-1].step_id)
    if status in {0, REQUEUE_EXIT_CODE, CANCELLED_EXIT_CODE} or info.job_id is None or run.is_finished:
        return status
    if run.failure is not None or run.read_ending(info) is not None:
        return status
    requeuer = Requeuer(info, run, slurm=slurm, retries=retries)
    error = MusterError(f"the step ended with exit status {status} and no rank could say why")
    return requeuer.leave_after_crash(error, is_rank=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m jobs.requeue --run-directory RUN --status "$?"` as the last line of a batch script."""
    parser = argparse.ArgumentParser(prog="python -m jobs.requeue", description=after_step.__doc__)
    parser.add_argument("--run-directory", type=Path, required=True)
    parser.add_argument("--status", type=int, required=True, help="exit status of srun")
    parser.add_argument("--retries", type=int, default=3)
    chosen = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return after_step(os.environ, RunDirectory(chosen.run_directory), chosen.status, retries=chosen.retries)


if __name__ == "__main__":
    sys.exit(main())
