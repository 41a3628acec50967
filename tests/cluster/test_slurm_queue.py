"""Where a pending job stands among those that want the same nodes."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from cluster.slurm_queue import parse_dependency, standing
from cluster.slurm_records import Job, Partition
from cluster.slurm_text import parse_jobs_text, parse_partitions_text

CAPTURED = Path(__file__).parent.parent / "data" / "slurm" / "22.05.8"
START = datetime(2026, 1, 1, tzinfo=timezone.utc)
PARTITIONS = (
    Partition(name="low", nodes=("a", "b"), tier=10),
    Partition(name="high", nodes=("a", "b"), tier=100),
    Partition(name="other", nodes=("z",), tier=500),
)


def job(number: int, *, partition: str = "low", priority: int = 100, state: str = "PENDING", **fields: Any) -> Job:
    return Job(
        id=str(number),
        partition=partition,
        priority=priority,
        state=state,
        submit_time=START + timedelta(minutes=number),
        **fields,
    )


def test_tier_comes_before_priority_and_priority_before_age() -> None:
    """As Slurm orders them: partition tier, then priority, then the time of submission."""
    mine = job(5, priority=100)
    jobs = [mine, job(1, priority=50), job(2), job(7), job(3, priority=200), job(9, partition="high", priority=1)]
    result = standing(mine, jobs=jobs, partitions=PARTITIONS)
    assert [other.id for other in result.ahead] == ["9", "3", "2"]
    assert result.position == 4


def test_only_jobs_that_compete_count() -> None:
    """Held, delayed and dependent jobs, other nodes, and the job itself do not stand in the way."""
    mine = job(5)
    jobs = [
        mine,
        job(1, priority=0),
        job(2, priority=900, reason="BeginTime"),
        job(3, priority=900, reason="Dependency"),
        job(4, priority=900, partition="other"),
        job(6, priority=900, state="REQUEUE_HOLD"),
        job(7, priority=900, excluded_nodes=("a", "b")),
    ]
    assert standing(mine, jobs=jobs, partitions=PARTITIONS).ahead == ()


def test_holders_are_jobs_on_its_nodes_soonest_end_first() -> None:
    """Also those of other partitions over the same nodes; not those on nodes it has excluded."""
    mine = job(9, excluded_nodes=("b",))
    jobs = [
        job(1, state="RUNNING", nodes=("a",), end_time=START + timedelta(hours=2)),
        job(2, state="COMPLETING", nodes=("a", "b"), partition="high", end_time=START + timedelta(hours=1)),
        job(3, state="RUNNING", nodes=("b",)),
        job(4, state="RUNNING", nodes=("a",)),
        job(5, state="COMPLETED", nodes=("a",)),
    ]
    assert [other.id for other in standing(mine, jobs=jobs, partitions=PARTITIONS).holders] == ["2", "1", "4"]


def test_the_captured_cluster_explains_itself() -> None:
    """The urgent job is first and waits for the stubborn one; the sweep stands behind the urgent one."""
    jobs = {found.id: found for found in parse_jobs_text((CAPTURED / "scontrol_jobs.txt").read_text()).items}
    partitions = parse_partitions_text((CAPTURED / "scontrol_partitions.txt").read_text()).items
    urgent = standing(jobs["34"], jobs=jobs.values(), partitions=partitions)
    assert (urgent.position, [other.id for other in urgent.holders]) == (1, ["31"])
    assert "34" in [other.id for other in standing(jobs["32"], jobs=jobs.values(), partitions=partitions).ahead]


def test_dependencies_are_read_in_every_form() -> None:
    """Kinds, arrays, delays, several at once, singleton; nothing of what is no dependency."""
    found = parse_dependency(
        "afterok:12(unfulfilled),afterany:13_*(failed)?after:14+5(unfulfilled),singleton(unfulfilled)"
    )
    assert [(one.kind, one.job_id, one.status) for one in found] == [
        ("afterok", "12", "unfulfilled"),
        ("afterany", "13_*", "failed"),
        ("after", "14", "unfulfilled"),
        ("singleton", "", None),
    ]
    assert parse_dependency(None) == parse_dependency("(null)") == ()
