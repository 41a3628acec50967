"""What a queue means for a job: partition, account, time, share of a node, and what the cluster could never run.

Everything here is a pure function of the job and the ClusterSpec, so that mistakes show before Slurm is asked: Slurm accepts a
job that needs more nodes than there are, and lets it wait for ever.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from cluster.durations import format_duration
from cluster.errors import InputError
from cluster.findings import Finding, Level
from cluster.hostlist import expand
from cluster.settings import ClusterSpec, Pool, Project, Queue, load_spec
from jobs.jobspec import JobSpec

CLUSTER_FILE = Path("/etc/muster/cluster.yaml")
"""Where a cluster's own nodes keep its description."""

DEFAULT_WARNING = timedelta(minutes=2)
_SCHEDULABLE_MEMORY = (
    0.95  # ParallelCluster's SchedulableMemory: Slurm may give out this share of what the machine is sold with
)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What the batch script says about where, how long and with how much a job runs. None leaves it to Slurm."""

    partition: str | None = None
    account: str | None = None
    time_limit: timedelta | None = None
    """Asked for in the script."""
    expected_limit: timedelta | None = None
    """What will be in force, with the queue's default filled in; None where there is no limit or it is not known."""
    warning: timedelta | None = None
    """How long before the limit the job gets USR2; None for no signal."""
    cpus_per_task: int | None = None
    memory_gb: float | None = None
    """GiB on each node; 0 is all of it."""
    exclude: tuple[str, ...] = ()


def place(spec: JobSpec, cluster: ClusterSpec | None, *, user: str, avoided_nodes: Sequence[str] = ()) -> Placement:
    """Work out what to ask Slurm for. The job must have passed `check_job`."""
    exclude = tuple(dict.fromkeys([*expand(",".join(spec.exclude)), *avoided_nodes]))
    if cluster is None:
        return Placement(
            partition=spec.queue,
            account=spec.project,
            time_limit=spec.time,
            expected_limit=spec.time,
            warning=_warning(spec, spec.time),
            cpus_per_task=spec.cpus_per_task,
            memory_gb=spec.memory_gb,
            exclude=exclude,
        )
    queue = cluster.queue(spec.queue) if spec.queue is not None else cluster.default_queue()
    limit = spec.time or queue.default_time or queue.time_limit
    cpus, memory_gb = _share_of_node(spec, smallest_fitting_pool(spec, cluster, queue))
    return Placement(
        partition=queue.name,
        account=choose_account(cluster, queue.name, project=spec.project, user=user),
        time_limit=spec.time,
        expected_limit=limit,
        warning=_warning(spec, limit),
        cpus_per_task=cpus,
        memory_gb=memory_gb,
        exclude=exclude,
    )


def choose_account(cluster: ClusterSpec, queue: str | None, *, project: str | None = None, user: str) -> str | None:
    """Return the Slurm account for a job: the project named, or the user's only one that the queue takes.

    None leaves it to Slurm. A project without a list of users is everybody's.
    """
    if not cluster.accounting.enabled:
        return None
    if project is not None:
        return project
    allowed = _projects_of(cluster, queue)
    own = [candidate for candidate in allowed if user in candidate.users]
    open_to_all = [candidate for candidate in allowed if not candidate.users]
    fitting = own or open_to_all
    if not fitting and cluster.target == "local":  # whoever starts a local cluster is added to all of its projects
        fitting = allowed
    return fitting[0].name if len(fitting) == 1 else None


def _projects_of(cluster: ClusterSpec, queue: str | None) -> list[Project]:
    names = next((candidate.projects for candidate in cluster.queues if candidate.name == queue), ())
    return [project for project in cluster.projects if not names or project.name in names]


def _warning(spec: JobSpec, limit: timedelta | None) -> timedelta | None:
    """Return how long before the limit to send USR2. Slurm may be a minute early, so short jobs get a short warning."""
    if spec.warning is not None:
        return spec.warning
    if spec.kind == "command":
        return None
    return DEFAULT_WARNING if limit is None else min(DEFAULT_WARNING, limit / 5)


def smallest_fitting_pool(spec: JobSpec, cluster: ClusterSpec, queue: Queue) -> Pool:
    """Return the least of the queue's pools whose nodes are large enough for the job, or its first one if none is."""
    pools = [cluster.pool(name) for name in queue.pools]
    fitting = [pool for pool in pools if _fits(spec, pool)]
    return min(fitting, key=lambda pool: (pool.gpus_per_node, pool.cpus_per_node), default=pools[0])


def _fits(spec: JobSpec, pool: Pool) -> bool:
    return (
        spec.gpus <= pool.gpus_per_node
        and (spec.cpus_per_task or 1) * spec.tasks <= pool.cpus_per_node
        and (spec.memory_gb or 0) <= pool.memory_gb_per_node
    )


def _share_of_node(spec: JobSpec, pool: Pool) -> tuple[int | None, float]:
    """Return CPUs for each task and GiB for each node: what goes with the job's share of the node's GPUs, unless it says.

    Slurm itself would give one CPU, and all of the node's memory, to a job that asks for neither: its GPUs would starve, and
    the other GPUs of the node could not be used by anybody.
    """
    share = spec.gpus / pool.gpus_per_node if pool.gpus_per_node else 0.0
    cpus = spec.cpus_per_task
    if cpus is None and spec.gpus:
        cpus = max(1, math.floor(pool.cpus_per_node * share) // spec.tasks)
    if spec.memory_gb is not None:
        return cpus, spec.memory_gb
    share = max(share, (cpus or 1) * spec.tasks / pool.cpus_per_node)
    if share >= 1:
        return cpus, 0.0
    return cpus, max(0.25, math.floor(pool.memory_gb_per_node * _SCHEDULABLE_MEMORY * share * 4) / 4)


def check_job(spec: JobSpec, cluster: ClusterSpec, *, user: str, avoided_nodes: Sequence[str] = ()) -> list[Finding]:
    """Return everything about the job that this cluster cannot do, or that somebody will regret."""
    findings = [*_check_project(spec, cluster, user)]
    names = [queue.name for queue in cluster.queues]
    if spec.queue is not None and spec.queue not in names:
        remedy = nearest(spec.queue, names, "the queues are")
        return [
            *findings,
            _error("unknown-queue", "queue", spec.queue, f"cluster {cluster.name} has no such queue", remedy),
        ]
    queue = cluster.queue(spec.queue) if spec.queue is not None else cluster.default_queue()
    findings += _check_size(spec, cluster, queue, avoided_nodes)
    if spec.time is not None and queue.time_limit is not None and spec.time > queue.time_limit:
        rule = f"queue {queue.name} runs jobs for at most {format_duration(queue.time_limit)}"
        remedy = "ask for less: a trainer that nears its limit saves and is requeued"
        findings.append(_error("time-above-limit", "time", format_duration(spec.time), rule, remedy))
    allowed = queue.projects
    if spec.project is not None and allowed and spec.project not in allowed:
        others = [other.name for other in cluster.queues if not other.projects or spec.project in other.projects]
        rule = f"queue {queue.name} is for {_and(allowed)}"
        remedy = (
            f"use queue {' or '.join(others)}" if others else "ask the cluster's admin to add the project to a queue"
        )
        findings.append(_error("project-not-in-queue", "project", spec.project, rule, remedy))
    return findings


def _check_project(spec: JobSpec, cluster: ClusterSpec, user: str) -> Iterable[Finding]:
    if spec.project is None:
        return
    if not cluster.accounting.enabled:
        rule = f"cluster {cluster.name} keeps no accounts"
        yield _error("no-accounting", "project", spec.project, rule, "leave project out")
        return
    known = {project.name: project for project in cluster.projects}
    if spec.project not in known:
        remedy = nearest(spec.project, list(known), "the projects are")
        yield _error("unknown-project", "project", spec.project, f"cluster {cluster.name} has no such project", remedy)
        return
    project = known[spec.project]
    if project.users and user not in project.users and cluster.target != "local":
        rule = f"{user} is not listed among its users, so Slurm will probably refuse"
        own = [other.name for other in cluster.projects if user in other.users or not other.users]
        remedy = f"yours are: {', '.join(own)}" if own else "ask the cluster's admin to be added"
        yield Finding(
            id="not-in-project", level=Level.WARNING, field="project", value=project.name, rule=rule, remedy=remedy
        )
    gpus = spec.nodes * spec.gpus
    if project.max_gpus is not None and gpus > project.max_gpus:
        rule = f"{project.name} may use {project.max_gpus} GPUs at one time and this job needs {gpus}: it would wait for ever"
        yield _error("project-gpu-limit", "nodes * gpus_per_node", f"{spec.nodes} * {spec.gpus}", rule, "ask for fewer")


def _check_size(spec: JobSpec, cluster: ClusterSpec, queue: Queue, avoided: Sequence[str]) -> Iterable[Finding]:
    pools = [cluster.pool(name) for name in queue.pools]
    shape = ", ".join(
        f"{pool.nodes} nodes of pool {pool.name} ({pool.gpus_per_node} GPUs, {pool.cpus_per_node} CPUs, "
        f"{pool.memory_gb_per_node} GiB each)"
        for pool in pools
    )
    findings = []
    most_gpus = max(pool.gpus_per_node for pool in pools)
    if spec.gpus > most_gpus:
        rule = f"queue {queue.name} has {shape}"
        remedy = f"at most {most_gpus}; spread the job over more nodes"
        if spec.gpus_per_node is None:
            remedy = "write gpus_per_node: 0 to train without GPUs"
        findings.append(_error("too-many-gpus", "gpus_per_node", str(spec.gpus), rule, remedy))
    cpus = (spec.cpus_per_task or 1) * spec.tasks
    most_cpus = max(pool.cpus_per_node for pool in pools)
    if cpus > most_cpus:
        value = f"{spec.cpus_per_task or 1} * {spec.tasks}"
        findings.append(
            _error(
                "too-many-cpus",
                "cpus_per_task * tasks_per_node",
                value,
                f"queue {queue.name} has {shape}",
                f"at most {most_cpus}",
            )
        )
    most_gb = max(pool.memory_gb_per_node for pool in pools)
    if (spec.memory_gb or 0) > most_gb:
        findings.append(
            _error(
                "too-much-memory",
                "memory_gb",
                f"{spec.memory_gb:g}",
                f"queue {queue.name} has {shape}",
                f"at most {most_gb}",
            )
        )
    if findings:
        return findings
    names = [name for pool in pools if _fits(spec, pool) for name in pool.node_names()]
    if spec.nodes > len(names):
        rule = f"queue {queue.name} has {shape}"
        return [_error("too-many-nodes", "nodes", str(spec.nodes), rule, f"at most {len(names)}, or another queue")]
    excluded = {*expand(",".join(spec.exclude)), *avoided}
    left = [name for name in names if name not in excluded]
    unknown = sorted(set(expand(",".join(spec.exclude))) - {name for name, _ in cluster.nodes()})
    if unknown:
        # sbatch refuses the whole job for one unknown name
        known = [name for name, _ in cluster.nodes()]
        rule = f"cluster {cluster.name} has no such node"
        findings.append(
            _error("unknown-node", "exclude", ", ".join(unknown), rule, nearest(unknown[0], known, "nodes are"))
        )
    if spec.nodes > len(left):
        rule = f"with {len(names) - len(left)} nodes excluded, queue {queue.name} has only {len(left)} left for it"
        findings.append(_error("too-few-nodes-left", "nodes", str(spec.nodes), rule, "exclude fewer, or ask for fewer"))
    return findings


def nearest(value: str, names: Sequence[str], otherwise: str) -> str:
    """Say which of `names` may have been meant, or list them (the first ten)."""
    close = difflib.get_close_matches(value, names, n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(close)}?"
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    return f"{otherwise}: {shown or 'none'}"


def find_cluster(environment: Mapping[str, str]) -> tuple[ClusterSpec | None, str]:
    """Read the description of the cluster that jobs go to: MUSTER_CLUSTER, or else /etc/muster/cluster.yaml.

    Returns:
        The description with the file it came from; or None with the reason, in words.

    Raises:
        InputError: MUSTER_CLUSTER names a file that cannot be read, or the file is wrong.
    """
    named = environment.get("MUSTER_CLUSTER")
    path = Path(named).expanduser() if named else CLUSTER_FILE
    if not named and not path.exists():
        return None, f"no description of the cluster: MUSTER_CLUSTER is not set and {path} does not exist"
    try:
        return load_spec(path), str(path)
    except InputError as error:
        if named:
            raise type(error)(f"MUSTER_CLUSTER={named}: {error}") from error
        raise


def _error(identifier: str, field: str, value: str, rule: str, remedy: str) -> Finding:
    return Finding(id=identifier, level=Level.ERROR, field=field, value=value, rule=rule, remedy=remedy)


def _and(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
