"""What Slurm's commands print as text: `scontrol -o show ...`, `scontrol show config`, `scontrol ping`, `sacct`, `sprio`.

Pure functions that survive any text: what could be read is in `items`, what could not is named in `problems`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from typing import TypeVar

from cluster import slurm_values as values
from cluster.slurm_json import Fields, shorten, without_early_exit_code
from cluster.slurm_records import (
    AccountingRecord,
    ControllerStatus,
    Job,
    JobPriority,
    Node,
    Parsed,
    Partition,
    SlurmVersion,
)

RecordT = TypeVar("RecordT")

SACCT_SEPARATOR = "\x1f"
"""Column separator we ask sacct for (the ASCII unit separator): names and comments of jobs may hold the usual `|`."""

SACCT_FIELDS = (
    "JobID",
    "JobIDRaw",
    "User",
    "Account",
    "Partition",
    "QOS",
    "State",
    "Reason",
    "NodeList",
    "NNodes",
    "Submit",
    "Eligible",
    "Start",
    "End",
    "ElapsedRaw",
    "TimelimitRaw",
    "ExitCode",
    "DerivedExitCode",
    "AllocTRES",
    "JobName",
    "Comment",
    "WorkDir",
)
"""Columns we ask sacct for; each exists in 22.05 and later. `Restarts` is added where `sacct --helpformat` names it."""

SPRIO_FORMAT = "%i|%r|%u|%Y|%A|%B|%F|%J|%P|%Q|%S|%N"
"""Columns we ask sprio for, with --noheader: weighted factors. A user's name is the only free text in it."""
_SPRIO_FACTORS = ("age", "assoc", "fair_share", "job_size", "partition", "qos", "site", "nice")

# In `scontrol -o` output nothing marks where a value ends, and some values are free text with blanks and = signs in it. Each of
# these runs up to the first of the fields that can follow it (order of 22.05's slurm_sprint_job_info and its node counterpart).
_TAIL_OF_JOB = "StdErr|StdIn|StdOut|Power|NtasksPerTRES|MailUser|MailType|CPU_max_freq|TresPer\\w+|SubmitLine"
_JOB_FREE_TEXT = {
    "JobName": r"UserId=\S*\(\d+\) GroupId=",
    "Reason": r"(?:FailedNode|Dependency)=",
    "Dependency": r"Requeue=",
    "Command": r"(?:WorkDir|BatchScript)=",
    "WorkDir": rf"(?:ClusterFeatures|AdminComment|SystemComment|Comment|{_TAIL_OF_JOB})=",
    "AdminComment": rf"(?:SystemComment|Comment|{_TAIL_OF_JOB})=",
    "SystemComment": rf"(?:Comment|{_TAIL_OF_JOB})=",
    "Comment": rf"(?:{_TAIL_OF_JOB})=",
    "StdErr": r"StdIn=",
    "StdIn": r"StdOut=",
    "StdOut": rf"(?:{_TAIL_OF_JOB})=",
}
_NODE_FREE_TEXT = {
    "OS": r"RealMemory=",
    "Comment": r"(?:Extra|Reason|InstanceId|InstanceType|ReservationName)=",
    "Extra": r"(?:Reason|Comment|InstanceId|InstanceType|ReservationName)=",
    # 22.05 puts nothing behind the reason but the user and time; a comment comes behind those.
    "Reason": r"(?<=\] )\s*(?:Comment|Extra|InstanceId|InstanceType|ReservationName)=",
}
_KEY = re.compile(r"(?:^|\s)([A-Za-z][\w/:.&-]*)=")
_REASON = re.compile(r"(.*) \[([^\[\]@]*)@([^\[\]]*)\]\s*", re.DOTALL)
_GRES_OF_NODES = re.compile(r" Nodes=(\S+) CPU_IDs=\S* Mem=\S* GRES=(\S*)")


def split_fields(line: str, free_text: dict[str, str]) -> dict[str, str]:
    """Split one `Key=value Key=value` record. The first value of a key counts, so free text further on cannot replace it.

    Args:
        line: The record.
        free_text: For each key whose value may hold blanks, a pattern for what follows it.
    """
    fields: dict[str, str] = {}
    position = 0
    while (match := _KEY.search(line, position)) is not None:
        key, start = match.group(1), match.end()
        follower = re.compile(r"\s" + free_text[key]) if key in free_text else _KEY
        following = follower.search(line, start)
        end = following.start() if following else len(line)
        fields.setdefault(key, line[start:end].strip())
        position = end
    return fields


def _parse_records(
    text: str,
    *,
    start: str,
    free_text: dict[str, str],
    build: Callable[[dict[str, str], str, list[str]], RecordT],
) -> Parsed[RecordT]:
    """Split text at lines that begin with `start` and build a record from each piece (free text may hold line breaks)."""
    problems: list[str] = []
    items: list[RecordT] = []
    for piece in re.split(rf"(?m)^(?={re.escape(start)})", text):
        if not piece.strip():
            continue
        fields = split_fields(piece, free_text)
        if not piece.startswith(start) or not fields.get(start.rstrip("=")):
            if not re.match(r"No \w+ in the system", piece):
                problems.append(f"not a record that begins with {start}: {shorten(piece.strip())}")
            continue
        items.append(build(fields, piece, problems))
    return Parsed(tuple(items), tuple(problems))


def parse_nodes_text(text: str) -> Parsed[Node]:
    """Read `scontrol -o -d show node`.

    NodeName=gpu-1 Arch=x86_64 CPUAlloc=1 CPUTot=8 CPULoad=0.47 Gres=gpu:a100:4 GresUsed=gpu:a100:2(IDX:0-1) NodeAddr=127.0.0.1
    OS=Linux 6.18 #1 SMP RealMemory=16000 State=IDLE+DRAIN Reason=Xid 79 [root@1795295334]          (on one line)
    """
    return _parse_records(text, start="NodeName=", free_text=_NODE_FREE_TEXT, build=_node)


def _node(record: dict[str, str], _: str, problems: list[str]) -> Node:
    name = record["NodeName"]
    fields = Fields(record, label=f"node {name}", problems=problems)
    reason, user, time = values.read_text(record.get("Reason")), None, None
    if reason and (match := _REASON.fullmatch(reason)):
        reason, user, time = match.groups()
    load = values.read_number(record.get("CPULoad"))
    return Node(
        name=name,
        states=values.read_node_states(record.get("State")),
        address=fields.read(values.read_text, "NodeAddr"),
        host_name=fields.read(values.read_text, "NodeHostName"),
        reason=reason,
        reason_user=values.read_text(user),
        reason_time=values.read_time(time),
        partitions=fields.read(values.read_list, "Partitions"),
        cpus=fields.read(values.read_count, "CPUTot"),
        cpus_allocated=fields.read(values.read_count, "CPUAlloc"),
        cpu_load=float(load) if isinstance(load, int | float) else None,
        memory_mb=fields.read(values.read_count, "RealMemory"),
        memory_allocated_mb=fields.read(values.read_count, "AllocMem"),
        memory_free_mb=fields.read(values.read_count, "FreeMem"),
        gpus=values.read_gpus(record.get("Gres")),
        gpus_allocated=values.read_gpus(record.get("GresUsed"))
        or values.read_tres_gpus(fields.read(values.read_tres, "AllocTRES")),
        features=fields.read(values.read_list, "AvailableFeatures"),
        active_features=fields.read(values.read_list, "ActiveFeatures"),
        boot_time=fields.read(values.read_time, "BootTime"),
        slurmd_start_time=fields.read(values.read_time, "SlurmdStartTime"),
        last_busy_time=fields.read(values.read_time, "LastBusyTime"),
        slurmd_version=fields.read(values.read_text, "Version"),
        comment=fields.read(values.read_text, "Comment"),
        extra=fields.read(values.read_text, "Extra"),
        instance_id=fields.read(values.read_text, "InstanceId"),
        instance_type=fields.read(values.read_text, "InstanceType"),
    )


def parse_partitions_text(text: str) -> Parsed[Partition]:
    """Read `scontrol -o show partition`.

    PartitionName=low AllowAccounts=ALL Default=YES QoS=N/A DefaultTime=01:00:00 GraceTime=10 MaxNodes=UNLIMITED
    MaxTime=2-00:00:00 Nodes=gpu-[1-2] PriorityJobFactor=1 PriorityTier=10 PreemptMode=REQUEUE State=UP     (on one line)
    """
    return _parse_records(text, start="PartitionName=", free_text={}, build=_partition)


def _partition(record: dict[str, str], _: str, problems: list[str]) -> Partition:
    name = record["PartitionName"]
    fields = Fields(record, label=f"partition {name}", problems=problems)
    return Partition(
        name=name,
        nodes=fields.read(values.read_names, "Nodes"),
        state=fields.read(values.read_text, "State"),
        tier=fields.read(values.read_count, "PriorityTier"),
        job_factor=fields.read(values.read_count, "PriorityJobFactor"),
        preempt_mode=fields.read(values.read_text, "PreemptMode"),
        grace_time=fields.read(values.read_seconds, "GraceTime"),
        max_time=fields.read(values.read_clock, "MaxTime"),
        default_time=fields.read(values.read_clock, "DefaultTime"),
        max_nodes=fields.read(values.read_count, "MaxNodes"),
        is_default={"YES": True, "NO": False}.get(record.get("Default", "")),
        allow_accounts=_all_or_names(record.get("AllowAccounts")),
        allow_qos=_all_or_names(record.get("AllowQos")),
        allow_groups=_all_or_names(record.get("AllowGroups")),
        qos=fields.read(values.read_text, "QoS"),
        total_cpus=fields.read(values.read_count, "TotalCPUs"),
        total_nodes=fields.read(values.read_count, "TotalNodes"),
    )


def _all_or_names(value: str | None) -> tuple[str, ...]:
    return () if value == "ALL" else values.read_list(value)


def _smaller_of_range(value: object) -> int | None:
    """Read `NumNodes=2-4` of a pending job as 2."""
    return values.read_count(value.partition("-")[0] if isinstance(value, str) else value)


def _path(value: object) -> str | None:
    """Read a path, but not that of the undivided part of an array, in which Slurm fills NO_VAL in as the task's number."""
    text = values.read_text(value)
    return None if text is None or "4294967294" in text else text


def parse_jobs_text(text: str) -> Parsed[Job]:
    """Read `scontrol -o -d show job`.

    JobId=1 ArrayJobId=1 ArrayTaskId=3 JobName=train UserId=root(0) JobState=RUNNING Reason=None Restarts=0 ExitCode=0:0
    TimeLimit=01:00:00 SubmitTime=1795295151 NodeList=gpu-[1-2]   Nodes=gpu-[1-2] CPU_IDs=0 Mem=16000 GRES=gpu:a100:4(IDX:0-3)
    """
    return _parse_records(text, start="JobId=", free_text=_JOB_FREE_TEXT, build=_job)


def _job(record: dict[str, str], piece: str, problems: list[str]) -> Job:
    job_id = record["JobId"]
    fields = Fields(record, label=f"job {job_id}", problems=problems)
    user, user_id = values.read_user_and_id(record.get("UserId"))
    state, flags = values.read_job_state(record.get("JobState"))
    if state == "UNKNOWN":
        problems.append(f"job {job_id}: JobState: cannot read {shorten(record.get('JobState'))}")
    reason = fields.read(values.read_text, "Reason")
    # Slurm prints its longer description, blanks as underscores, in place of the reason's name, which never has one.
    reason_is_described = "_" in (reason or "")
    exit_code, exit_signal = values.read_exit_status(record.get("ExitCode"))
    gpus_by_node = {
        node: indices
        for nodes, gres in _GRES_OF_NODES.findall(piece)
        if (indices := values.read_gpu_indices(gres))
        for node in values.read_names(nodes)
    }
    job = Job(
        id=job_id,
        name=fields.read(values.read_text, "JobName"),
        user=user,
        user_id=user_id,
        account=fields.read(values.read_text, "Account"),
        partition=fields.read(values.read_text, "Partition"),
        qos=fields.read(values.read_text, "QOS"),
        state=state,
        flags=flags,
        reason=None if reason_is_described else reason,
        reason_detail=reason.replace("_", " ") if reason and reason_is_described else None,
        nodes=fields.read(values.read_names, "NodeList"),
        batch_host=fields.read(values.read_text, "BatchHost"),
        required_nodes=fields.read(values.read_names, "ReqNodeList"),
        excluded_nodes=fields.read(values.read_names, "ExcNodeList"),
        planned_nodes=fields.read(values.read_names, "SchedNodeList"),
        node_count=fields.read(_smaller_of_range, "NumNodes"),
        cpus=fields.read(_smaller_of_range, "NumCPUs"),
        array_job_id=fields.read(values.read_text, "ArrayJobId"),
        array_task=fields.read(values.read_text, "ArrayTaskId"),
        het_job_id=fields.read(values.read_text, "HetJobId"),
        restarts=fields.read(values.read_count, "Restarts"),
        may_requeue={"1": True, "0": False}.get(record.get("Requeue", "")),
        submit_time=fields.read(values.read_time, "SubmitTime"),
        eligible_time=fields.read(values.read_time, "EligibleTime"),
        start_time=fields.read(values.read_time, "StartTime"),
        end_time=fields.read(values.read_time, "EndTime"),
        suspend_time=fields.read(values.read_time, "SuspendTime"),
        preempt_time=fields.read(values.read_time, "PreemptTime"),
        preempt_eligible_time=fields.read(values.read_time, "PreemptEligibleTime"),
        time_limit=None
        if record.get("TimeLimit") == "Partition_Limit"
        else fields.read(values.read_clock, "TimeLimit"),
        tres=fields.read(values.read_tres, "AllocTRES", "ReqTRES", "TRES"),
        tres_per_node=fields.read(values.read_text, "TresPerNode"),
        gpus_by_node=gpus_by_node,
        dependency=fields.read(values.read_text, "Dependency"),
        exit_code=exit_code,
        exit_signal=exit_signal,
        comment=fields.read(values.read_text, "Comment"),
        admin_comment=fields.read(values.read_text, "AdminComment"),
        work_dir=fields.read(values.read_text, "WorkDir"),
        stdout=_path(record.get("StdOut")),
        stderr=_path(record.get("StdErr")),
        command=fields.read(values.read_text, "Command"),
        priority=fields.read(values.read_count, "Priority"),
        nice=values.read_signed(record.get("Nice")),
        constraint=fields.read(values.read_text, "Features"),
    )
    return without_early_exit_code(job)


def parse_accounting(text: str, fields: Sequence[str] = SACCT_FIELDS) -> Parsed[AccountingRecord]:
    """Read `sacct --duplicates --parsable2 --noheader --delimiter=<unit separator> --format=<fields>`.

    A line with too few columns is the first part of a record whose job name or comment holds a line break.
    """
    problems: list[str] = []
    records: list[AccountingRecord] = []
    pending = ""
    for line in text.split("\n"):
        pending = f"{pending}\n{line}" if pending else line
        if not pending.strip():
            pending = ""
            continue
        columns = pending.split(SACCT_SEPARATOR)
        if len(columns) < len(fields):
            continue
        pending = ""
        record = dict(zip(fields, columns, strict=False))
        if len(columns) > len(fields) or not record.get("JobID"):
            problems.append(f"not a record of {len(fields)} columns with a job id: {shorten(line)}")
            continue
        records.append(_accounting_record(record, problems))
    if pending.strip():
        problems.append(f"not a record of {len(fields)} columns: {shorten(pending)}")
    return Parsed(tuple(records), tuple(problems))


def _accounting_record(record: dict[str, str], problems: list[str]) -> AccountingRecord:
    fields = Fields(record, label=f"accounting of job {record['JobID']}", problems=problems)
    state, _, rest = record.get("State", "").partition(" ")
    exit_code, exit_signal = values.read_exit_status(record.get("ExitCode"))
    derived, _ = values.read_exit_status(record.get("DerivedExitCode"))
    is_over = fields.read(values.read_time, "End") is not None
    return AccountingRecord(
        id=record["JobID"],
        raw_id=record.get("JobIDRaw") or record["JobID"],
        name=fields.read(values.read_text, "JobName"),
        user=fields.read(values.read_text, "User"),
        account=fields.read(values.read_text, "Account"),
        partition=fields.read(values.read_text, "Partition"),
        qos=fields.read(values.read_text, "QOS"),
        state=state or "UNKNOWN",
        cancelled_by=rest.removeprefix("by ").strip() or None,
        reason=fields.read(values.read_text, "Reason"),
        nodes=fields.read(values.read_names, "NodeList"),
        node_count=fields.read(values.read_count, "NNodes"),
        submit_time=fields.read(values.read_time, "Submit"),
        eligible_time=fields.read(values.read_time, "Eligible"),
        start_time=fields.read(values.read_time, "Start"),
        end_time=fields.read(values.read_time, "End"),
        elapsed=fields.read(values.read_seconds, "ElapsedRaw"),
        time_limit=None
        if record.get("TimelimitRaw") == "Partition_Limit"
        else fields.read(values.read_minutes, "TimelimitRaw"),
        exit_code=exit_code if is_over else None,
        exit_signal=exit_signal if is_over else None,
        derived_exit_code=derived if is_over else None,
        restarts=fields.read(values.read_count, "Restarts"),
        tres=fields.read(values.read_tres, "AllocTRES"),
        work_dir=fields.read(values.read_text, "WorkDir"),
        comment=fields.read(values.read_text, "Comment"),
    )


def order_attempts(records: Sequence[AccountingRecord]) -> list[AccountingRecord]:
    """Return records by the time their attempt was submitted (a requeue counts as one), steps behind their attempt."""
    groups: list[list[AccountingRecord]] = []
    for record in records:
        if groups and record.step is not None and record.job_id == groups[-1][0].job_id:
            groups[-1].append(record)
        else:
            groups.append([record])
    unknown = datetime.max.replace(tzinfo=timezone.utc)
    groups.sort(key=lambda group: group[0].submit_time or unknown)
    return [record for group in groups for record in group]


def count_restarts(records: Sequence[AccountingRecord]) -> list[AccountingRecord]:
    """Fill in `restarts` where sacct did not print it, by counting; the records must be every attempt, oldest first."""
    seen: Counter[str] = Counter()
    counted: list[AccountingRecord] = []
    for record in records:
        job_id = record.raw_id.partition(".")[0]
        if record.step is None:
            seen[job_id] += 1
        before = max(seen[job_id] - 1, 0)
        counted.append(record if record.restarts is not None else replace(record, restarts=before))
    return counted


def parse_priorities(text: str) -> Parsed[JobPriority]:
    """Read `sprio --noheader --format=SPRIO_FORMAT`: `2|low|root|30112|0|0|10000|112|20000|0|0|0`."""
    problems: list[str] = []
    priorities: list[JobPriority] = []
    for line in text.splitlines():
        columns = [column.strip() for column in line.split("|")]
        if len(columns) != len(_SPRIO_FACTORS) + 4 or not columns[0]:
            if line.strip():
                problems.append(f"not a line of {len(_SPRIO_FACTORS) + 4} columns: {shorten(line)}")
            continue
        job_id, partition, user, priority, *factors = columns
        numbers = zip(_SPRIO_FACTORS, map(values.read_number, factors), strict=True)
        priorities.append(
            JobPriority(
                job_id=job_id,
                partition=values.read_text(partition),
                user=values.read_text(user),
                priority=values.read_count(priority),
                factors={name: float(number) for name, number in numbers if isinstance(number, int | float)},
            )
        )
    return Parsed(tuple(priorities), tuple(problems))


def parse_configuration(text: str) -> dict[str, str]:
    """Read `scontrol show config`; `(null)` becomes an empty text. Lines that are no setting are left out."""
    settings: dict[str, str] = {}
    for line in text.splitlines():
        match = re.fullmatch(r"(\w[\w/.\[\]-]*)\s*=\s?(.*)", line)
        if match:
            settings.setdefault(match.group(1), "" if match.group(2).strip() == "(null)" else match.group(2).strip())
    return settings


def parse_ping(text: str) -> Parsed[ControllerStatus]:
    """Read `scontrol ping`: `Slurmctld(primary) at head is UP`, one line a controller (older ones: all on one line)."""
    found = re.findall(r"Slurmctld\(([^()]*)\)\s+at\s+(\S+)\s+is\s+(UP|DOWN)", text)
    statuses = tuple(ControllerStatus(name=name, role=role, is_up=state == "UP") for role, name, state in found)
    return Parsed(statuses, () if statuses else (f"no controller in {shorten(text.strip())}",))


def parse_version(text: str) -> SlurmVersion | None:
    """Read `slurm-wlm 22.05.8` or `slurm 24.11.0-0rc1`."""
    match = re.search(r"\b(\d{2})\.(\d{2})(?:\.(\d{1,3}))?(\S*)", text)
    if match is None:
        return None
    major, minor, patch, suffix = match.groups()
    return SlurmVersion(major=int(major), minor=int(minor), patch=int(patch or 0), suffix=suffix)
