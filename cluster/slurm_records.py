"""What Slurm says about its nodes, partitions and jobs, in one form whichever version and format it came from.

A field that Slurm did not print, or printed in a form that could not be read, is None (or empty for collections): unknown,
never a guess. Times are aware and in UTC. Limits that Slurm calls UNLIMITED are `UNLIMITED`; None stays reserved for "unknown".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Generic, TypeVar

RecordT = TypeVar("RecordT")

UNLIMITED = timedelta.max
"""A time limit that Slurm prints as UNLIMITED or INFINITE. Compare with `==`: it is larger than any real limit."""

ENDED_STATES = frozenset(
    {
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
        "TIMEOUT",
    }
)
"""Base states that a job does not leave without a requeue (job_states enum of slurm.h)."""

_NODE_UNUSABLE = frozenset(
    {
        "DOWN",
        "DRAIN",
        "ERROR",
        "FAIL",
        "FUTURE",
        "INVALID_REG",
        "NOT_RESPONDING",
        "POWERING_DOWN",
        "POWER_DRAIN",
        "REBOOT_ISSUED",
        "UNKNOWN",
    }
)
_NODE_BUSY = frozenset({"ALLOCATED", "MIXED", "COMPLETING"})


@dataclass(frozen=True)
class Parsed(Generic[RecordT]):
    """What a parser could read, and what it could not."""

    items: tuple[RecordT, ...]
    problems: tuple[str, ...] = ()
    """One sentence for each thing that was there and could not be read; the records around it are still in `items`."""


@dataclass(frozen=True, kw_only=True)
class SlurmVersion:
    """A Slurm release, such as 22.05.8."""

    major: int
    minor: int
    patch: int = 0
    suffix: str = ""
    """What follows the numbers, such as `-0rc1`."""

    @property
    def release(self) -> tuple[int, int]:
        """The pair that decides which options exist: (22, 5) for 22.05.8."""
        return (self.major, self.minor)

    def __str__(self) -> str:
        return f"{self.major}.{self.minor:02d}.{self.patch}{self.suffix}"


@dataclass(frozen=True, kw_only=True)
class ControllerStatus:
    """Whether one slurmctld answers."""

    name: str
    role: str
    """`primary` or `backup`, with a number where there are several backups."""
    is_up: bool


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node as slurmctld sees it."""

    name: str
    states: frozenset[str]
    """Base state and flags, in Slurm's long words: {"IDLE", "DRAIN"}, {"MIXED"}, {"DOWN", "NOT_RESPONDING"}."""
    address: str | None = None
    host_name: str | None = None
    reason: str | None = None
    reason_user: str | None = None
    reason_time: datetime | None = None
    partitions: tuple[str, ...] = ()
    cpus: int | None = None
    cpus_allocated: int | None = None
    cpu_load: float | None = None
    memory_mb: int | None = None
    memory_allocated_mb: int | None = None
    memory_free_mb: int | None = None
    """What the node's operating system reports as free; says nothing about what jobs asked for."""
    gpus: Mapping[str, int] = field(default_factory=dict)
    """Configured GPUs by GRES type: {"a100": 8}; the key is "" for GPUs without a type."""
    gpus_allocated: Mapping[str, int] = field(default_factory=dict)
    """GPUs held by jobs, by GRES type."""
    features: tuple[str, ...] = ()
    active_features: tuple[str, ...] = ()
    boot_time: datetime | None = None
    slurmd_start_time: datetime | None = None
    last_busy_time: datetime | None = None
    slurmd_version: str | None = None
    comment: str | None = None
    extra: str | None = None
    """Free text that admins and tools may set (`scontrol update ... Extra=`)."""
    instance_id: str | None = None
    """The cloud's name of the machine, where slurmd was told (Slurm >= 23.02)."""
    instance_type: str | None = None

    @property
    def gpu_count(self) -> int:
        """Number of GPUs configured, of any type."""
        return sum(self.gpus.values())

    @property
    def gpu_allocated_count(self) -> int:
        """Number of GPUs held by jobs, of any type."""
        return sum(self.gpus_allocated.values())

    @property
    def is_draining(self) -> bool:
        """Whether it takes no new jobs because somebody drained it; jobs may still run on it."""
        return "DRAIN" in self.states

    @property
    def is_busy(self) -> bool:
        """Whether a job runs, or is ending, on it."""
        return bool(self.states & _NODE_BUSY)

    @property
    def is_usable(self) -> bool:
        """Whether Slurm may start a job on it when it has room. A node of unknown state is not usable."""
        return bool(self.states) and not self.states & _NODE_UNUSABLE

    @property
    def state_text(self) -> str:
        """The state as `scontrol` writes it: base state first, flags after it: `IDLE+DRAIN`."""
        base = sorted(self.states & NODE_BASE_STATES)
        return "+".join([*base, *sorted(self.states - NODE_BASE_STATES)])


NODE_BASE_STATES = frozenset({"ALLOCATED", "DOWN", "ERROR", "FUTURE", "IDLE", "MIXED", "UNKNOWN"})
"""The states of which a node has exactly one; everything else is a flag (node_states enum of slurm.h)."""


@dataclass(frozen=True, kw_only=True)
class Partition:
    """A partition (a queue, to its users)."""

    name: str
    nodes: tuple[str, ...] = ()
    state: str | None = None
    """`UP`, `DOWN`, `DRAIN` or `INACTIVE`."""
    tier: int | None = None
    """PriorityTier: higher tiers are scheduled first and preempt lower ones."""
    job_factor: int | None = None
    """PriorityJobFactor: what the partition adds to a job's priority."""
    preempt_mode: str | None = None
    """`OFF`, `REQUEUE`, `CANCEL`, `SUSPEND`, or a combination as Slurm prints it."""
    grace_time: timedelta | None = None
    max_time: timedelta | None = None
    default_time: timedelta | None = None
    max_nodes: int | None = None
    """Most nodes of one job; None where there is no limit or it is not known."""
    is_default: bool | None = None
    allow_accounts: tuple[str, ...] = ()
    """Accounts that may use it; empty where all may."""
    allow_qos: tuple[str, ...] = ()
    allow_groups: tuple[str, ...] = ()
    qos: str | None = None
    total_cpus: int | None = None
    total_nodes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job in slurmctld's memory: pending, running, or ended less than MinJobAge ago."""

    id: str
    """Slurm's raw number, unique also for each element of an array."""
    name: str | None = None
    user: str | None = None
    user_id: int | None = None
    account: str | None = None
    partition: str | None = None
    """One partition, or several with commas while it is pending and was offered several."""
    qos: str | None = None
    state: str = "UNKNOWN"
    """One word: the base state, or the flag that hides it in what Slurm prints (COMPLETING, CONFIGURING, REQUEUE_HOLD, ...)."""
    flags: frozenset[str] = frozenset()
    """State flags beside the base state, where this version prints both (Slurm >= 24.05)."""
    reason: str | None = None
    """Why it waits or ended: `Resources`, `Priority`, `BeginTime`, `Dependency`, `NodeDown`, ...; None where there is none."""
    reason_detail: str | None = None
    """Slurm's longer text for the reason (state_desc), where it has one."""
    nodes: tuple[str, ...] = ()
    """Nodes it runs on, expanded."""
    batch_host: str | None = None
    required_nodes: tuple[str, ...] = ()
    excluded_nodes: tuple[str, ...] = ()
    planned_nodes: tuple[str, ...] = ()
    """Nodes the backfill scheduler means to give it."""
    node_count: int | None = None
    cpus: int | None = None
    array_job_id: str | None = None
    array_task: str | None = None
    """Index in its array: `3`, or `4-9%2` for the part of an array that has not been split into jobs yet."""
    het_job_id: str | None = None
    restarts: int | None = None
    may_requeue: bool | None = None
    submit_time: datetime | None = None
    eligible_time: datetime | None = None
    start_time: datetime | None = None
    """When it started; for a pending job when it may (its expected or earliest start), None where not known."""
    end_time: datetime | None = None
    """When it ended; for a running job when its time limit ends it."""
    suspend_time: datetime | None = None
    preempt_time: datetime | None = None
    """When Slurm chose it for preemption. Set during its grace time too, while it still runs."""
    preempt_eligible_time: datetime | None = None
    time_limit: timedelta | None = None
    tres: Mapping[str, str] = field(default_factory=dict)
    """Requested (pending) or allocated (running) trackable resources: {"cpu": "4", "mem": "16G", "gres/gpu": "8"}."""
    tres_per_node: str | None = None
    """As asked for: `gres/gpu:a100:8`."""
    gpus_by_node: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Indices of the GPUs it holds on each node, where Slurm printed them (`scontrol -d`)."""
    dependency: str | None = None
    """What it waits for, as Slurm prints it: `afterok:12(unfulfilled)`."""
    exit_code: int | None = None
    """None while it has not ended. A requeued job that waits still has the code of its last attempt, where that was not 0."""
    exit_signal: int | None = None
    comment: str | None = None
    admin_comment: str | None = None
    work_dir: str | None = None
    stdout: str | None = None
    stderr: str | None = None
    command: str | None = None
    """Path of the batch script (and its arguments) as given to sbatch."""
    priority: int | None = None
    """0 means held."""
    nice: int | None = None
    constraint: str | None = None

    @property
    def display_id(self) -> str:
        """The id as Slurm's commands take it: `12`, `12_3` for an element of an array, `12_[4-9%2]` for the rest of one."""
        if self.array_job_id is None or self.array_task is None:
            return self.id
        task = self.array_task if self.array_task.isdigit() else f"[{self.array_task}]"
        return f"{self.array_job_id}_{task}"

    @property
    def is_pending(self) -> bool:
        """Whether it waits to start (held, delayed and requeued jobs too)."""
        return self.state in {
            "PENDING",
            "REQUEUED",
            "REQUEUE_HOLD",
            "REQUEUE_FED",
            "SPECIAL_EXIT",
            "RESV_DEL_HOLD",
        }

    @property
    def is_running(self) -> bool:
        """Whether it holds nodes: running, being set up, or still ending."""
        return self.state in {
            "RUNNING",
            "CONFIGURING",
            "COMPLETING",
            "SIGNALING",
            "STAGE_OUT",
            "STOPPED",
            "SUSPENDED",
        }

    @property
    def is_ended(self) -> bool:
        """Whether it has come to its end and holds nothing."""
        return self.state in ENDED_STATES

    @property
    def is_held(self) -> bool:
        """Whether it waits for somebody to release it."""
        return self.is_pending and (
            self.priority == 0
            or self.state in {"REQUEUE_HOLD", "SPECIAL_EXIT"}
            or (self.reason or "").startswith("JobHeld")
        )

    @property
    def gpu_count(self) -> int | None:
        """GPUs asked for (pending) or held (running) on all nodes together; None where Slurm does not say."""
        text = self.tres.get("gres/gpu")
        return int(text) if text is not None and text.isdecimal() else (0 if self.tres else None)


@dataclass(frozen=True, kw_only=True)
class AccountingRecord:
    """One attempt of a job in slurmdbd, or one of its steps. A requeued job has one record for each attempt."""

    id: str
    """`12`, `12_3`, or with a step: `12.batch`, `12.0`."""
    raw_id: str
    """The same with the raw job number, also for elements of arrays."""
    name: str | None = None
    user: str | None = None
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    state: str = "UNKNOWN"
    """One word; REQUEUED for an attempt that was sent back to the queue (also after preemption and node failure)."""
    cancelled_by: str | None = None
    """The user (id) after `CANCELLED by`."""
    reason: str | None = None
    nodes: tuple[str, ...] = ()
    node_count: int | None = None
    submit_time: datetime | None = None
    eligible_time: datetime | None = None
    start_time: datetime | None = None
    """None for an attempt that never started."""
    end_time: datetime | None = None
    """None while it runs."""
    elapsed: timedelta | None = None
    time_limit: timedelta | None = None
    exit_code: int | None = None
    exit_signal: int | None = None
    derived_exit_code: int | None = None
    """Highest exit code of its steps."""
    restarts: int | None = None
    """How often it had been requeued before this attempt; filled where sacct prints it, else by counting the attempts."""
    tres: Mapping[str, str] = field(default_factory=dict)
    """Allocated trackable resources."""
    work_dir: str | None = None
    comment: str | None = None

    @property
    def job_id(self) -> str:
        """The id without its step."""
        return self.id.partition(".")[0]

    @property
    def step(self) -> str | None:
        """`batch`, `extern`, `0`, ...; None for the record of the whole attempt."""
        return self.id.partition(".")[2] or None

    @property
    def gpu_count(self) -> int | None:
        """GPUs it held; None where Slurm does not say."""
        text = self.tres.get("gres/gpu")
        return int(text) if text is not None and text.isdecimal() else (0 if self.tres else None)


@dataclass(frozen=True, kw_only=True)
class JobPriority:
    """How a pending job's priority is made up: each factor already multiplied by its weight (`sprio`)."""

    job_id: str
    partition: str | None = None
    user: str | None = None
    priority: int | None = None
    factors: Mapping[str, float] = field(default_factory=dict)
    """`age`, `assoc`, `fair_share`, `job_size`, `partition`, `qos`, `site`, `nice`; zero ones too."""
