"""Why a pending job waits, from what Slurm says of all jobs and partitions: who stands before it, who holds its nodes. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cluster.slurm_records import Job, Partition

_WAITS_FOR_SOMETHING_ELSE = frozenset(
    {"BeginTime", "Dependency", "DependencyNeverSatisfied", "JobHeldAdmin", "JobHeldUser"}
)
"""Reasons that take a job out of the competition for nodes for now."""

_DEPENDENCY = re.compile(r"([a-z]+):(\d+(?:_(?:\d+|\*))?)(?:\+\d+)?(?:\((\w+)\))?")


@dataclass(frozen=True, kw_only=True)
class Dependency:
    """One condition of a job's dependency."""

    kind: str
    """`afterok`, `afterany`, `afternotok`, `after`, `singleton`, ..."""
    job_id: str
    """The job it waits for, `12` or `12_*`; empty for `singleton`."""
    status: str | None = None
    """`unfulfilled`, `failed`, ..., as Slurm prints it."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a pending job stands in the competition for its nodes."""

    position: int
    """1 for the job that Slurm looks at first. Backfill may still start a later one that fits into a gap."""
    ahead: tuple[Job, ...]
    """Pending jobs that Slurm looks at before it and that may take its nodes, first one first."""
    holders: tuple[Job, ...]
    """Jobs that hold nodes of its partitions now, those that end first at the front."""


def standing(job: Job, *, jobs: Iterable[Job], partitions: Sequence[Partition]) -> Standing:
    """Tell who stands before `job` and who holds the nodes that it may run on.

    Slurm takes pending jobs in the order of their partition's tier, then priority, then age. Only jobs that compete count:
    partitions that share a node with its own, no held jobs, none that wait for a time or another job.

    Args:
        job: A pending job.
        jobs: All jobs of the cluster.
        partitions: All its partitions.
    """
    by_name = {partition.name: partition for partition in partitions}
    wanted = _nodes_of(job, by_name)
    rank = _rank(job, by_name)
    others = [other for other in jobs if other.id != job.id]
    ahead = [
        other
        for other in others
        if other.is_pending
        and not other.is_held
        and other.reason not in _WAITS_FOR_SOMETHING_ELSE
        and _rank(other, by_name) < rank
        and not wanted.isdisjoint(_nodes_of(other, by_name))
    ]
    ahead.sort(key=lambda other: _rank(other, by_name))
    holders = [other for other in others if other.is_running and not wanted.isdisjoint(other.nodes)]
    holders.sort(key=lambda other: other.end_time.timestamp() if other.end_time else float("inf"))
    return Standing(position=len(ahead) + 1, ahead=tuple(ahead), holders=tuple(holders))


def parse_dependency(text: str | None) -> tuple[Dependency, ...]:
    """Read `afterok:12(unfulfilled),afterany:13_*(failed)`; parts of any other form are left out."""
    if not text:
        return ()
    found = [
        Dependency(kind=kind, job_id=job_id, status=status or None)
        for kind, job_id, status in _DEPENDENCY.findall(text)
    ]
    if "singleton" in text:
        found.append(Dependency(kind="singleton", job_id=""))
    return tuple(found)


def _nodes_of(job: Job, partitions: Mapping[str, Partition]) -> frozenset[str]:
    """Return the nodes that a pending job may run on, as far as its partitions and its own wishes tell."""
    nodes = {node for name in _partition_names(job) if name in partitions for node in partitions[name].nodes}
    return frozenset(nodes - set(job.excluded_nodes))


def _partition_names(job: Job) -> list[str]:
    return (job.partition or "").split(",")


def _rank(job: Job, partitions: Mapping[str, Partition]) -> tuple[int, int, float, int]:
    """Return a key that sorts jobs in the order in which Slurm considers them."""
    tiers = [partitions[name].tier or 0 for name in _partition_names(job) if name in partitions]
    submitted = job.submit_time.timestamp() if job.submit_time else float("inf")
    return (-max(tiers, default=0), -(job.priority or 0), submitted, int(job.id))
