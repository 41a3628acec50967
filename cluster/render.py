"""From the description of a cluster to Slurm's configuration: the same code for production and for this machine.

Pure: `render_slurm` makes texts, `accounting_plan` makes argument lists; nothing is read, written or run. What
differs between a production cluster and one on this machine is in `SlurmSite` and nowhere else.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path, PurePosixPath

import jinja2

from cluster.durations import slurm_time
from cluster.errors import InputError
from cluster.settings import ClusterSpec, Pool, Project, Queue

EVERYONE = Project(name="everyone", description="Everyone on this cluster (no projects are described)")
"""The project of a cluster that describes none: with accounting on, Slurm takes jobs only from users of some
account."""

_SEND_USER_SIGNAL_IS_PREEMPT_PARAMETER = (23, 11)
"""From this version on the option lives in PreemptParameters; 22.05 refuses that key and takes it in
SlurmctldParameters."""
_CGROUPS_CAN_BE_DISABLED = (23, 11)
_SHORTEST_HOLD_S = 5
"""Slurm 22.05 calls a cred_expire below this invalid and takes its default of 120 s instead, the opposite of what was meant."""
_DAY_MIN = 24 * 60
_UNSAFE_IN_PATH = re.compile(r"[^A-Za-z0-9._/+@-]")


@dataclass(frozen=True, kw_only=True)
class SlurmSite:
    """Where a cluster's Slurm lives: everything about its configuration that is not in the description.

    The defaults are those of a production head node; `cluster.local` makes one for this machine.
    """

    version: tuple[int, int]
    """Slurm's version as (year, month), such as (22, 5): some options have moved between versions."""
    controller_host: str
    controller_address: str | None = None
    controller_port: int = 6817
    node_address: str | None = None
    """One address for all nodes, where they share a machine; their names are resolved otherwise."""
    first_node_port: int | None = None
    """Port of the first node; each further one has the next. All have Slurm's 6818 if None."""
    database_daemon_host: str = "localhost"
    database_daemon_address: str | None = None
    database_daemon_port: int = 6819
    database_host: str = "localhost"
    database_port: int | None = None
    database_user: str = "slurm"
    database_name: str = "slurm_acct_db"
    slurm_user: str = "slurm"
    slurmd_user: str = "root"
    state_directory: Path = Path("/var/spool/slurm.state")
    spool_directory: str = "/var/spool/slurmd"
    """May hold Slurm's `%n` for the node's name."""
    log_directory: Path = Path("/var/log")
    run_directory: Path = Path("/run")
    munge_socket: Path | None = None
    """MUNGE's default one if None."""
    gpu_device: str = "/dev/nvidia"
    """Device file of a GPU without its number. Slurm only takes character devices."""
    loopback_only: bool = False
    """Bind every daemon to its own address instead of all interfaces."""
    several_slurmd_per_machine: bool = False
    simulated_hardware: bool = False
    """Believe the description about CPUs and memory instead of what slurmd finds on the machine."""
    tree_width: int | None = None
    process_tracking: str = "proctrack/cgroup"
    task_plugin: str = "task/cgroup,task/affinity"
    job_accounting: str = "jobacct_gather/cgroup"
    scheduler_parameters: Sequence[str] = ("nohold_on_prolog_fail",)
    parameters: Mapping[str, str] = field(default_factory=dict)
    """Further lines of slurm.conf."""


def render_slurm(spec: ClusterSpec, site: SlurmSite) -> dict[str, str]:
    """Render the configuration as file name -> text.

    `slurm.conf` always; `gres.conf` if there are GPUs; `slurmdbd.conf` if accounting is on (install it readable by
    the Slurm user only, or slurmdbd refuses it); `cgroup.conf` for simulated hardware where the version would
    otherwise insist on cgroups.

    Raises:
        InputError: A path holds a character that slurm.conf cannot carry, or the description asks for what only the
            accounting database can do while accounting is off.
    """
    for path in (
        site.state_directory,
        site.log_directory,
        site.run_directory,
        site.munge_socket,
        PurePosixPath(site.gpu_device),
    ):
        found = None if path is None else _UNSAFE_IN_PATH.search(str(path))
        if found:
            raise InputError(
                f"{path}: the character {found.group()!r} cannot stand in a path of slurm.conf; use another directory"
            )
    environment = _environment()
    context = _context(spec, site)
    names = ["slurm.conf"]
    names += ["gres.conf"] if context["has_gpus"] else []
    names += ["slurmdbd.conf"] if spec.accounting.enabled else []
    files = {name: environment.get_template(f"{name}.j2").render(context) for name in names}
    if site.simulated_hardware and site.version >= _CGROUPS_CAN_BE_DISABLED:
        files["cgroup.conf"] = "CgroupPlugin=disabled\n"
    return files


@dataclass(frozen=True, kw_only=True)
class AccountingCall:
    """One thing that the accounting database must hold, as arguments for `sacctmgr`."""

    arguments: tuple[str, ...]
    """Adds it with all its values. If it is there already, sacctmgr ends with status 1 and says that nothing new was
    added."""
    if_present: tuple[str, ...] = ()
    """Sets its values where it was there already, so that a changed description is taken over; empty if it has
    none."""


@dataclass(frozen=True, kw_only=True)
class AccountingPlan:
    """What the accounting database must hold for a cluster. Nothing is ever deleted."""

    before_controller: tuple[AccountingCall, ...]
    """For before slurmctld starts, which refuses a partition whose QOS does not exist. Independent of each other."""
    after_controller: tuple[AccountingCall, ...]
    """In order, once slurmctld has registered: before that the database knows no `gres/gpu` that could be limited."""


def accounting_plan(spec: ClusterSpec, users: Sequence[str] = ()) -> AccountingPlan:
    """Plan the accounting database: a QOS for each queue, an account for each project, an association for each
    member.

    A project's `budget_gpu_hours` is no Slurm limit here: over budget the low queue must remain open, which
    GrpTRESMins of an account cannot say.

    Args:
        spec: The cluster; without accounting the plan is empty.
        users: Login names that are members of every project, besides each project's own.
    """
    if not spec.accounting.enabled:
        return AccountingPlan(before_controller=(), after_controller=())
    scope = f"Cluster={spec.name}"
    before = [AccountingCall(arguments=("add", "cluster", spec.name))]
    for queue in spec.queues:
        exempt_s = _whole_seconds(queue.minimum_run)
        exempt = f"PreemptExemptTime={slurm_time(timedelta(seconds=exempt_s))}" if exempt_s else "PreemptExemptTime=-1"
        values = (exempt, f"Description=queue {queue.name}")
        add = ("add", "qos", queue.name, *values)
        before.append(AccountingCall(arguments=add, if_present=("modify", "qos", queue.name, "set", *values)))
    after = []
    has_default: set[str] = set()
    for project in spec.projects or (EVERYONE,):
        names = (f"Description={project.description or project.name}", f"Organization={spec.name}")
        limits = _limits(spec, project)
        after.append(
            AccountingCall(
                arguments=("add", "account", project.name, scope, *names, *limits),
                if_present=("modify", "account", project.name, "where", scope, "set", *limits),
            )
        )
        members = list(dict.fromkeys([*project.users, *users]))
        if members:
            after.append(AccountingCall(arguments=("add", "user", ",".join(members), f"Account={project.name}", scope)))
        if "root" in members and "root" not in has_default:
            # A new user's first account becomes the default one. root is never new: Slurm itself put it into account
            # root.
            after.append(
                AccountingCall(
                    arguments=("modify", "user", "root", "where", scope, "set", f"DefaultAccount={project.name}")
                )
            )
        has_default.update(members)
    return AccountingPlan(before_controller=tuple(before), after_controller=tuple(after))


def _limits(spec: ClusterSpec, project: Project) -> list[str]:
    has_gpus = any(pool.gpus_per_node for pool in spec.pools)
    limit = -1 if project.max_gpus is None else project.max_gpus  # -1 takes an earlier limit away
    return [f"Fairshare={project.share}", *([f"GrpTRES=gres/gpu={limit}"] if has_gpus else [])]


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("templates", "slurm"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 - plain text for Slurm, no HTML anywhere
    )
    environment.filters["seconds"] = _whole_seconds
    environment.filters["slurm_seconds"] = lambda seconds: slurm_time(timedelta(seconds=seconds))
    environment.filters["parameters"] = lambda parameters: " ".join(
        f"{key}={value}" for key, value in parameters.items()
    )
    return environment


def _context(spec: ClusterSpec, site: SlurmSite) -> dict[str, object]:
    scheduling = spec.scheduling
    has_gpus = any(pool.gpus_per_node for pool in spec.pools)
    moved = site.version >= _SEND_USER_SIGNAL_IS_PREEMPT_PARAMETER
    socket = [f"socket={site.munge_socket}"] if site.munge_socket else []
    return {
        "spec": spec,
        "site": site,
        "weights": scheduling.prioritise,
        "has_gpus": has_gpus,
        "preempts": any(queue.preemption != "off" for queue in spec.queues),
        "preempt_exempt_s": _global_minimum_run_s(spec),
        "auth_info": ",".join(
            [*socket, f"cred_expire={max(_SHORTEST_HOLD_S, _whole_seconds(scheduling.requeue_hold))}"]
        ),
        "communication_parameters": ["NoCtldInAddrAny", "NoInAddrAny"] if site.loopback_only else [],
        "slurmd_parameters": ["config_overrides"] if site.simulated_hardware else [],
        "scheduler_parameters": [*site.scheduler_parameters, *_scheduler_parameters(spec)],
        "slurmctld_parameters": ["preempt_send_user_signal"]
        if scheduling.user_signal_on_preemption and not moved
        else [],
        "preempt_parameters": ["send_user_signal"] if scheduling.user_signal_on_preemption and moved else [],
        "nodes": list(_node_lines(spec, site)),
        "partitions": [_partition_line(spec, queue) for queue in spec.queues],
        "gres": [
            {
                "NodeName": _node_range(pool),
                "Name": "gpu",
                "Type": pool.gpu_model,
                "File": f"{site.gpu_device}{_range(0, pool.gpus_per_node - 1)}",
            }
            for pool in spec.pools
            if pool.gpus_per_node
        ],
    }


def _scheduler_parameters(spec: ClusterSpec) -> list[str]:
    """Return the schedulers' rhythm, and a backfill window that sees past the longest time limit.

    With a shorter window backfill cannot plan around jobs that end later, and large jobs starve; SchedMD advises to
    coarsen the resolution in proportion (slurm.conf(5), bf_window).
    """
    longest = max((queue.time_limit for queue in spec.queues if queue.time_limit is not None), default=timedelta(0))
    window_min = max(_DAY_MIN, -int(-longest.total_seconds() // 60))
    return [
        f"sched_interval={_whole_seconds(spec.scheduling.scheduler_interval)}",
        f"bf_interval={_whole_seconds(spec.scheduling.backfill_interval)}",
        f"bf_window={window_min}",
        f"bf_resolution={60 * -(-window_min // _DAY_MIN)}",
        "bf_continue",
        # Of several jobs that could make room, the one that has run least loses least.
        "preempt_youngest_first",
    ]


def _global_minimum_run_s(spec: ClusterSpec) -> int:
    """Return PreemptExemptTime for slurm.conf: only needed where no QOS can carry each queue's own value."""
    if spec.accounting.enabled:
        return 0
    values = {_whole_seconds(queue.minimum_run) for queue in spec.queues if queue.preemption != "off"}
    if len(values) > 1:
        shown = ", ".join(f"{value} s" for value in sorted(values))
        raise InputError(
            f"queues[].minimum_run: the preemptible queues have different values ({shown}); "
            "without accounting Slurm knows only one for the whole cluster; make them equal or set accounting.enabled: true"
        )
    return values.pop() if values else 0


def _node_lines(spec: ClusterSpec, site: SlurmSite) -> Iterator[dict[str, object]]:
    port = site.first_node_port
    for pool in spec.pools:
        line: dict[str, object] = {"NodeName": _node_range(pool)}
        if site.node_address:
            line["NodeAddr"] = site.node_address
        if port is not None:
            line["Port"] = _range(port, port + pool.nodes - 1)
            port += pool.nodes
        line["CPUs"] = pool.cpus_per_node
        line["RealMemory"] = pool.memory_gb_per_node * 1024
        if pool.gpus_per_node:
            line["Gres"] = f"gpu:{pool.gpu_model}:{pool.gpus_per_node}"
        line["Feature"] = ",".join(filter(None, [pool.name, pool.instance_type]))
        line["State"] = "UNKNOWN"
        yield line


def _partition_line(spec: ClusterSpec, queue: Queue) -> dict[str, object]:
    pools = [spec.pool(name) for name in queue.pools]
    line: dict[str, object] = {
        "PartitionName": queue.name,
        "Nodes": ",".join(_node_range(pool) for pool in pools),
        "Default": "YES" if queue.name == spec.default_queue().name else "NO",
        "PriorityTier": queue.tier,
        "PriorityJobFactor": queue.tier,
        "PreemptMode": queue.preemption.upper(),
        "GraceTime": _whole_seconds(queue.grace),
        "MaxTime": "INFINITE" if queue.time_limit is None else slurm_time(queue.time_limit),
        # Memory is handed out (CR_CPU_Memory): a job that asks for none gets its CPUs' part, not the whole node's.
        "DefMemPerCPU": min(pool.memory_gb_per_node * 1024 // pool.cpus_per_node for pool in pools),
    }
    default_time = queue.default_time or queue.time_limit
    if default_time is not None:
        line["DefaultTime"] = slurm_time(default_time)
    if spec.accounting.enabled:
        line["QOS"] = queue.name
        if queue.projects:
            line["AllowAccounts"] = ",".join(queue.projects)
    line["State"] = "UP"
    return line


def _node_range(pool: Pool) -> str:
    return f"{pool.name}-{_range(1, pool.nodes)}"


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"[{first}-{last}]"


def _whole_seconds(value: timedelta) -> int:
    """Round up: 0 means "none" or "default" to many of Slurm's settings, so half a second must not become it."""
    return -int(-value.total_seconds() // 1)
