"""ClusterSpec: the one description from which everything else is derived.

Loading it does no network. The tree is frozen; unknown keys are refused with the nearest names (`cluster.yamlfile`). Rules that
concern one field or one section stand here; rules that weigh sections against each other stand in `cluster.checks`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from cluster.durations import Duration
from cluster.yamlfile import read_yaml, validate

_NAME = re.compile(r"[a-z][a-z0-9]*(?:[-_][a-z0-9]+)*")
_RESERVED_BY_PARALLELCLUSTER = ("-st-", "-dy-")


def _check_name(value: str) -> str:
    if len(value) > 30 or not _NAME.fullmatch(value):
        raise ValueError(
            "names are at most 30 lower-case letters, digits and single - or _, starting with a letter; rename it"
        )
    if any(part in f"{value}-" for part in _RESERVED_BY_PARALLELCLUSTER):
        raise ValueError("-st- and -dy- belong to ParallelCluster's own node names; rename it")
    return value


def _as_switch(value: object) -> object:
    """Accept YAML's booleans where a word is meant: another tool may have turned `off` into `false`."""
    return (
        {True: "on", False: "off"}[value]
        if isinstance(value, bool)
        else value.lower()
        if isinstance(value, str)
        else value
    )


Name = Annotated[str, AfterValidator(_check_name)]
"""A name that is safe in host names, Slurm, ParallelCluster and AWS tags alike."""

Preemption = Annotated[Literal["off", "requeue", "cancel"], BeforeValidator(_as_switch)]
"""What happens to a running job of a queue when a queue of a higher tier needs its nodes."""


class Section(BaseModel):
    """Base of every part of the description."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


class Pool(Section):
    """Nodes of one kind of hardware."""

    name: Name
    """Also the stem of its nodes' names: pool `gpu` has nodes `gpu-1`, `gpu-2`, ..."""
    nodes: int = Field(ge=1, le=10_000)
    """How many nodes."""
    instance_type: str | None = None
    """EC2 instance type, such as `p4d.24xlarge`. For `target: local` it is only a label."""
    gpus_per_node: int = Field(default=8, ge=0, le=16)
    """GPUs of one node; simulated ones for `target: local`."""
    gpu_model: Name = "a100"
    """Type name of the GPUs in Slurm's GRES: jobs may ask for `--gres=gpu:a100:8`."""
    cpus_per_node: int = Field(default=16, ge=1, le=1024)
    """Logical CPUs of one node. For `target: local` this is what Slurm believes, not what the machine has."""
    memory_gb_per_node: int = Field(default=64, ge=1, le=32_768)
    """Memory of one node in GiB that jobs may ask for."""

    def node_names(self) -> list[str]:
        """Return the names of the pool's nodes, in order."""
        return [f"{self.name}-{number}" for number in range(1, self.nodes + 1)]


class Queue(Section):
    """A Slurm partition over one or more pools. Several queues may share the same nodes."""

    name: Name
    pools: tuple[Name, ...] = Field(min_length=1)
    """Pools whose nodes this queue may use."""
    tier: int = Field(default=10, ge=1, le=65_533)
    """PriorityTier: jobs of a higher tier start first and preempt those of lower ones on shared nodes."""
    preemption: Preemption = "off"
    """What happens to this queue's jobs when a higher tier needs the nodes: `off` (never), `requeue` or `cancel`."""
    grace: Duration = timedelta(0)
    """How long a preempted job may go on before it is killed. With 0 it has `scheduling.kill_wait` to save."""
    minimum_run: Duration = timedelta(0)
    """How long a job of this queue runs before it may be preempted (PreemptExemptTime of its QOS)."""
    time_limit: Duration | None = None
    """Longest run; none by default. A trainer saves and is requeued when it nears the limit."""
    default_time: Duration | None = None
    """Run time of jobs that ask for none; `time_limit` by default."""
    default: bool = False
    """Whether jobs that name no queue come here. At most one queue."""
    projects: tuple[Name, ...] = ()
    """Projects whose users may submit here; all by default."""


class Project(Section):
    """Who works together: a Slurm account with its users, its share and its limits."""

    name: Name
    description: str = ""
    users: tuple[str, ...] = ()
    """Login names. The one who starts a local cluster is added to every project of it."""
    share: int = Field(default=1, ge=1, le=100_000)
    """Weight in fair-share, relative to the other projects."""
    max_gpus: int | None = Field(default=None, ge=0)
    """Most GPUs in use at one time; no limit by default."""
    budget_gpu_hours: float | None = Field(default=None, ge=0)
    """GPU-hours granted; no limit by default. Recorded only: nothing enforces it yet, and `muster cluster check` says so."""


class PriorityWeights(Section):
    """Slurm's multifactor weights. All zero is Slurm's default, and then priority means nothing."""

    age: int = Field(default=1_000, ge=0)
    fair_share: int = Field(default=10_000, ge=0)
    job_size: int = Field(default=1_000, ge=0)
    queue: int = Field(default=20_000, ge=0)
    quality_of_service: int = Field(default=20_000, ge=0)


class Scheduling(Section):
    """How the scheduler treats jobs, the same in production and on this machine."""

    requeue_exit_code: Literal[75] = 75
    """Exit code with which a trainer that has saved asks to be requeued (RequeueExit). It is EX_TEMPFAIL, and fixed: trainers
    and batch scripts carry it too."""
    kill_wait: Duration = timedelta(seconds=60)
    """Time between SIGTERM and SIGKILL (KillWait); cluster-wide. It is all that a job with no grace has to save."""
    requeue_hold: Duration = timedelta(seconds=30)
    """How long Slurm holds a requeued job (cred_expire, 120 s by default). Too short for large launches: a launch that
    takes longer than this is refused by the nodes."""
    scheduler_interval: Duration = timedelta(seconds=30)
    """How often the main scheduler looks at the whole queue (sched_interval)."""
    backfill_interval: Duration = timedelta(seconds=30)
    """How often the backfill scheduler does (bf_interval)."""
    user_signal_on_preemption: bool = False
    """Whether preemption sends the job's own `--signal` instead of SIGTERM (preempt_send_user_signal)."""
    node_timeout: Duration = timedelta(seconds=180)
    """How long a silent slurmd is waited for before its node is down and its jobs are requeued (SlurmdTimeout)."""
    prioritise: PriorityWeights = PriorityWeights()


class Storage(Section):
    """Where data lives, as seen from every node."""

    home: Path = Path("/home")
    """Home directories."""
    shared: Path = Path("/fsx")
    """The parallel file system: runs, checkpoints, data sets."""
    scratch: Path = Path("/scratch")
    """Each node's own fast disk. What is there does not survive the node."""
    bucket: str | None = Field(default=None, pattern=r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/.*)?$")
    """S3 bucket behind the parallel file system, as `s3://name/prefix`."""


class Health(Section):
    """What automation may do to nodes."""

    mode: Annotated[Literal["off", "shadow", "act"], BeforeValidator(_as_switch)] = "shadow"
    """`off`, `shadow` (records what it would have done) or `act`."""
    max_share_out: float = Field(default=0.05, gt=0, le=1)
    """Largest share of the cluster's nodes that automation may take out in one `window`; never below one node."""
    window: Duration = timedelta(minutes=10)
    """See `max_share_out`."""


class Monitoring(Section):
    """Where metrics are served and how long they are kept."""

    interval: Duration = timedelta(seconds=30)
    """How often Prometheus scrapes."""
    retention: Duration = timedelta(days=30)
    """How long Prometheus keeps samples."""


class Accounting(Section):
    """Slurm's accounting database."""

    enabled: bool = True
    """Without it there are no projects, no limits and no `sacct`."""


class ClusterSpec(Section):
    """A whole cluster."""

    name: Name
    """Also Slurm's ClusterName."""
    target: Literal["local", "aws"] = "local"
    """`local`: a cluster on this machine. `aws`: ParallelCluster."""
    pools: tuple[Pool, ...] = Field(min_length=1)
    queues: tuple[Queue, ...] = Field(min_length=1)
    projects: tuple[Project, ...] = ()
    scheduling: Scheduling = Scheduling()
    storage: Storage = Storage()
    accounting: Accounting = Accounting()
    health: Health = Health()
    monitoring: Monitoring = Monitoring()

    @model_validator(mode="after")
    def _names_are_unique_and_known(self) -> ClusterSpec:
        for what, names in (
            ("pool", [p.name for p in self.pools]),
            ("queue", [q.name for q in self.queues]),
            ("project", [p.name for p in self.projects]),
        ):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{what} {', '.join(twice)} is described twice; each name may stand once")
        pools = {pool.name for pool in self.pools}
        projects = {project.name for project in self.projects}
        for queue in self.queues:
            unknown = [name for name in queue.pools if name not in pools]
            if unknown:
                raise ValueError(
                    f"queue {queue.name} names pool {', '.join(unknown)}; the pools are: {', '.join(sorted(pools))}"
                )
            unknown = [name for name in queue.projects if name not in projects]
            if unknown:
                known = ", ".join(sorted(projects)) or "none"
                raise ValueError(f"queue {queue.name} names project {', '.join(unknown)}; the projects are: {known}")
        defaults = [queue.name for queue in self.queues if queue.default]
        if len(defaults) > 1:
            raise ValueError(f"queues {' and '.join(defaults)} are both the default; set default on one of them")
        return self

    def pool(self, name: str) -> Pool:
        """Return the pool called `name`; KeyError if there is none."""
        return {pool.name: pool for pool in self.pools}[name]

    def queue(self, name: str) -> Queue:
        """Return the queue called `name`; KeyError if there is none."""
        return {queue.name: queue for queue in self.queues}[name]

    def default_queue(self) -> Queue:
        """Return the queue marked `default`, or else the first one."""
        return next((queue for queue in self.queues if queue.default), self.queues[0])

    def nodes(self) -> Iterator[tuple[str, Pool]]:
        """Yield every node's name with its pool."""
        for pool in self.pools:
            for name in pool.node_names():
                yield name, pool


def load_spec(path: Path) -> ClusterSpec:
    """Read a cluster description.

    Raises:
        SpecError: It is wrong; the message lists every mistake with its line.
        InputError: It cannot be read or is not YAML.
    """
    return validate(ClusterSpec, read_yaml(path))
