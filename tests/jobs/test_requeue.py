"""Why an attempt leaves, from Slurm's records; what it asks Slurm for; and what it never does: revive a cancelled job."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import CommandTimeout, JobError, MusterError, NotFoundError, SlurmError, StateError
from cluster.slurm_records import UNLIMITED, AccountingRecord, Job, Node, Partition
from jobs.attempts import EndReason, describe_attempt
from jobs.causes import judge
from jobs.interruption import StopSignals
from jobs.journal import RunDirectory
from jobs.process_group import RankInfo
from jobs.requeue import CANCELLED_EXIT_CODE, REQUEUE_EXIT_CODE, Requeuer, after_step

NOW = datetime(2027, 1, 15, 8, 0, tzinfo=timezone.utc)
START = NOW - timedelta(hours=2)

# What slurmctld 22.05.8 said to the ranks a moment after the signal, in each of its ways to end a job.
RUNNING = Job(
    id="7",
    partition="low",
    state="RUNNING",
    restarts=0,
    may_requeue=True,
    start_time=START,
    end_time=START + timedelta(hours=48),
    time_limit=timedelta(hours=48),
    node_count=2,
    nodes=("gpu-1", "gpu-2"),
)
IN_GRACE = replace(RUNNING, preempt_time=NOW)
REQUEUED_BY_SLURM = replace(RUNNING, state="COMPLETING", restarts=1, end_time=None)
PREEMPTED_FOR_GOOD = replace(RUNNING, state="COMPLETING", preempt_time=NOW, end_time=NOW)
CANCELLED = replace(RUNNING, state="COMPLETING", end_time=NOW)
AT_THE_LIMIT = replace(RUNNING, state="COMPLETING", reason="TimeLimit", time_limit=timedelta(hours=2), end_time=NOW)
NEAR_THE_LIMIT = replace(
    RUNNING, end_time=NOW + timedelta(seconds=150), time_limit=NOW - START + timedelta(seconds=150)
)


def rank_info(rank: int = 0, *, restart_count: int = 0, job_id: str | None = "7") -> RankInfo:
    return RankInfo(
        rank=rank,
        local_rank=0,
        world_size=2,
        local_world_size=1,
        node=f"gpu-{rank + 1}",
        nodes=("gpu-1", "gpu-2"),
        master_address="gpu-1",
        master_port=12345,
        job_id=job_id,
        restart_count=restart_count,
        cluster="demo",
    )


class FakeSlurm:
    """A cluster of four nodes with one job, which remembers what was done to it."""

    def __init__(self, job: Job | None) -> None:
        self.record = job
        self.done: list[str] = []
        self.states = {f"gpu-{number}": frozenset({"IDLE"}) for number in range(1, 5)}
        self.others: list[Job] = []
        self.refusals: list[MusterError] = []
        self.silent = False

    def job(self, job_id: str) -> Job:
        self._answer()
        if self.record is None:
            raise NotFoundError(f"job {job_id}: not known")
        return self.record

    def requeue(self, job_id: str, *, hold: bool = False) -> None:
        self._answer()
        if self.refusals:
            raise self.refusals.pop(0)
        assert self.record is not None
        self.done.append(f"{'requeuehold' if hold else 'requeue'} {job_id}")
        restarts = (self.record.restarts or 0) + 1
        self.record = replace(self.record, state="COMPLETING", restarts=restarts, preempt_time=None)

    def update_job(self, job_id: str, **fields: Any) -> None:
        self._answer()
        self.done.append(f"update {job_id} " + " ".join(f"{key}={value}" for key, value in sorted(fields.items())))

    def nodes(self, names: Sequence[str] = ()) -> list[Node]:
        self._answer()
        return [Node(name=name, states=states) for name, states in self.states.items() if not names or name in names]

    def partitions(self) -> list[Partition]:
        self._answer()
        names = tuple(self.states)
        return [Partition(name="low", nodes=names, tier=10), Partition(name="high", nodes=names, tier=100)]

    def jobs(self, *, partitions: Sequence[str] = (), **_: Any) -> list[Job]:
        self._answer()
        return [job for job in self.others if not partitions or job.partition in partitions]

    def accounting(self, *, job_ids: Sequence[str] = (), **_: Any) -> list[AccountingRecord]:
        self._answer()
        return [
            AccountingRecord(id="7", raw_id="7", state="NODE_FAIL", restarts=0),
            AccountingRecord(id="7.0", raw_id="7.0", state="CANCELLED", restarts=0),
            AccountingRecord(id="7", raw_id="7", state="RUNNING", restarts=1),
        ]

    def _answer(self) -> None:
        if self.silent:
            raise CommandTimeout("scontrol: no answer", argv=["scontrol"], timeout_s=10)


@pytest.mark.parametrize(
    ("job", "reason", "comes_back", "is_requeued"),
    [
        (IN_GRACE, EndReason.PREEMPTED, True, False),
        (PREEMPTED_FOR_GOOD, EndReason.PREEMPTED, True, False),
        (REQUEUED_BY_SLURM, EndReason.REQUEUED, True, True),
        (CANCELLED, EndReason.CANCELLED, False, False),
        (replace(CANCELLED, time_limit=UNLIMITED), EndReason.CANCELLED, False, False),
        (replace(CANCELLED, state="CANCELLED"), EndReason.CANCELLED, False, False),
        (AT_THE_LIMIT, EndReason.TIME_LIMIT, True, False),
        (replace(AT_THE_LIMIT, reason=None), EndReason.TIME_LIMIT, True, False),
        (NEAR_THE_LIMIT, EndReason.TIME_LIMIT, True, False),
        (RUNNING, EndReason.SIGNALLED, True, False),
        (None, EndReason.UNKNOWN, True, False),
        (replace(IN_GRACE, may_requeue=False), EndReason.PREEMPTED, False, False),
    ],
)
def test_why_the_signal_came(job: Job | None, reason: EndReason, comes_back: bool, is_requeued: bool) -> None:
    """Each of Slurm's ways to end a job is told from the others; only a person's cancel, or --no-requeue, is final."""
    cause = judge(job, rank_info(), signal_name="SIGTERM", now=NOW)
    assert (cause.reason, cause.comes_back, cause.is_requeued) == (reason, comes_back, is_requeued)


def test_a_preemption_of_an_earlier_attempt_is_not_this_ones() -> None:
    """PreemptTime before this attempt's start says nothing: a later scancel is a cancel."""
    job = replace(CANCELLED, preempt_time=START - timedelta(hours=1), restarts=1)
    assert judge(job, rank_info(restart_count=1), signal_name="SIGTERM", now=NOW).reason is EndReason.CANCELLED


def test_a_restart_count_of_this_attempt_is_no_requeue() -> None:
    """In the third attempt, Restarts=2 is where it stands; 3 means that Slurm has sent it back again."""
    job = replace(RUNNING, restarts=2, preempt_time=NOW)
    assert not judge(job, rank_info(restart_count=2), signal_name="SIGTERM", now=NOW).is_requeued


def test_a_dead_node_explains_a_requeue() -> None:
    """Slurm has requeued the job and one of its nodes is down: node failure, not preemption."""
    cause = judge(REQUEUED_BY_SLURM, rank_info(), signal_name="SIGTERM", now=NOW, down_nodes=["gpu-2"])
    assert (cause.reason, cause.is_requeued) == (EndReason.NODE_FAILURE, True)
    assert "gpu-2" in cause.message


class Clock:
    """Time that passes by sleeping only."""

    def __init__(self) -> None:
        self.now_s = NOW.timestamp()

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path, heartbeat_s=60)


def make(run: RunDirectory, slurm: FakeSlurm, rank: int = 0, **settings: Any) -> Requeuer:
    clock = Clock()
    return Requeuer(
        rank_info(rank, restart_count=settings.pop("restart_count", 0)),
        run,
        slurm=slurm,  # type: ignore[arg-type] # the methods that are used
        clock=clock,
        sleep=clock.sleep,
        **settings,
    )


def leave(run: RunDirectory, slurm: FakeSlurm, step: int = 20) -> int:
    run.begin_attempt(rank_info(), 0)
    return make(run, slurm).leave(step)


@pytest.mark.parametrize("job", [IN_GRACE, PREEMPTED_FOR_GOOD, AT_THE_LIMIT, NEAR_THE_LIMIT, RUNNING])
def test_the_job_is_requeued_and_its_hold_lifted(run: RunDirectory, job: Job) -> None:
    """Requeue first, then a start time in the near future: in this order, as only a job in the queue takes one."""
    slurm = FakeSlurm(job)
    assert leave(run, slurm) == REQUEUE_EXIT_CODE
    assert slurm.done == ["requeue 7", "update 7 StartTime=now+6seconds"]
    assert run.attempts()[0].ended is not None


def test_a_job_that_slurm_has_requeued_is_not_requeued_again(run: RunDirectory) -> None:
    """Preempted without grace: only the hold is lifted. A second requeue would throw out its own next attempt."""
    slurm = FakeSlurm(REQUEUED_BY_SLURM)
    slurm.others = [Job(id="8", partition="high", state="PENDING")]
    assert leave(run, slurm) == REQUEUE_EXIT_CODE
    assert slurm.done == ["update 7 StartTime=now+6seconds"]
    assert run.attempts()[0].reason is EndReason.PREEMPTED


def test_a_requeue_that_nobody_else_profits_from_was_made_by_hand(run: RunDirectory) -> None:
    """No job of a higher tier waits or has just started: somebody typed scontrol requeue."""
    slurm = FakeSlurm(REQUEUED_BY_SLURM)
    slurm.others = [Job(id="8", partition="high", state="RUNNING", start_time=START)]
    leave(run, slurm)
    assert run.attempts()[0].reason is EndReason.REQUEUED


def test_a_cancelled_job_stays_dead(run: RunDirectory) -> None:
    """Nothing is asked of Slurm, and the exit code is not the one that brings jobs back."""
    slurm = FakeSlurm(CANCELLED)
    assert leave(run, slurm) == CANCELLED_EXIT_CODE
    assert slurm.done == []
    assert run.attempts()[0].reason is EndReason.CANCELLED


def test_a_silent_slurm_leaves_the_exit_code(run: RunDirectory) -> None:
    """slurmctld is down: the attempt ends with 75 for RequeueExit, after a bounded number of tries, and is on record."""
    slurm = FakeSlurm(RUNNING)
    slurm.silent = True
    assert leave(run, slurm) == REQUEUE_EXIT_CODE
    assert run.attempts()[0].reason is EndReason.UNKNOWN


def test_an_element_of_an_array_requeues_itself_only(run: RunDirectory) -> None:
    """The last element has the array's own raw number; only `5_3` does not mean the other elements as well."""
    slurm = FakeSlurm(IN_GRACE)
    info = replace(rank_info(job_id="5"), array_job_id="5", array_task="3")
    run.begin_attempt(info, 0)
    Requeuer(info, run, slurm=slurm).leave(20)  # type: ignore[arg-type]
    assert slurm.done == ["requeue 5_3", "update 5_3 StartTime=now+6seconds"]


def test_a_refused_requeue_is_tried_again(run: RunDirectory) -> None:
    """One refusal (slurmctld busy) costs a moment, not the job."""
    slurm = FakeSlurm(IN_GRACE)
    slurm.refusals = [SlurmError("busy", argv=["scontrol"], returncode=1)]
    leave(run, slurm)
    assert slurm.done[0] == "requeue 7"


def test_rank_0_speaks_and_the_others_follow(run: RunDirectory) -> None:
    """The other rank hears the exit code from rank 0 and asks Slurm for nothing; if rank 0 is gone, it leaves with 75."""

    class FromRank0:
        rank, world_size = 1, 2

        def gather(self, value: Any) -> list[Any]:
            raise AssertionError

        def broadcast(self, value: Any) -> Any:
            assert value is None
            return CANCELLED_EXIT_CODE

    class Gone(FromRank0):
        def broadcast(self, value: Any) -> Any:
            raise RuntimeError("Connection closed by peer")

    slurm = FakeSlurm(IN_GRACE)
    assert make(run, slurm, rank=1).leave(20, ranks=FromRank0()) == CANCELLED_EXIT_CODE
    assert make(run, slurm, rank=1).leave(20, ranks=Gone()) == REQUEUE_EXIT_CODE
    assert slurm.done == []


def test_commands_started_while_leaving_are_deaf_to_slurms_signals(run: RunDirectory) -> None:
    """The requeue sends TERM to the whole step, so also to `scontrol update`: it must inherit being ignored."""
    import subprocess

    class Signalling(FakeSlurm):
        def update_job(self, job_id: str, **fields: Any) -> None:
            child = subprocess.run(
                ["sh", "-c", "kill -TERM $$; kill -USR2 $$; echo alive"], check=False, capture_output=True, text=True
            )
            self.done.append(child.stdout.strip())

    with StopSignals() as stop:
        slurm = Signalling(IN_GRACE)
        run.begin_attempt(rank_info(), 0)
        Requeuer(rank_info(), run, stop=stop, slurm=slurm).leave(20)  # type: ignore[arg-type]
        assert slurm.done == ["requeue 7", "alive"]
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested == "SIGTERM"  # the trainer's own handlers are back


def test_outside_slurm_a_stop_only_ends_the_process(run: RunDirectory) -> None:
    """On a laptop the exit code says that it may be started again; nothing is asked of a Slurm that is not there."""
    slurm = FakeSlurm(None)
    info = replace(rank_info(job_id=None), world_size=1)
    run.begin_attempt(info, 0)
    assert Requeuer(info, run, slurm=slurm).leave(5) == REQUEUE_EXIT_CODE  # type: ignore[arg-type]
    assert slurm.done == []
    assert run.attempts()[0].reason is EndReason.SIGNALLED


# Crashes


def test_a_crash_is_retried_without_its_node(run: RunDirectory) -> None:
    """Rank 1 on gpu-2 fails: requeued, gpu-2 excluded besides what was excluded before, and rank 0 writes it down."""
    slurm = FakeSlurm(replace(RUNNING, excluded_nodes=("gpu-9",)))
    run.begin_attempt(rank_info(), 0)
    assert make(run, slurm, rank=1).leave_after_crash(ValueError("not a number"), step=3) == REQUEUE_EXIT_CODE
    assert slurm.done == ["requeue 7", "update 7 ExcNodeList=gpu-[2,9] StartTime=now+6seconds"]
    assert make(run, slurm).leave_after_crash(RuntimeError("Connection closed by peer"), step=4) == REQUEUE_EXIT_CODE
    assert len(slurm.done) == 2
    attempt = run.attempts()[0]
    assert (attempt.reason, attempt.failing_rank, attempt.message) == (EndReason.CRASHED, 1, "ValueError: not a number")


def test_no_node_is_excluded_that_the_job_cannot_do_without(run: RunDirectory) -> None:
    """Two of four nodes are down: without gpu-2 the job would wait for ever."""
    slurm = FakeSlurm(RUNNING)
    slurm.states.update({"gpu-3": frozenset({"DOWN"}), "gpu-4": frozenset({"IDLE", "DRAIN"})})
    run.begin_attempt(rank_info(), 0)
    make(run, slurm, rank=1).leave_after_crash(ValueError("x"))
    assert slurm.done == ["requeue 7", "update 7 StartTime=now+6seconds"]


def test_a_node_that_fell_silent_is_excluded(run: RunDirectory) -> None:
    """Only rank 0 could speak, and it merely lost a connection: gpu-2, from which nothing came, is avoided, not gpu-1."""
    slurm = FakeSlurm(RUNNING)
    run.begin_attempt(rank_info(), 0)
    make(run, slurm).leave_after_crash(RuntimeError("Connection reset by peer"), step=3)
    assert slurm.done[1] == "update 7 ExcNodeList=gpu-2 StartTime=now+6seconds"
    assert "nothing was heard from gpu-2" in run.attempts()[0].message
    assert run.attempts()[0].failing_rank is None


def test_the_last_retry_ends_the_job(run: RunDirectory) -> None:
    """With no retry left nothing is requeued, the exit code is the error's own, and `failed` says why."""
    slurm = FakeSlurm(RUNNING)
    run.begin_attempt(rank_info(), 0)
    assert make(run, slurm, retries=0).leave_after_crash(ValueError("not a number"), step=3) == 1
    assert slurm.done == []
    assert run.failure is not None
    assert "ValueError: not a number" in run.failure


def test_what_a_person_must_mend_is_not_tried_again(run: RunDirectory) -> None:
    """A wrong setting fails the same way every time: the exit code of the error, no requeue."""
    slurm = FakeSlurm(RUNNING)
    run.begin_attempt(rank_info(), 0)
    error = JobError("batch_size (7): wrong")
    assert make(run, slurm).leave_after_crash(error) == error.exit_code
    assert slurm.done == []


def test_a_crash_early_in_a_short_job_is_no_time_limit(run: RunDirectory) -> None:
    """Second 5 of a limit of two minutes: the failure counts, so that `retries` ends the job some day."""
    short = replace(
        RUNNING,
        start_time=NOW - timedelta(seconds=5),
        end_time=NOW + timedelta(seconds=115),
        time_limit=timedelta(minutes=2),
    )
    slurm = FakeSlurm(short)
    run.begin_attempt(rank_info(), 0)
    assert make(run, slurm, retries=0).leave_after_crash(ValueError("not a number")) == 1
    assert slurm.done == []
    assert run.attempts()[0].reason is EndReason.CRASHED


@pytest.mark.parametrize(("job", "signal_number"), [(AT_THE_LIMIT, None), (NEAR_THE_LIMIT, signal.SIGUSR2)])
def test_a_crash_at_the_time_limit_is_the_limits_fault(
    run: RunDirectory, job: Job, signal_number: signal.Signals | None
) -> None:
    """Ended by Slurm, or warned and then failing on peers that have left: no failure, no blame."""
    slurm = FakeSlurm(job)
    run.begin_attempt(rank_info(), 0)
    with StopSignals() as stop:
        if signal_number is not None:
            os.kill(os.getpid(), signal_number)
        error = RuntimeError("Connection closed by peer")
        assert make(run, slurm, retries=0, stop=stop).leave_after_crash(error) == REQUEUE_EXIT_CODE
    assert run.attempts()[0].reason is EndReason.TIME_LIMIT


def test_a_crash_in_a_cancelled_job_brings_nothing_back(run: RunDirectory) -> None:
    """scancel while the ranks are in a collective: they fail on broken connections, and the job stays cancelled."""
    slurm = FakeSlurm(CANCELLED)
    run.begin_attempt(rank_info(), 0)
    assert make(run, slurm).leave_after_crash(RuntimeError("Connection closed by peer")) == CANCELLED_EXIT_CODE
    assert slurm.done == []


def test_a_crash_under_preemption_is_the_preemptions_fault(run: RunDirectory) -> None:
    """Peers killed at the end of the grace make ranks fail; that neither counts as failure nor blames a node."""
    slurm = FakeSlurm(IN_GRACE)
    run.begin_attempt(rank_info(), 0)
    make(run, slurm, retries=0).leave_after_crash(RuntimeError("Connection closed by peer"))
    assert slurm.done == ["requeue 7", "update 7 StartTime=now+6seconds"]
    assert run.attempts()[0].reason is EndReason.PREEMPTED


def test_a_signal_that_another_ranks_crash_caused_follows_that_crash(run: RunDirectory) -> None:
    """Rank 1 has failed and settled the attempt; the TERM that rank 0 then gets is no preemption and no second requeue."""
    slurm = FakeSlurm(RUNNING)
    run.begin_attempt(rank_info(), 0)
    make(run, slurm, rank=1).leave_after_crash(ValueError("x"))
    before = list(slurm.done)
    assert make(run, slurm).leave(5) == REQUEUE_EXIT_CODE
    assert slurm.done == before
    assert run.attempts()[0].reason is EndReason.CRASHED


def test_a_stop_during_start_up_requeues_once(run: RunDirectory) -> None:
    """Whichever rank notices first requeues; the other follows; the attempt is on record though it never began."""
    slurm = FakeSlurm(IN_GRACE)
    assert make(run, slurm, rank=1).leave_early() == REQUEUE_EXIT_CODE
    assert make(run, slurm, rank=0).leave_early() == REQUEUE_EXIT_CODE
    assert slurm.done == ["requeue 7", "update 7 StartTime=now+6seconds"]
    assert [attempt.reason for attempt in run.attempts()] == [EndReason.PREEMPTED]


def test_a_refused_job_leaves_no_trace_in_the_journal(run: RunDirectory) -> None:
    """Job 8 may not work where job 7 does: that is no attempt of this run, and no failure."""
    slurm = FakeSlurm(RUNNING)
    run.begin_attempt(rank_info(), 0)
    other = RunDirectory(run.path, heartbeat_s=60)
    error = StateError("job 7 works on this run")
    requeuer = Requeuer(rank_info(job_id="8"), other, slurm=slurm)  # type: ignore[arg-type]
    assert requeuer.leave_after_crash(error) == error.exit_code
    assert [attempt.job_id for attempt in run.attempts()] == ["7"]


@pytest.mark.parametrize(("heard", "silent"), [(14, 2), (13, 0), (1, 0)])
def test_few_silent_nodes_are_suspect_and_many_are_only_late(run: RunDirectory, heard: int, silent: int) -> None:
    """Of sixteen nodes two may be excluded for their silence; three have not all failed at once."""
    names = tuple(f"gpu-{number}" for number in range(1, 17))
    slurm = FakeSlurm(RUNNING)
    slurm.states = {name: frozenset({"IDLE"}) for name in names}
    lost = RuntimeError("Connection reset by peer")
    for rank in range(1, heard):
        run.note_crash(replace(rank_info(rank), nodes=names), lost)
    info = replace(rank_info(), nodes=names, world_size=16)
    clock = Clock()
    Requeuer(info, run, slurm=slurm, clock=clock, sleep=clock.sleep).leave_after_crash(lost)  # type: ignore[arg-type]
    assert ("ExcNodeList" in slurm.done[1]) is (silent > 0)


def test_without_an_answer_no_job_is_requeued(run: RunDirectory) -> None:
    """It may be cancelled, and a requeue would revive it. So only the exit code speaks, after a crash as after a signal."""

    class Mute(FakeSlurm):
        def job(self, job_id: str) -> Job:
            raise CommandTimeout("scontrol: no answer", argv=["scontrol"], timeout_s=10)

    slurm = Mute(RUNNING)
    assert leave(run, slurm) == REQUEUE_EXIT_CODE
    run.begin_attempt(rank_info(restart_count=1), 20)
    assert make(run, slurm, restart_count=1).leave_after_crash(ValueError("x")) == REQUEUE_EXIT_CODE
    assert slurm.done == []


def test_a_slurm_that_is_slow_to_answer_is_asked_again(run: RunDirectory) -> None:
    """slurmctld restarts: the fourth question is answered, and the job requeued."""

    class Restarting(FakeSlurm):
        unanswered = 3

        def job(self, job_id: str) -> Job:
            if self.unanswered:
                self.unanswered -= 1
                raise CommandTimeout("scontrol: no answer", argv=["scontrol"], timeout_s=10)
            return super().job(job_id)

    slurm = Restarting(IN_GRACE)
    leave(run, slurm)
    assert slurm.done[0] == "requeue 7"


@pytest.mark.parametrize("reason", ["JobHeldUser", "Dependency", "BeginTime"])
def test_a_job_that_waits_for_something_else_has_preempted_nobody(run: RunDirectory, reason: str) -> None:
    """A held job of a higher tier does not want the nodes: the requeue was made by hand."""
    slurm = FakeSlurm(REQUEUED_BY_SLURM)
    slurm.others = [Job(id="8", partition="high", state="PENDING", reason=reason)]
    leave(run, slurm)
    assert run.attempts()[0].reason is EndReason.REQUEUED


# A full disk


class FullRun(RunDirectory):
    """A run on a disk without a byte left."""

    def _append(self, event: str, **fields: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def give_up(self, message: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))


def full_disk(*, wrapped: bool) -> Exception:
    try:
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if not wrapped:
                raise
            raise MusterError("step 30 could not be saved") from error
    except (OSError, MusterError) as error:
        return error


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(("restart_count", "done"), [(2, "requeue 7"), (3, "requeuehold 7")])
def test_on_a_full_disk_the_job_is_held_in_the_end(
    tmp_path: Path, restart_count: int, done: str, wrapped: bool
) -> None:
    """No failure can be counted there; so after `retries` restarts the job waits for a person instead of trying for ever."""
    slurm = FakeSlurm(replace(RUNNING, restarts=restart_count))
    run = FullRun(tmp_path)
    code = make(run, slurm, restart_count=restart_count).leave_after_crash(full_disk(wrapped=wrapped))
    assert code == REQUEUE_EXIT_CODE
    assert slurm.done[0] == done
    assert not (done == "requeuehold 7" and len(slurm.done) > 1)


def test_a_run_that_cannot_even_be_held_ends(tmp_path: Path) -> None:
    """Slurm refuses the hold: the error's own exit code, which brings nothing back."""
    slurm = FakeSlurm(replace(RUNNING, restarts=3))
    slurm.refusals = [SlurmError("no", argv=["scontrol"], returncode=1) for _ in range(3)]
    assert make(FullRun(tmp_path), slurm, restart_count=3).leave_after_crash(full_disk(wrapped=False)) == 1


def test_giving_up_on_a_full_disk_still_ends_the_job(tmp_path: Path) -> None:
    """`failed` cannot be written, which is not an error of its own."""
    slurm = FakeSlurm(RUNNING)
    assert make(FullRun(tmp_path), slurm, retries=0).leave_after_crash(ValueError("x")) == 1
    assert slurm.done == []


def test_a_full_disk_keeps_no_lock(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end cannot be noted, and the run is free for the next all the same."""
    run.begin_attempt(rank_info(), 0)
    monkeypatch.setattr(run, "_append", FullRun(run.path)._append)
    with pytest.raises(OSError, match="No space left"):
        run.end_attempt(EndReason.CRASHED, 3)
    assert not (run.path / "lock.json").exists()


# The batch script's last resort

BATCH = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "gpu-[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_CLUSTER_NAME": "demo",
}


def settle(run: RunDirectory, slurm: FakeSlurm, status: int) -> int:
    return after_step(BATCH, run, status, slurm=slurm)  # type: ignore[arg-type]


def test_a_step_that_was_killed_whole_is_retried(run: RunDirectory) -> None:
    """137 and no word from any rank: requeued, counted as a failure."""
    slurm = FakeSlurm(RUNNING)
    assert settle(run, slurm, 137) == REQUEUE_EXIT_CODE
    assert slurm.done[0] == "requeue 7"
    assert run.attempts()[0].reason is EndReason.CRASHED
    assert "137" in run.attempts()[0].message


def test_a_step_that_was_killed_whole_blames_nobody(run: RunDirectory) -> None:
    """The batch script runs on the first node; that is no reason to suspect this node, nor rank 0."""
    slurm = FakeSlurm(RUNNING)
    run.begin_attempt(rank_info(), 0)
    settle(run, slurm, 137)
    assert slurm.done == ["requeue 7", "update 7 StartTime=now+6seconds"]
    assert run.crash_notes(rank_info().attempt_label) == []
    assert "failed first" not in describe_attempt(run.attempts()[0])


def test_the_batch_script_believes_a_rank_that_could_still_speak(run: RunDirectory) -> None:
    """Rank 1 left a note before the step was killed: gpu-2 is excluded, and its note is the message."""
    slurm = FakeSlurm(RUNNING)
    run.note_crash(rank_info(1), ValueError("not a number"))
    settle(run, slurm, 1)
    assert slurm.done[1] == "update 7 ExcNodeList=gpu-2 StartTime=now+6seconds"
    (attempt,) = run.attempts()
    assert (attempt.failing_rank, attempt.message) == (1, "ValueError: not a number")


@pytest.mark.parametrize("status", [0, REQUEUE_EXIT_CODE, CANCELLED_EXIT_CODE])
def test_a_step_that_settled_itself_is_left_alone(run: RunDirectory, status: int) -> None:
    """Finished, coming back or cancelled: nothing more to do."""
    slurm = FakeSlurm(RUNNING)
    assert settle(run, slurm, status) == status
    assert slurm.done == []


def test_a_step_ended_by_scancel_is_not_brought_back(run: RunDirectory) -> None:
    """143 looks like a preemption during start-up; Slurm says that it was cancelled."""
    slurm = FakeSlurm(CANCELLED)
    assert settle(run, slurm, 143) == CANCELLED_EXIT_CODE
    assert slurm.done == []


# What Slurm knows


def test_accounting_explains_an_attempt_by_its_restart_count(run: RunDirectory) -> None:
    """The record of the same attempt counts, not that of a step, nor that of a later attempt."""
    run.begin_attempt(rank_info(), 0)
    explained = make(run, FakeSlurm(RUNNING), restart_count=1).explain(run.attempts()[0])
    assert explained is not None
    assert explained[0] is EndReason.NODE_FAILURE


def test_a_job_is_alive_dead_or_unknown(run: RunDirectory) -> None:
    """Queued counts as alive (it will come back); forgotten by Slurm is dead; no answer is no answer."""
    slurm = FakeSlurm(replace(RUNNING, state="PENDING"))
    requeuer = make(run, slurm)
    assert requeuer.is_job_alive("7") is True
    slurm.record = replace(RUNNING, state="COMPLETED")
    assert requeuer.is_job_alive("7") is False
    slurm.record = None
    assert requeuer.is_job_alive("7") is False
    slurm.silent = True
    assert requeuer.is_job_alive("7") is None


def test_the_time_left_is_known_and_asked_for_rarely(run: RunDirectory) -> None:
    """46 h of 48 h are left; within the next ten minutes Slurm is not asked again."""
    slurm = FakeSlurm(RUNNING)
    requeuer = make(run, slurm)
    assert requeuer.time_left_s() == pytest.approx(46 * 3600)
    slurm.silent = True
    assert requeuer.time_left_s() == pytest.approx(46 * 3600)
    assert make(run, FakeSlurm(replace(RUNNING, time_limit=UNLIMITED))).time_left_s() is None
