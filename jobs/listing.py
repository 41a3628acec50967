"""Jobs as rows and as one job's details, from slurmctld and accounting together."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from cluster.durations import format_duration
from cluster.errors import OutsideError
from cluster.hostlist import fold
from cluster.slurm import SlurmClient
from cluster.slurm_records import UNLIMITED, AccountingRecord, Job
from jobs.lookup import Found, describe_time, element_indices
from jobs.run_folder import SLURM_FOLDER
from jobs.why import span

logger = logging.getLogger(__name__)

_PAST = timedelta(days=2)


@dataclass(frozen=True, kw_only=True)
class JobRow:
    """One job in a list."""

    id: str
    name: str | None
    user: str | None
    queue: str | None
    state: str
    reason: str | None
    nodes: tuple[str, ...]
    node_count: int | None
    gpus: int | None
    restarts: int | None
    submitted: datetime | None
    started: datetime | None
    ended: datetime | None

    def as_dict(self) -> dict[str, Any]:
        """Return what `--json` prints; times in ISO 8601 with their zone."""
        return {key: value.isoformat() if isinstance(value, datetime) else value for key, value in asdict(self).items()}


def job_rows(slurm: SlurmClient, *, users: Sequence[str], queue: str | None, with_past: bool) -> list[JobRow]:
    """Return jobs, newest first; with `with_past` also those of the last two days that only accounting remembers."""
    jobs = slurm.jobs(users=users, partitions=[queue] if queue else [])
    rows = {job.display_id: _row_of_job(job) for job in jobs}
    if with_past:
        try:
            records = slurm.accounting(users=users, since=datetime.now(timezone.utc) - _PAST)
        except OutsideError as error:
            logger.warning("earlier jobs are not known: %s", error)
            records = []
        attempts = Counter(record.id for record in records if record.step is None)
        for record in reversed(records):  # the last attempt of a requeued job stands for it
            if record.step is None and (queue is None or record.partition == queue):
                rows.setdefault(record.id, _row_of_record(record, restarts=attempts[record.id] - 1))
    return sorted(rows.values(), key=_age, reverse=True)


def _age(row: JobRow) -> tuple[int, ...]:
    """Order by number, 12_3 before 12_10 before 13: the time of submission is set anew when a job is requeued."""
    number, _, index = row.id.partition("_")
    return (*(int(digits) for digits in re.findall(r"\d+", number)[:1]), *element_indices(index)[:1])


def _row_of_job(job: Job) -> JobRow:
    return JobRow(
        id=job.display_id,
        name=job.name,
        user=job.user,
        queue=job.partition,
        state=job.state,
        reason=job.reason,
        nodes=job.nodes,
        node_count=job.node_count,
        gpus=job.gpu_count,
        restarts=job.restarts,
        submitted=job.submit_time,
        started=None if job.is_pending else job.start_time,
        ended=job.end_time if job.is_ended else None,
    )


def _row_of_record(record: AccountingRecord, *, restarts: int) -> JobRow:
    return JobRow(
        id=record.id,
        name=record.name,
        user=record.user,
        queue=record.partition,
        state=record.state,
        reason=record.reason,
        nodes=record.nodes,
        node_count=record.node_count,
        gpus=record.gpu_count,
        restarts=restarts,
        submitted=record.submit_time,
        started=record.start_time,
        ended=record.end_time,
    )


def job_table(rows: Sequence[JobRow], *, now: datetime, with_user: bool) -> tuple[list[str], list[list[str]]]:
    """Return headings and cells."""
    columns = [
        "job",
        "name",
        *(["user"] if with_user else []),
        "queue",
        "state",
        "time",
        "nodes",
        "gpus",
        "attempt",
        "where or why",
    ]
    cells = []
    for row in rows:
        where = fold(row.nodes) if row.nodes else ""
        if not where and row.reason not in {None, "None"}:
            where = f"({row.reason})"
        cells.append(
            [
                row.id,
                row.name or "",
                *([row.user or ""] if with_user else []),
                row.queue or "",
                row.state.lower(),
                _how_long(row, now),
                str(row.node_count if row.node_count is not None else ""),
                str(row.gpus if row.gpus is not None else ""),
                str((row.restarts or 0) + 1),
                where,
            ]
        )
    return columns, cells


def _how_long(row: JobRow, now: datetime) -> str:
    """Say how long it has run or ran, or for how long it has waited."""
    if row.started is not None and row.ended is not None:
        return span(row.ended - row.started)
    if row.started is not None:
        return span(now - row.started)
    return f"waits {span(now - row.submitted)}" if row.submitted is not None and row.ended is None else ""


def job_details(found: Found, *, now: datetime) -> Iterator[tuple[str, str]]:
    """Yield what there is to know about one job as names and values; what is not known is left out."""
    job = found.job
    if job is None:
        yield from _record_details(found, now)
    else:
        yield from _job_details(job, now)
    run = found.run_directory
    if run is not None:
        yield "run directory", str(run)
        script = run / SLURM_FOLDER / f"{found.id.partition('_')[0]}_submission.sh"
        if script.exists():
            yield "script", str(script)
    if job is not None and job.stdout:
        yield "log", job.stdout
    if len(found.records) > 1:
        for number, record in enumerate(found.records, start=1):
            where = f" on {fold(record.nodes)}" if record.nodes else ""
            yield (
                f"attempt {number}",
                f"{record.state.lower()}{where}, started {describe_time(record.start_time, now) or 'never'}",
            )


def _job_details(job: Job, now: datetime) -> Iterator[tuple[str, str]]:
    yield "job", f"{job.display_id} ({job.name})" if job.name else job.display_id
    yield "state", job.state.lower() + (f" ({job.reason})" if job.reason and job.reason != "None" else "")
    for name, value in (
        ("user", job.user),
        ("project", job.account),
        ("queue", job.partition),
        ("qos", job.qos),
        ("priority", job.priority),
        ("nodes", _nodes(job.node_count, job.nodes)),
        ("gpus", job.gpu_count),
        ("cpus", job.cpus),
        ("memory", job.tres.get("mem")),
        ("excluded", fold(job.excluded_nodes) if job.excluded_nodes else None),
        ("depends on", job.dependency),
        (
            "time limit",
            None
            if job.time_limit is None
            else "none"
            if job.time_limit == UNLIMITED
            else format_duration(job.time_limit),
        ),
        ("attempt", (job.restarts or 0) + 1),
        ("may be requeued", None if job.may_requeue is None else "yes" if job.may_requeue else "no"),
        ("submitted", describe_time(job.submit_time, now)),
        ("started" if not job.is_pending else "expected", describe_time(job.start_time, now)),
        ("ended" if job.is_ended else "ends by", None if job.is_pending else describe_time(job.end_time, now)),
        ("exit code", _exit(job.exit_code, job.exit_signal) if job.is_ended else None),
        ("directory", job.work_dir),
        ("script", job.command if job.command and not Path(job.command).name.startswith(".") else None),
    ):
        if value not in {None, ""}:
            yield name, str(value)


def _record_details(found: Found, now: datetime) -> Iterator[tuple[str, str]]:
    record = found.records[-1]
    yield "job", f"{record.id} ({record.name})" if record.name else record.id
    by = f" by {record.cancelled_by}" if record.cancelled_by else ""
    yield "state", f"{record.state.lower()}{by}"
    for name, value in (
        ("user", record.user),
        ("project", record.account),
        ("queue", record.partition),
        ("nodes", _nodes(record.node_count, record.nodes)),
        ("gpus", record.gpu_count),
        ("attempt", len(found.records)),
        ("submitted", describe_time(record.submit_time, now)),
        ("started", describe_time(record.start_time, now)),
        ("ended", describe_time(record.end_time, now)),
        ("ran for", None if record.elapsed is None else span(record.elapsed)),
        ("exit code", _exit(record.exit_code, record.exit_signal)),
        ("directory", record.work_dir),
    ):
        if value not in {None, ""}:
            yield name, str(value)


def _nodes(count: int | None, nodes: tuple[str, ...]) -> str | None:
    where = f" ({fold(nodes)})" if nodes else ""
    return None if count is None else f"{count}{where}"


def _exit(code: int | None, signal: int | None) -> str | None:
    if signal:
        return f"ended by signal {signal}"
    return None if code is None else str(code)
