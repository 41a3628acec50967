"""The journal of a run: what is in it after every kind of end, torn lines, giving up, and one job at a time."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import StateError
from jobs.attempts import AttemptRecord, CrashNote, EndReason, failures_without_progress, first_failure, read_events
from jobs.journal import Ending, RunDirectory, describe_attempt
from jobs.process_group import RankInfo


class Clock:
    """Seconds since 1970 that a test moves on."""

    def __init__(self) -> None:
        self.now_s = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now_s


def rank_info(rank: int = 0, *, job_id: str | None = "7", restart_count: int = 0, world_size: int = 2) -> RankInfo:
    return RankInfo(
        rank=rank,
        local_rank=0,
        world_size=world_size,
        local_world_size=1,
        node=f"gpu-{rank + 1}",
        nodes=tuple(f"gpu-{number + 1}" for number in range(world_size)),
        master_address="gpu-1",
        master_port=12345,
        job_id=job_id,
        restart_count=restart_count,
        cluster="demo",
    )


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def run(tmp_path: Path, clock: Clock) -> RunDirectory:
    return RunDirectory(tmp_path / "run", clock=clock, heartbeat_s=60)


def again(run: RunDirectory, clock: Clock) -> RunDirectory:
    """The next process that opens the same run."""
    return RunDirectory(run.path, clock=clock, heartbeat_s=60)


def die(run: RunDirectory) -> None:
    """End without a word: what SIGKILL leaves behind, its heartbeat thread gone and its process number free."""
    lock = run._lock
    lock._stop.set()
    assert lock._thread is not None
    lock._thread.join()
    content = json.loads((run.path / "lock.json").read_text())
    (run.path / "lock.json").write_text(json.dumps({**content, "pid": 2**22 + 1}))


def test_a_graceful_attempt_is_told_in_full(run: RunDirectory, clock: Clock) -> None:
    """Begin, commits and end add up to one record; a state saved at the last step loses nothing."""
    run.begin_attempt(rank_info(), 0)
    clock.now_s += 10
    run.note_commit(50)
    clock.now_s += 5
    run.end_attempt(EndReason.PREEMPTED, 50, message="wanted")
    (attempt,) = run.attempts()
    assert (attempt.number, attempt.job_id, attempt.nodes) == (1, "7", ("gpu-1", "gpu-2"))
    assert (attempt.reason, attempt.first_step, attempt.last_step, attempt.committed_step) == (
        EndReason.PREEMPTED,
        0,
        50,
        50,
    )
    assert (attempt.steps_done, attempt.seconds_lost) == (50, 0.0)
    assert attempt.started is not None
    assert attempt.ended is not None
    assert (attempt.ended - attempt.started).total_seconds() == 15


def test_work_after_the_last_checkpoint_is_lost_time(run: RunDirectory, clock: Clock) -> None:
    """Saved at 50, ended at 60 twelve seconds later: 12 s are lost."""
    run.begin_attempt(rank_info(), 0)
    run.note_commit(50)
    clock.now_s += 12
    run.end_attempt(EndReason.CRASHED, 60)
    assert run.attempts()[0].seconds_lost == 12.0


def test_other_ranks_write_nothing(run: RunDirectory) -> None:
    """Rank 1 may call everything; the run directory is not even made."""
    assert run.begin_attempt(rank_info(1), 0) is None
    run.note_commit(5)
    run.end_attempt(EndReason.PREEMPTED, 5)
    run.mark_finished(5)
    assert not run.path.exists()


def test_a_silent_death_is_completed_by_the_next_attempt(run: RunDirectory, clock: Clock) -> None:
    """Killed 30 s after its checkpoint of step 40, at step 47: the next attempt, which starts from 40, writes that down."""
    run.begin_attempt(rank_info(), 0)
    run.note_step(40)
    run.note_commit(40)
    clock.now_s += 30
    run.note_step(47)
    run._lock._beat()
    die(run)
    clock.now_s += 600
    later = again(run, clock)
    later.begin_attempt(rank_info(restart_count=1), 40)
    first, second = later.attempts()
    assert first.reason is EndReason.UNKNOWN
    assert "without a word" in first.message
    assert (first.last_step, first.committed_step, first.seconds_lost) == (47, 40, 30.0)
    assert (second.number, second.first_step, second.reason) == (2, 40, None)


def test_slurm_may_know_why_an_attempt_died_silently(run: RunDirectory, clock: Clock) -> None:
    """What `explain` answers for that attempt becomes its reason."""
    run.begin_attempt(rank_info(), 0)
    die(run)
    asked: list[AttemptRecord] = []

    def explain(attempt: AttemptRecord) -> tuple[EndReason, str]:
        asked.append(attempt)
        return EndReason.NODE_FAILURE, "NODE_FAIL"

    later = again(run, clock)
    later.begin_attempt(rank_info(restart_count=1), 0, explain=explain)
    assert [attempt.job_id for attempt in asked] == ["7"]
    assert later.attempts()[0].reason is EndReason.NODE_FAILURE


def test_metrics_show_how_far_a_silent_attempt_came(run: RunDirectory, clock: Clock) -> None:
    """Without a heartbeat since, the last whole line of metrics.jsonl gives the step, even if a torn one follows."""
    run.begin_attempt(rank_info(), 0)
    (run.path / "metrics.jsonl").write_text('{"step": 11, "loss": 1}\n{"step": 12, "lo')
    os.utime(run.path / "metrics.jsonl", (clock.now_s + 9, clock.now_s + 9))
    die(run)
    later = again(run, clock)
    later.begin_attempt(rank_info(restart_count=1), 0)
    assert later.attempts()[0].last_step == 11
    assert later.attempts()[0].seconds_lost == pytest.approx(9, abs=0.01)


def test_a_failing_ranks_note_is_believed_over_its_victims(run: RunDirectory, clock: Clock) -> None:
    """Rank 0 only lost a connection and wrote first; rank 1 divided by zero: the attempt crashed on rank 1's node."""
    run.begin_attempt(rank_info(), 0)
    run.note_crash(rank_info(0), RuntimeError("[x] Connection closed by peer [127.0.0.1]:1"))
    clock.now_s += 1
    run.note_crash(rank_info(1), ZeroDivisionError("division by zero"), step=3)
    die(run)
    later = again(run, clock)
    later.begin_attempt(rank_info(restart_count=1), 0)
    attempt = later.attempts()[0]
    assert (attempt.reason, attempt.failing_rank, attempt.failing_node) == (EndReason.CRASHED, 1, "gpu-2")
    assert attempt.message == "ZeroDivisionError: division by zero"
    assert attempt.last_step == 3


def test_a_torn_last_line_is_left_out_and_closed_off(run: RunDirectory, clock: Clock) -> None:
    """A crash in the middle of an append costs that event only: what comes later is on lines of its own."""
    run.begin_attempt(rank_info(), 0)
    run.end_attempt(EndReason.PREEMPTED, 5)
    with (run.path / "attempts.jsonl").open("a") as file:
        file.write('{"event": "begin", "attempt": 2, "job')
    later = again(run, clock)
    assert [attempt.number for attempt in later.attempts()] == [1]
    later.begin_attempt(rank_info(restart_count=1), 5)
    assert [(a.number, a.first_step) for a in later.attempts()] == [(1, 0), (2, 5)]


@given(st.text())
def test_any_text_is_read_without_error(text: str) -> None:
    """A journal from a damaged disk gives what can be read."""
    assert isinstance(read_events(text), list)


def fail_once(
    run: RunDirectory, clock: Clock, restart_count: int, *, start: int = 0, commit: int | None = None
) -> RunDirectory:
    later = again(run, clock)
    later.begin_attempt(rank_info(restart_count=restart_count), start, retries=2)
    if commit is not None:
        later.note_commit(commit)
    later.end_attempt(
        EndReason.CRASHED, start + 3, message="the loss is not a number", failing_rank=1, failing_node="gpu-2"
    )
    return later


def test_the_run_gives_up_after_failures_without_progress(run: RunDirectory, clock: Clock) -> None:
    """With 2 retries the third failure was the last: the fourth start is refused, and says what happened and what helps."""
    for restart in range(3):
        fail_once(run, clock, restart)
    with pytest.raises(StateError, match="given up") as caught:
        again(run, clock).begin_attempt(rank_info(restart_count=3), 0, retries=2)
    assert "3 attempts in a row failed without a new checkpoint" in str(caught.value)
    assert "rank 1 on gpu-2" in str(caught.value)
    assert str(run.path / "failed") in str(caught.value)
    with pytest.raises(StateError, match="given up"):
        again(run, clock).begin_attempt(rank_info(job_id="8"), 0)


def test_a_person_can_let_it_try_again(run: RunDirectory, clock: Clock) -> None:
    """After clear_failures the old failures no longer count, but stay on record."""
    for restart in range(3):
        fail_once(run, clock, restart)
    later = again(run, clock)
    with pytest.raises(StateError):
        later.begin_attempt(rank_info(restart_count=3), 0, retries=2)
    later.clear_failures()
    assert later.failure is None
    fail_once(later, clock, 4)
    fail_once(later, clock, 5)
    assert len(later.attempts()) == 5


def test_a_new_checkpoint_starts_the_count_again(run: RunDirectory, clock: Clock) -> None:
    """Two failures, one that saved something new first, two more: still below three in a row."""
    fail_once(run, clock, 0)
    fail_once(run, clock, 1)
    fail_once(run, clock, 2, commit=10)
    fail_once(run, clock, 3, start=10)
    fail_once(run, clock, 4, start=10)
    later = again(run, clock)
    assert later.begin_attempt(rank_info(restart_count=5), 10, retries=2) is not None


def test_preemptions_neither_count_nor_forgive(run: RunDirectory, clock: Clock) -> None:
    """Crash, preempted, crash, preempted, crash: three failures in a row all the same; ten preemptions alone are none."""
    for restart in range(10):
        later = again(run, clock)
        later.begin_attempt(rank_info(restart_count=restart), 0, retries=2)
        later.end_attempt(EndReason.PREEMPTED, 0)
    for restart in range(10, 16, 2):
        fail_once(run, clock, restart)
        if restart < 14:
            later = again(run, clock)
            later.begin_attempt(rank_info(restart_count=restart + 1), 0, retries=2)
            later.end_attempt(EndReason.TIME_LIMIT, 0)
    with pytest.raises(StateError, match="given up"):
        again(run, clock).begin_attempt(rank_info(restart_count=16), 0, retries=2)


def test_attempts_that_never_began_count_too(run: RunDirectory, clock: Clock) -> None:
    """Ranks that cannot find each other fail before rank 0 begins: with 1 retry the second time may not be retried."""
    ending = Ending(1, EndReason.CRASHED, "rank 1 did not come", 0, "gpu-1")
    assert run.may_retry(rank_info(), retries=1)
    run.end_unbegun(rank_info(), ending)
    assert not run.may_retry(rank_info(restart_count=1), retries=1)
    run.end_unbegun(rank_info(restart_count=1), ending)
    assert [attempt.reason for attempt in run.attempts()] == [EndReason.CRASHED] * 2


@given(st.lists(st.sampled_from(list(EndReason)), max_size=12), st.integers(0, 3))
def test_only_failures_are_ever_counted(reasons: list[EndReason], extra: int) -> None:
    """Without any progress the count is the number of failures; with progress since, it is nothing."""
    attempts = [AttemptRecord(number=n + 1, reason=reason, first_step=5) for n, reason in enumerate(reasons)]
    failed = [attempt for attempt in attempts if attempt.reason is not None and attempt.reason.is_failure]
    assert failures_without_progress(attempts, 5) == failed
    if extra and attempts:
        assert failures_without_progress(attempts, 5 + extra) == []


def test_a_finished_run_is_not_begun_again(run: RunDirectory, clock: Clock) -> None:
    """The flag is there, the reason is on record, and another attempt is refused with what to do."""
    run.begin_attempt(rank_info(), 90)
    run.note_commit(100)
    run.mark_finished(100)
    later = again(run, clock)
    assert later.is_finished
    assert later.attempts()[0].reason is EndReason.FINISHED
    assert not (run.path / "lock.json").exists()
    with pytest.raises(StateError, match="finished"):
        later.begin_attempt(rank_info(restart_count=1), 100)


# One job at a time


def test_another_live_job_is_refused(run: RunDirectory, clock: Clock) -> None:
    """Slurm says that job 7 runs: job 8 may not work here, and is told how to end it."""
    run.begin_attempt(rank_info(), 0)
    with pytest.raises(StateError, match=r"job 7 on .* works on this run.*muster jobs cancel 7"):
        again(run, clock).begin_attempt(rank_info(job_id="8"), 0, is_job_alive=lambda job_id: True)
    run.end_attempt(EndReason.PREEMPTED, 0)


def test_a_dead_jobs_lock_is_taken_over(run: RunDirectory, clock: Clock) -> None:
    """Slurm says that job 7 is over: job 8 goes on at once, whatever the heartbeat looks like."""
    run.begin_attempt(rank_info(), 0)
    later = again(run, clock)
    assert later.begin_attempt(rank_info(job_id="8"), 0, is_job_alive=lambda job_id: False) is not None
    run._lock._beat()
    with pytest.raises(StateError, match="taken this run over"):
        run.note_step(5)


def test_the_next_attempt_of_the_same_job_takes_over_at_once(run: RunDirectory, clock: Clock) -> None:
    """A requeued job finds the lock of its own earlier attempt, seconds old: it is not refused."""
    run.begin_attempt(rank_info(), 0)
    assert again(run, clock).begin_attempt(rank_info(restart_count=1), 0, is_job_alive=lambda job_id: True) is not None


def test_a_second_step_of_the_same_attempt_is_refused(run: RunDirectory, clock: Clock) -> None:
    """Two `srun` of one job in one run directory: the second sees the first one's process alive."""
    run.begin_attempt(rank_info(), 0)
    with pytest.raises(StateError, match=f"process {os.getpid()} on this machine"):
        again(run, clock).begin_attempt(rank_info(), 0)
    run.end_attempt(EndReason.PREEMPTED, 0)


def owner_elsewhere(run: RunDirectory, **changes: object) -> None:
    """Make the lock look like one from another machine."""
    content = json.loads((run.path / "lock.json").read_text())
    (run.path / "lock.json").write_text(json.dumps({**content, "machine": "other/pid:[1]", "host": "far-1", **changes}))


def test_on_another_machine_only_the_sign_of_life_counts(run: RunDirectory, clock: Clock) -> None:
    """No Slurm to ask: fresh signs refuse, signs older than two minutes by the file server's clock do not."""
    run.begin_attempt(rank_info(job_id=None), 0)
    owner_elsewhere(run)
    with pytest.raises(StateError, match=r"far-1 gave a sign of life here \d+ s ago"):
        again(run, clock).begin_attempt(rank_info(job_id="8"), 0)
    for name in ("lock.json", "heartbeat.json"):
        old_s = (run.path / name).stat().st_mtime - 121
        os.utime(run.path / name, (old_s, old_s))
    assert again(run, clock).begin_attempt(rank_info(job_id="8"), 0) is not None


def test_when_slurm_is_silent_the_sign_of_life_decides(run: RunDirectory, clock: Clock) -> None:
    """`None` from is_job_alive is not taken for dead."""
    run.begin_attempt(rank_info(), 0)
    owner_elsewhere(run)
    with pytest.raises(StateError, match="sign of life"):
        again(run, clock).begin_attempt(rank_info(job_id="8"), 0, is_job_alive=lambda job_id: None)


def test_a_damaged_lock_is_not_taken_for_a_free_run(run: RunDirectory, clock: Clock) -> None:
    """Unreadable, but fresh: refused, and the message names the file to remove."""
    run.begin_attempt(rank_info(), 0)
    (run.path / "lock.json").write_text("{")
    with pytest.raises(StateError, match=r"remove .*lock\.json"):
        again(run, clock).begin_attempt(rank_info(job_id="8"), 0)


def test_a_refused_start_leaves_the_owner_its_lock(run: RunDirectory, clock: Clock) -> None:
    """The one who was refused neither removes nor replaces anything."""
    run.begin_attempt(rank_info(), 0)
    before = (run.path / "lock.json").read_text()
    with pytest.raises(StateError):
        again(run, clock).begin_attempt(rank_info(job_id="8"), 0, is_job_alive=lambda job_id: True)
    assert (run.path / "lock.json").read_text() == before
    assert socket.gethostname() in before


def test_a_heartbeat_that_cannot_be_written_does_not_end_training(tmp_path: Path, clock: Clock) -> None:
    """The directory is gone (an unmounted file system): the thread says so once and lives."""
    import shutil
    import time

    run = RunDirectory(tmp_path / "run", clock=clock, heartbeat_s=0.05)
    run.begin_attempt(rank_info(), 0)
    shutil.rmtree(run.path)
    time.sleep(0.3)
    run.note_step(4)
    assert run._lock._thread is not None
    assert run._lock._thread.is_alive()
    run._lock._stop.set()


# Crashes


def test_exactly_one_rank_settles_a_crash(run: RunDirectory) -> None:
    """The first to claim it does; the others read its exit code. Another attempt is another matter."""
    assert run.claim_ending(rank_info(1))
    assert not run.claim_ending(rank_info(0))
    assert run.read_ending(rank_info(0)) is None
    ending = Ending(75, EndReason.CRASHED, "x", 1, "gpu-2")
    run.write_ending(rank_info(1), ending)
    assert run.read_ending(rank_info(0)) == ending
    assert run.claim_ending(rank_info(0, restart_count=1))


def test_the_first_failure_is_the_earliest_that_is_no_after_effect() -> None:
    """Of victims only, the earliest; of none, nothing."""
    victim = CrashNote(rank=0, node="a", message="RuntimeError: Connection reset by peer", time="1")
    cause = CrashNote(rank=1, node="b", message="OSError: input/output error", time="2")
    assert first_failure([victim, cause]) is cause
    assert first_failure([victim]) is victim
    assert first_failure([]) is None


def test_an_attempt_in_one_line(run: RunDirectory) -> None:
    """Number, job, nodes, steps, lost time, reason, message and the rank to blame: what a person asks first."""
    attempt = AttemptRecord(
        number=2,
        job_id="7",
        nodes=("gpu-1",),
        first_step=10,
        last_step=30,
        seconds_lost=4.2,
        reason=EndReason.CRASHED,
        message="boom",
        failing_rank=3,
        failing_node="gpu-1",
    )
    assert describe_attempt(attempt) == (
        "attempt 2 (job 7) on gpu-1, steps 10 to 30, 4 s lost: crashed: boom; rank 3 on gpu-1 failed first"
    )
    assert describe_attempt(dataclasses.replace(attempt, reason=None, message="", failing_rank=None)).endswith(
        "running"
    )


def test_a_run_is_locked_before_its_attempt_begins(run: RunDirectory, clock: Clock) -> None:
    """Locked, then begun with the same lock; meanwhile another is refused; the attempt's end unlocks."""
    run.lock(rank_info())
    assert run.attempts() == []
    with pytest.raises(StateError, match="works on this run"):
        again(run, clock).lock(rank_info(job_id="8"))
    assert run.begin_attempt(rank_info(), 0) is not None
    run.release()  # an attempt's own lock is not given back by this
    assert (run.path / "lock.json").exists()
    run.end_attempt(EndReason.PREEMPTED, 1)
    assert not (run.path / "lock.json").exists()


def test_a_lock_without_an_attempt_is_given_back(run: RunDirectory, clock: Clock) -> None:
    """What fails between the lock and the attempt frees the run for the next; other ranks touch nothing."""
    run.release()
    run.lock(rank_info(1))
    assert not run.path.exists()
    run.lock(rank_info())
    run.release()
    again(run, clock).lock(rank_info(job_id="8"))


def test_a_finished_run_gives_an_earlier_lock_back(run: RunDirectory, clock: Clock) -> None:
    """Refused because it is finished, the lock taken before is not left behind."""
    run.begin_attempt(rank_info(), 0)
    run.mark_finished(3)
    later = again(run, clock)
    later.lock(rank_info(job_id="8"))
    with pytest.raises(StateError, match="finished"):
        later.begin_attempt(rank_info(job_id="8"), 3)
    assert not (run.path / "lock.json").exists()


def test_a_job_number_that_comes_again_follows_no_old_ending(run: RunDirectory, clock: Clock) -> None:
    """A cluster built anew numbers its jobs from 1: what job 7 of the old one left says nothing about job 7 of this one."""
    run.begin_attempt(rank_info(), 0)
    run.claim_ending(rank_info())
    run.write_ending(rank_info(), Ending(1, EndReason.CRASHED, "long ago"))
    run.note_crash(rank_info(1), ValueError("long ago"))
    run.end_attempt(EndReason.CRASHED, 3)
    later = again(run, clock)
    later.begin_attempt(rank_info(), 0)
    assert not later.is_ending_claimed(rank_info())
    assert later.crash_notes(rank_info().attempt_label) == []


def test_what_a_rank_said_before_the_attempt_began_is_kept(run: RunDirectory) -> None:
    """A rank that fails while rank 0 still starts is not forgotten: the label is new."""
    run.note_crash(rank_info(1), ValueError("early"))
    run.begin_attempt(rank_info(), 0)
    assert len(run.crash_notes(rank_info().attempt_label)) == 1


@pytest.mark.parametrize("reason", [EndReason.NODE_FAILURE, EndReason.UNKNOWN])
def test_lost_nodes_are_forgiven_where_crashes_are_not(run: RunDirectory, clock: Clock, reason: EndReason) -> None:
    """With retries=0 a crash is final, but three lost nodes in a row are not; the fourth is."""
    for number in range(4):
        info = rank_info(restart_count=number)
        process = again(run, clock)
        assert process.begin_attempt(info, 0, retries=0) is not None
        assert not process.may_retry(info, retries=0)
        assert process.may_retry(info, retries=0, reason=reason) is (number < 3)
        process.end_attempt(reason, None)
    with pytest.raises(StateError, match="given up"):
        again(run, clock).begin_attempt(rank_info(restart_count=4), 0, retries=0)


def test_a_crash_is_noted_with_the_step_it_came_at(run: RunDirectory) -> None:
    """Whoever ends the attempt need not know the step: the last one noted is it."""
    run.begin_attempt(rank_info(), 10)
    run.note_step(17)
    run.end_attempt(EndReason.CRASHED, None)
    assert (run.attempts()[0].last_step, run.attempts()[0].steps_done) == (17, 7)


def test_a_finished_command_has_lost_nothing(run: RunDirectory, clock: Clock) -> None:
    """An hour of work that is done is no hour lost; and what a program without steps has lost, nobody knows."""
    run.begin_attempt(rank_info(), 0)
    clock.now_s += 3600
    run.end_attempt(EndReason.PREEMPTED, None)
    run.begin_attempt(rank_info(restart_count=1), 0)
    clock.now_s += 3600
    run.end_attempt(EndReason.FINISHED, None)
    assert [attempt.seconds_lost for attempt in run.attempts()] == [None, 0.0]


def test_a_refused_job_hides_no_attempt(run: RunDirectory, clock: Clock) -> None:
    """Job 5 works; job 6, noted behind it, does not keep job 5's retries from counting, nor its end from being found."""
    run.begin_attempt(rank_info(job_id="5"), 0)
    run.note_step(30)
    run.note_commit(20)
    again(run, clock).end_unbegun(rank_info(job_id="6"), Ending(9, EndReason.CRASHED, "refused"))
    assert run.may_retry(rank_info(job_id="5"), retries=1)
    run._lock._beat()
    die(run)
    later = again(run, clock)
    later.begin_attempt(rank_info(job_id="5", restart_count=1), 25)
    five, six, _ = later.attempts()
    assert (five.reason, five.last_step, five.committed_step) == (EndReason.UNKNOWN, 30, 20)
    assert six.message == "refused"
