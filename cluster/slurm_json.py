"""What `sinfo`, `squeue` and `scontrol` print with --json, from 22.05 (openapi v0.0.38) to 25.11 (data_parser v0.0.44).

    {"meta": {...}, "errors": [], "nodes": [{"name": "gpu-1", "state": "mixed", "state_flags": ["DRAIN"], ...}]}     22.05
    {"nodes": [{"name": "gpu-1", "state": ["MIXED", "DRAIN"], "boot_time": {"set": true, "infinite": false, ...}, ...}]}    new

Pure functions that survive any text: what could be read is in `items`, what could not is named in `problems`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from cluster import slurm_values as values
from cluster.slurm_records import Job, Node, Parsed

ValueT = TypeVar("ValueT")


class Fields:
    """Reads the fields of one record, whatever its source, and notes each that is there and cannot be read."""

    def __init__(self, record: Mapping[str, Any], *, label: str, problems: list[str]) -> None:
        self._record = record
        self._label = label
        self._problems = problems

    def read(self, reader: Callable[[object], ValueT], *names: str) -> ValueT:
        """Return the first of the fields `names` that the record has and that is not empty, as `reader` understands it."""
        for name in names:
            value = self._record.get(name)
            if values.says_nothing(value) and name != names[-1]:
                continue
            result = reader(value)
            if (result is None or result in ((), {})) and not values.says_nothing(value):
                self._problems.append(f"{self._label}: {name}: cannot read {shorten(value)}")
            return result
        return reader(None)


def shorten(value: object) -> str:
    """Return a value as it stands, cut to a length that fits a message."""
    text = value if isinstance(value, str) else repr(value)
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def parse_nodes_json(text: str) -> Parsed[Node]:
    """Read the nodes of `scontrol show nodes --json` (>= 23.02) or `sinfo --json` (22.05)."""
    problems: list[str] = []
    nodes = tuple(
        _node(record, problems)
        for record in _records(text, "nodes", problems)
        if _has(values.read_text, record, "name", "node", problems)
    )
    return Parsed(nodes, tuple(problems))


def parse_jobs_json(text: str) -> Parsed[Job]:
    """Read the jobs of `squeue --json` or `scontrol show jobs --json`."""
    problems: list[str] = []
    jobs = tuple(
        _job(record, problems)
        for record in _records(text, "jobs", problems)
        if _has(values.read_count, record, "job_id", "job", problems)
    )
    return Parsed(jobs, tuple(problems))


def _records(text: str, key: str, problems: list[str]) -> Iterator[Mapping[str, Any]]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        problems.append(f"not JSON ({error}): {shorten(text)}")
        return
    records = document.get(key) if isinstance(document, dict) else None
    if not isinstance(records, list):
        problems.append(f"no list {key!r} in the JSON: {shorten(text)}")
        return
    for reported in document["errors"] if isinstance(document.get("errors"), list) else []:
        said = (reported.get("description") or reported.get("error")) if isinstance(reported, dict) else reported
        problems.append(f"Slurm reports an error: {shorten(said)}")
    for index, record in enumerate(records):
        if isinstance(record, dict):
            yield record
        else:
            problems.append(f"{key}[{index}]: not an object: {shorten(record)}")


def _has(
    reader: Callable[[object], object],
    record: Mapping[str, Any],
    key: str,
    kind: str,
    problems: list[str],
) -> bool:
    if not reader(record.get(key)):
        problems.append(f"a {kind} without a usable {key!r}: {shorten(record)}")
        return False
    return True


def _hundredths(value: object) -> float | None:
    number = values.read_number(value)
    return number / 100 if isinstance(number, int | float) and 0 <= number < 10**9 else None


def _node(record: Mapping[str, Any], problems: list[str]) -> Node:
    name = values.read_text(record["name"]) or ""
    fields = Fields(record, label=f"node {name}", problems=problems)
    tres_used = fields.read(values.read_tres, "tres_used")
    reason = fields.read(values.read_text, "reason")
    return Node(
        name=name,
        states=values.read_node_states(record.get("state"), record.get("state_flags")),
        address=fields.read(values.read_text, "address"),
        host_name=fields.read(values.read_text, "hostname"),
        reason=reason,
        # 22.05 names a user (root, the number 0) for nodes that have no reason too.
        reason_user=fields.read(values.read_text, "reason_set_by_user") if reason else None,
        reason_time=fields.read(values.read_time, "reason_changed_at") if reason else None,
        partitions=fields.read(values.read_list, "partitions"),
        cpus=fields.read(values.read_count, "cpus"),
        cpus_allocated=fields.read(values.read_count, "alloc_cpus"),
        cpu_load=fields.read(_hundredths, "cpu_load"),
        memory_mb=fields.read(values.read_count, "real_memory"),
        memory_allocated_mb=fields.read(values.read_count, "alloc_memory"),
        memory_free_mb=fields.read(values.read_count, "free_mem", "free_memory"),
        gpus=values.read_gpus(record.get("gres")),
        gpus_allocated=values.read_gpus(record.get("gres_used")) or values.read_tres_gpus(tres_used),
        features=fields.read(values.read_list, "features"),
        active_features=fields.read(values.read_list, "active_features"),
        boot_time=fields.read(values.read_time, "boot_time"),
        slurmd_start_time=fields.read(values.read_time, "slurmd_start_time"),
        last_busy_time=fields.read(values.read_time, "last_busy"),
        slurmd_version=fields.read(values.read_text, "version", "slurmd_version"),
        comment=fields.read(values.read_text, "comment"),
        extra=fields.read(values.read_text, "extra"),
        instance_id=fields.read(values.read_text, "instance_id"),
        instance_type=fields.read(values.read_text, "instance_type"),
    )


def _job(record: Mapping[str, Any], problems: list[str]) -> Job:
    job_id = str(values.read_count(record["job_id"]))
    fields = Fields(record, label=f"job {job_id}", problems=problems)
    state, flags = values.read_job_state(record.get("job_state"))
    if state == "UNKNOWN":
        problems.append(f"job {job_id}: job_state: cannot read {shorten(record.get('job_state'))}")
    nodes = fields.read(values.read_names, "nodes")
    exit_code, exit_signal = values.read_exit_status(record.get("exit_code"))
    array_job_id = fields.read(values.read_count, "array_job_id")
    array_task = values.read_count(record.get("array_task_id"))
    gres_detail = record.get("gres_detail")
    het_job_id = fields.read(values.read_count, "het_job_id")
    job = Job(
        id=job_id,
        name=fields.read(values.read_text, "name"),
        user=fields.read(values.read_text, "user_name"),
        user_id=fields.read(values.read_count, "user_id"),
        account=fields.read(values.read_text, "account"),
        partition=fields.read(values.read_text, "partition"),
        qos=fields.read(values.read_text, "qos"),
        state=state,
        flags=flags,
        reason=fields.read(values.read_text, "state_reason"),
        reason_detail=fields.read(values.read_text, "state_description"),
        nodes=nodes,
        batch_host=fields.read(values.read_text, "batch_host"),
        required_nodes=fields.read(values.read_names, "required_nodes"),
        excluded_nodes=fields.read(values.read_names, "excluded_nodes"),
        planned_nodes=fields.read(values.read_names, "scheduled_nodes"),
        node_count=fields.read(values.read_count, "node_count"),
        cpus=fields.read(values.read_count, "cpus"),
        array_job_id=str(array_job_id) if array_job_id else None,
        array_task=str(array_task) if array_task is not None else fields.read(values.read_text, "array_task_string"),
        het_job_id=str(het_job_id) if het_job_id else None,
        restarts=fields.read(values.read_count, "restart_cnt"),
        may_requeue=record["requeue"] if isinstance(record.get("requeue"), bool) else None,
        submit_time=fields.read(values.read_time, "submit_time"),
        eligible_time=fields.read(values.read_time, "eligible_time"),
        start_time=fields.read(values.read_time, "start_time"),
        end_time=fields.read(values.read_time, "end_time"),
        suspend_time=fields.read(values.read_time, "suspend_time"),
        preempt_time=fields.read(values.read_time, "preempt_time"),
        preempt_eligible_time=fields.read(values.read_time, "preemptable_time"),
        time_limit=fields.read(values.read_minutes, "time_limit"),
        tres=fields.read(values.read_tres, "tres_alloc_str", "tres_req_str"),
        tres_per_node=fields.read(values.read_text, "tres_per_node"),
        gpus_by_node=values.pair_gpus(nodes, gres_detail) if isinstance(gres_detail, list) else {},
        dependency=fields.read(values.read_text, "dependency"),
        exit_code=exit_code,
        exit_signal=exit_signal,
        comment=fields.read(values.read_text, "comment"),
        admin_comment=fields.read(values.read_text, "admin_comment"),
        work_dir=fields.read(values.read_text, "current_working_directory"),
        stdout=fields.read(values.read_text, "stdout_expanded", "standard_output"),
        stderr=fields.read(values.read_text, "stderr_expanded", "standard_error"),
        command=fields.read(values.read_text, "command"),
        priority=fields.read(values.read_count, "priority"),
        nice=values.read_signed(record.get("nice")),
        constraint=fields.read(values.read_text, "features"),
    )
    return without_early_exit_code(job)


def without_early_exit_code(job: Job) -> Job:
    """Take the exit code 0 off a job that has not ended: Slurm prints it for those too, and it means nothing."""
    if job.exit_code == 0 and not job.is_ended and job.state != "COMPLETING":
        return replace(job, exit_code=None, exit_signal=None)
    return job
