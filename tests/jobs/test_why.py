"""`muster jobs why`: what Slurm's words mean, said in sentences."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.slurm_records import AccountingRecord, Job, JobPriority, Node, Partition
from jobs.why import Attempt, Scene, explain, moment, span

NOW = datetime(2026, 11, 21, 12, 0, 0, tzinfo=timezone.utc)


def ago(**length: float) -> datetime:
    return NOW - timedelta(**length)


def ahead(**length: float) -> datetime:
    return NOW + timedelta(**length)


NODES = tuple(
    Node(name=f"gpu-{n}", states=frozenset({"IDLE"}), gpus={"a100": 8}, cpus=32, cpus_allocated=0) for n in range(1, 5)
)
PARTITIONS = (
    Partition(name="high", nodes=tuple(node.name for node in NODES), tier=100),
    Partition(name="low", nodes=tuple(node.name for node in NODES), tier=10, max_time=timedelta(hours=48)),
)


def pending(**changes: Any) -> Job:
    values: dict[str, Any] = {
        "id": "12", "name": "train", "user": "alice", "account": "research", "partition": "low", "qos": "normal",
        "state": "PENDING", "reason": "Resources",
        "node_count": 2, "cpus": 64, "tres": {"cpu": "64", "gres/gpu": "16"}, "priority": 100,
        "submit_time": ago(minutes=5), "eligible_time": ago(minutes=5),
        "restarts": 0,
    }  # fmt: skip
    return Job(**{**values, **changes})


def told(job: Job | None, **scene: Any) -> str:
    values: dict[str, Any] = {
        "now": NOW,
        "job": job,
        "jobs": (job,) if job else (),
        "nodes": NODES,
        "partitions": PARTITIONS,
    }
    explanation = explain("12", Scene(**{**values, **scene}))
    return "\n".join([explanation.headline, *explanation.facts, *explanation.attempts, *explanation.next_steps])


def test_a_job_that_waits_for_nodes_says_which_and_who_has_them() -> None:
    """Counts of free, busy and broken nodes, who holds the busy ones and until when, and why the broken one is out."""
    nodes = (
        replace(NODES[0], states=frozenset({"MIXED"}), gpus_allocated={"a100": 8}),
        replace(NODES[1], states=frozenset({"MIXED"}), gpus_allocated={"a100": 8}),
        NODES[2],
        replace(NODES[3], states=frozenset({"IDLE", "DRAIN"}), reason="bad GPU 3"),
    )
    other = Job(
        id="7",
        name="big",
        user="bob",
        partition="high",
        state="RUNNING",
        nodes=("gpu-1", "gpu-2"),
        end_time=ahead(hours=1),
    )
    job = pending()
    text = told(job, nodes=nodes, jobs=(job, other), expected_start=ahead(minutes=30))
    assert "job 12 (train) waits in queue low, for 5 min so far." in text
    assert "It needs 2 nodes with 8 GPUs free each, and not enough of that is free (Resources)." in text
    assert "4, of them 1 free, 2 busy, 1 out of service" in text
    assert "gpu-4 is out of service: IDLE+DRAIN, bad GPU 3." in text
    assert "2 nodes held by job 7 (big) of bob in queue high, its limit ends it" in text
    assert "(in 1 h)" in text
    assert "Slurm expects to start it" in text
    assert "(in 30 min)" in text


def test_a_high_job_knows_what_it_can_push_out() -> None:
    """Jobs of lower tiers on its nodes are named as what can be preempted, and those being preempted as such."""
    busy = tuple(replace(node, states=frozenset({"ALLOCATED"}), gpus_allocated={"a100": 8}) for node in NODES)
    low = Job(id="7", name="l", user="bob", partition="low", state="RUNNING", nodes=("gpu-1",))
    going = replace(low, id="8", nodes=("gpu-2",), preempt_time=ago(seconds=3))
    job = pending(partition="high")
    text = told(job, nodes=busy, jobs=(job, low, going))
    assert "it can be preempted for this one" in text
    assert "it is being preempted" in text


def test_a_job_that_can_never_start_says_so() -> None:
    """More nodes than the queue has with enough GPUs is not a matter of waiting."""
    text = told(pending(node_count=5, tres={"gres/gpu": "40"}))
    assert "Only 4 nodes could ever run it, and it asks for 5: as it is, it will not start." in text
    assert "muster jobs cancel 12" in text


def test_position_counts_priority_and_higher_tiers() -> None:
    """The place among those waiting in its queue, and those of higher tiers over the same nodes, who come first anyway."""
    job = pending(reason="Priority", priority=50)
    others = (
        pending(id="13", priority=70),
        pending(id="14", priority=40),
        pending(id="15", partition="high", priority=1),
    )
    held = pending(id="16", priority=0, reason="JobHeldUser")
    priorities = (JobPriority(job_id="12", factors={"age": 3, "fair_share": 40, "qos": 0}),)
    text = told(job, jobs=(job, *others, held), priorities=priorities)
    assert "It is number 2 of 3 waiting in queue low (priority 50). 1 job of queue high come first anyway." in text
    assert "made of age 3, fair share 40." in text


def test_a_requeued_job_says_why_and_until_when_it_is_held() -> None:
    """BeginTime after a requeue: why its last attempt ended, how long the hold lasts, how to lift it."""
    job = pending(reason="BeginTime", restarts=2, eligible_time=ahead(seconds=25), start_time=ahead(seconds=25))
    attempts = (
        Attempt(
            number=1,
            started=ago(hours=2),
            ended=ago(hours=1),
            outcome="preempted",
            nodes=("gpu-1",),
            detail="steps 0 to 90, nothing lost",
        ),
        Attempt(
            number=2,
            started=ago(hours=1),
            ended=ago(seconds=5),
            outcome="node failure (gpu-2 failed)",
            nodes=("gpu-2",),
        ),
    )
    text = told(job, attempts=attempts)
    assert "sent back to the queue because its last attempt ended: node failure (gpu-2 failed)" in text
    assert "(in 25 s)" in text
    assert "scontrol update jobid=12 StartTime=now" in text
    assert "requeued twice; the next start is attempt 3" in text
    assert "attempt 1: started" in text
    assert "on gpu-1 for 1 h: preempted; steps 0 to 90, nothing lost" in text


def test_a_delayed_job_is_not_called_requeued() -> None:
    """BeginTime of a job that never ran is somebody's --begin."""
    text = told(pending(reason="BeginTime", eligible_time=ahead(hours=1)))
    assert "until at" not in text
    assert "submitted to start later" in text
    assert "requeued" not in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"reason": "Dependency", "dependency": "afterok:7(unfulfilled)"},
            ["waits for afterok:7(unfulfilled)", "(Dependency)"],
        ),
        (
            {"reason": "DependencyNeverSatisfied", "dependency": "afterok:7(failed)"},
            ["can no longer come true", "muster jobs cancel 12"],
        ),
        ({"reason": "JobHeldUser", "priority": 0}, ["held by you or its owner", "scontrol release 12"]),
        ({"reason": "JobHeldAdmin", "priority": 0}, ["held by an administrator"]),
        (
            {"reason": "launch failed requeued held", "state": "REQUEUE_HOLD", "priority": 0},
            ["held by Slurm", "scontrol release 12"],
        ),
        ({"reason": "PartitionTimeLimit", "time_limit": timedelta(hours=72)}, ["asks for 3d", "at most 2d"]),
        ({"reason": "AssocGrpGRES"}, ["Account research is at its limit of GPUs", "(AssocGrpGRES)"]),
        ({"reason": "QOSMaxJobsPerUserLimit"}, ["QOS normal is at its limit of jobs"]),
        ({"reason": "PartitionDown"}, ["starts none at the moment"]),
        ({"reason": "JobArrayTaskLimit"}, ["As many elements", "ArrayTaskThrottle"]),
        ({"reason": "InvalidAccount"}, ["account may not use"]),
        ({"reason": "ReqNodeNotAvail, Reserved for maintenance"}, ["Reserved for maintenance", "show reservation"]),
        ({"reason": "SomethingNew"}, ["Slurm gives the reason SomethingNew"]),
        ({"reason": None}, ["has not looked at it"]),
    ],
)
def test_each_reason_has_a_sentence_and_keeps_slurms_word(changes: dict[str, Any], said: list[str]) -> None:
    """Every reason Slurm gives is explained, with its own word and with what to do where something can be done."""
    text = told(pending(**changes))
    assert all(part in text for part in said), text


@given(st.text(max_size=60))
def test_any_reason_is_answered(reason: str) -> None:
    """A reason of a Slurm yet to come does not break the answer."""
    assert "waits in queue low" in told(pending(reason=reason))


def test_a_running_job_says_where_and_until_when() -> None:
    """Nodes, start, the end by its limit, and which attempt it is."""
    job = pending(
        state="RUNNING", reason=None, nodes=("gpu-1", "gpu-2"), start_time=ago(minutes=90), end_time=ahead(minutes=30),
        time_limit=timedelta(hours=2), restarts=1,
    )  # fmt: skip
    records = (
        AccountingRecord(
            id="12", raw_id="12", state="REQUEUED", exit_code=75, start_time=ago(hours=5), end_time=ago(hours=2)
        ),
        AccountingRecord(id="12", raw_id="12", state="RUNNING", start_time=ago(minutes=90)),
    )
    text = told(job, records=records)
    assert re.search(r"runs on gpu-1, gpu-2 since [\d :-]+ \(1 h 30 min ago\)", text)
    assert "time limit of 2h ends it" in text
    assert (
        "attempt 2: it has been requeued once; the last time because its last attempt saved and asked to be requeued"
        in text
    )


@pytest.mark.parametrize(
    ("state", "changes", "said"),
    [
        ("COMPLETED", {}, ["has finished", "(1 min ago)"]),
        ("FAILED", {"exit_code": 3}, ["failed with exit code 3", "muster jobs logs 12"]),
        ("FAILED", {"exit_code": 75}, ["asks to be requeued; this cluster did not", "goes on where it saved"]),
        ("FAILED", {"exit_code": 0, "exit_signal": 11}, ["ended by signal 11"]),
        ("TIMEOUT", {"time_limit": timedelta(hours=1)}, ["at its time limit of 1h", "USR2"]),
        ("NODE_FAIL", {}, ["a node failed", "submit it again"]),
        ("OUT_OF_MEMORY", {}, ["more memory", "raise memory_gb"]),
        ("PREEMPTED", {}, ["may not be requeued", "--no-requeue"]),
        ("SOMETHING", {}, ["ended in state SOMETHING"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("remembered_by", ["slurmctld", "accounting"])
def test_an_ended_job_says_how_it_ended(
    state: str, changes: dict[str, Any], said: list[str], remembered_by: str
) -> None:
    """The same is said whether slurmctld still remembers the job or only accounting does."""
    job, records = None, ()
    if remembered_by == "slurmctld":
        if state == "SOMETHING":
            return
        job = pending(state=state, reason=None, end_time=ago(minutes=1), nodes=("gpu-1",), **changes)
    else:
        records = (
            AccountingRecord(id="12", raw_id="12", name="train", state=state, end_time=ago(minutes=1), **changes),
        )
    text = told(job, records=records)
    assert text.startswith("job 12 (train) ")
    assert all(part in text for part in said), text


def test_who_cancelled_it_is_said() -> None:
    """Accounting knows who cancelled; that is part of the answer."""
    record = AccountingRecord(id="12", raw_id="12", state="CANCELLED", cancelled_by="1000", end_time=ago(hours=1))
    assert "was cancelled by 1000" in told(None, records=(record,))


def test_an_attempt_that_was_killed_is_not_called_running() -> None:
    """The journal of a cancelled job may lack its last words; accounting has them."""
    record = AccountingRecord(id="12", raw_id="12", state="CANCELLED", reason="BeginTime", end_time=ago(hours=1))
    text = told(None, records=(record,), attempts=(Attempt(number=1, started=ago(hours=2)),))
    assert "was cancelled before it could say why" in text
    assert "running" not in text
    assert "BeginTime" not in text


def test_what_could_not_be_read_is_named() -> None:
    """A controller that answers only in part yields an answer that says what is missing."""
    assert "not known: nodes (no answer)" in told(pending(), nodes=(), unread=("nodes (no answer)",))


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (59, "59 s"),
        (60, "1 min"),
        (185, "3 min 5 s"),
        (3600, "1 h"),
        (7800, "2 h 10 min"),
        (273_600, "3 d 4 h"),
        (-5, "0 s"),
    ],
)
def test_lengths_of_time_are_short(seconds: int, words: str) -> None:
    """Two figures that matter, no more."""
    assert span(timedelta(seconds=seconds)) == words


@given(st.integers(min_value=-(10**7), max_value=10**7))
def test_a_moment_is_given_both_ways(seconds: int) -> None:
    """The clock time and how far away it is, in the right direction."""
    text = moment(NOW + timedelta(seconds=seconds), NOW)
    assert ("(in " in text) == (seconds > 0)
    assert text.startswith("at ")
