"""`SlurmClient`: the only place that spells a Slurm command.

Its records are in `cluster.slurm_records`, the parsers in `cluster.slurm_json` and `cluster.slurm_text`, the meaning of
Slurm's error messages in `cluster.slurm_errors`.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Protocol, TypeVar

from cluster import slurm_json, slurm_text
from cluster.errors import CommandTimeout, InputError, MissingError, NotFoundError, SlurmError, StateError
from cluster.hostlist import fold
from cluster.shell import CommandResult, LocalShell, Shell
from cluster.slurm_errors import is_transient, shorten_command, slurm_error
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

logger = logging.getLogger(__name__)

RecordT = TypeVar("RecordT")

_QUERY_ENVIRONMENT = {
    # Times as seconds since 1970 where a command honours it, and in UTC where it does not: never in somebody's local time.
    "SLURM_TIME_FORMAT": "%s",
    "TZ": "UTC",
    # Task lists of arrays in full; the default cuts them at 64 characters.
    "SLURM_BITSTR_LEN": "0",
}

_SCONTROL_JSON_SINCE = (23, 2)
"""First release whose scontrol has --json. From it on `sinfo --json` prints groups of nodes instead of nodes."""

_JOB_ID = re.compile(r"\d{1,10}(?:_(?:\d{1,10}|\[[\d,:%-]{1,4000}\])|\+\d{1,4})?")
_STEP_ID = re.compile(r"\d{1,10}(?:_\d{1,10}|\+\d{1,4})?(?:\.\w{1,20})?")
_FIELD_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_SIGNAL = re.compile(r"[A-Za-z0-9+]{1,12}")
_NO_JSON = re.compile(r"unrecognized option|invalid option|serializer|data_parser|openapi|plugin", re.IGNORECASE)
_NO_PRIORITIES = re.compile(r"unable to find jobs matching|not running a supported priority plugin", re.IGNORECASE)


class SlurmClient(Protocol):
    """Talks to one Slurm cluster. `SlurmCliClient` is the real one; tests give a fake that keeps state.

    Every method raises `SlurmError` where Slurm refuses, `NotFoundError` where the job, node or partition does not exist,
    `MissingError` where Slurm or its configuration is absent on this machine, `CommandTimeout` where nothing answers.
    """

    def version(self) -> SlurmVersion:
        """Return the version of the programs on this machine."""

    def configuration(self) -> dict[str, str]:
        """Return `scontrol show config`: the running configuration, keys as slurm.conf spells them."""

    def ping(self) -> list[ControllerStatus]:
        """Return whether each slurmctld answers. A dead one is a result, not an error."""

    def nodes(self, names: Sequence[str] = ()) -> list[Node]:
        """Return these nodes, or all of them."""

    def node(self, name: str) -> Node:
        """Return one node."""

    def partitions(self) -> list[Partition]:
        """Return all partitions."""

    def jobs(
        self,
        *,
        job_ids: Sequence[str] = (),
        users: Sequence[str] = (),
        partitions: Sequence[str] = (),
        nodes: Sequence[str] = (),
    ) -> list[Job]:
        """Return the jobs in slurmctld's memory that match every condition given; ended ones too while Slurm remembers them.

        Unknown job ids are left out. An array's id stands for all its elements.
        """

    def job(self, job_id: str) -> Job:
        """Return one job by its raw id or its array notation (`12_3`).

        Raises:
            NotFoundError: slurmctld does not remember it; `accounting` may.
        """

    def accounting(
        self,
        *,
        job_ids: Sequence[str] = (),
        users: Sequence[str] = (),
        since: datetime | None = None,
        until: datetime | None = None,
        with_steps: bool = False,
    ) -> list[AccountingRecord]:
        """Return what slurmdbd keeps, oldest attempt first, every attempt of a requeued job included.

        Without `job_ids` and `since` Slurm returns jobs of today only.

        Raises:
            SlurmError: Accounting is not enabled, or slurmdbd does not answer.
        """

    def priorities(self, job_ids: Sequence[str] = ()) -> list[JobPriority]:
        """Return how the priority of pending jobs is made up; empty where the multifactor plugin is off."""

    def expected_start(self, job_id: str) -> datetime | None:
        """Return when the scheduler expects a pending job to start; None where it does not know yet."""

    def drain(self, nodes: Sequence[str], *, reason: str) -> None:
        """Let these nodes take no new jobs; running ones go on. `reason` is what admins will read."""

    def resume(self, nodes: Sequence[str]) -> None:
        """Put drained or down nodes back into service. Nodes that are in service already stay as they are."""

    def requeue(self, job_id: str, *, hold: bool = False) -> None:
        """Send a job back to the queue: its tasks get TERM and KILL, its id stays. With `hold` it waits for `release`.

        An ended job that Slurm still remembers runs again. One that is pending already raises `StateError`.
        """

    def hold(self, job_id: str) -> None:
        """Keep a pending job from starting until `release`."""

    def release(self, job_id: str) -> None:
        """Let a held job start."""

    def update_job(self, job_id: str, **fields: str | int | datetime) -> None:
        """Change a job: `update_job("12", StartTime="now", ExcNodeList="gpu-[1-2]")`. Keys as `scontrol update` spells them."""

    def cancel(
        self,
        job_ids: Sequence[str],
        *,
        signal: str | None = None,
        batch: bool = False,
        full: bool = False,
    ) -> None:
        """End jobs, or with `signal` (such as `USR2`) only signal them. Ending a job that is gone already is no error.

        Args:
            job_ids: Raw ids or array notation.
            signal: Name or number of the signal; without it the jobs end.
            batch: Signal the batch shell only.
            full: Signal the batch shell and all steps. With neither, only the steps are signalled.
        """

    def submit(
        self,
        script: str | None = None,
        *,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
    ) -> str:
        """Submit a batch job and return its id.

        Args:
            script: Text of the batch script; without it the last of `arguments` must name a script file or use --wrap.
            arguments: sbatch options, and the script file with its own arguments.
            environment: Variables to add for sbatch, and so for the job.
            directory: Where sbatch runs; the job's working directory unless --chdir is given.
        """


class SlurmCliClient:
    """Talks to Slurm through its command-line programs.

    Reads JSON where the running version prints it in full and text where it does not, and looks which on first use. What a
    parser could not read is logged as a warning; where nothing at all could be read that is an error, never an empty answer.
    """

    def __init__(
        self,
        shell: Shell | None = None,
        *,
        environment: Mapping[str, str] | None = None,
        timeout_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Remember how to reach the cluster; nothing is run yet.

        Args:
            shell: Runs the commands; this machine by default.
            environment: Variables to add for every command, such as SLURM_CONF.
            timeout_s: Deadline of each call in seconds, its one retry included.
            clock: Seconds that only grow; tests give their own.
        """
        self._shell = LocalShell() if shell is None else shell
        self._environment = dict(environment or {})
        self._timeout_s = timeout_s
        self._clock = clock
        self._version: SlurmVersion | None = None
        self._accounting_fields: tuple[str, ...] | None = None
        self._json_refused: set[str] = set()

    # Asking

    def version(self) -> SlurmVersion:
        """Return the version of the programs; see `SlurmClient.version`."""
        if self._version is None:
            result = self._query(["scontrol", "--version"])
            version = slurm_text.parse_version(result.stdout)
            if version is None:
                raise _unreadable(result, (f"no version in {result.stdout.strip()!r}",))
            self._version = version
        return self._version

    def configuration(self) -> dict[str, str]:
        """Return the running configuration; see `SlurmClient.configuration`."""
        result = self._query(["scontrol", "show", "config"])
        settings = slurm_text.parse_configuration(result.stdout)
        if not settings:
            raise _unreadable(result, ("no setting in it",))
        return settings

    def ping(self) -> list[ControllerStatus]:
        """Return whether each slurmctld answers; see `SlurmClient.ping`."""
        result = self._run(["scontrol", "ping"], environment=_QUERY_ENVIRONMENT)
        parsed = slurm_text.parse_ping(result.stdout)
        if not parsed.items:  # the exit status is not 0 where a controller is down, which is an answer too
            raise slurm_error(result, timeout_s=self._timeout_s)
        return list(parsed.items)

    def nodes(self, names: Sequence[str] = ()) -> list[Node]:
        """Return these nodes, or all of them; see `SlurmClient.nodes`."""
        wanted = [fold(names)] if names else []
        if self.version().release >= _SCONTROL_JSON_SINCE:
            json_argv = ["scontrol", "--all", "--json", "show", "nodes", *wanted]
        else:
            json_argv = ["sinfo", "--all", "--json"]
        found = self._read(
            json_argv,
            slurm_json.parse_nodes_json,
            ["scontrol", "--all", "--oneliner", "--details", "show", "nodes", *wanted],
            slurm_text.parse_nodes_text,
        )
        if not names:
            return found
        by_name = {node.name: node for node in found}
        missing = [name for name in dict.fromkeys(names) if name not in by_name]
        if missing:
            raise NotFoundError(
                f"{fold(missing)}: the cluster has no such node; see `sinfo -N` for the names of the nodes"
            )
        return [by_name[name] for name in dict.fromkeys(names)]

    def node(self, name: str) -> Node:
        """Return one node; see `SlurmClient.node`."""
        return self.nodes([name])[0]

    def partitions(self) -> list[Partition]:
        """Return all partitions; see `SlurmClient.partitions`.

        Always from text: up to data_parser v0.0.44 the JSON has neither the preempt mode nor which partition is the default.
        """
        result = self._query(["scontrol", "--all", "--oneliner", "show", "partitions"])
        return self._accept(slurm_text.parse_partitions_text(result.stdout), result)

    def jobs(
        self,
        *,
        job_ids: Sequence[str] = (),
        users: Sequence[str] = (),
        partitions: Sequence[str] = (),
        nodes: Sequence[str] = (),
    ) -> list[Job]:
        """Return the jobs that match every condition given; see `SlurmClient.jobs`."""
        ids = [_check_job_id(job_id) for job_id in job_ids]
        found = self._jobs_of_id(ids[0]) if len(ids) == 1 else self._all_jobs()
        return [
            job
            for job in found
            if (not ids or {job.id, job.display_id, job.array_job_id} & set(ids))
            and (not users or job.user in users)
            and (not partitions or set((job.partition or "").split(",")) & set(partitions))
            and (not nodes or set(job.nodes) & set(nodes))
        ]

    def job(self, job_id: str) -> Job:
        """Return one job; see `SlurmClient.job`."""
        found = self.jobs(job_ids=[job_id])
        named = [job for job in found if job_id == job.display_id]
        if named or len(found) == 1:
            return (named or found)[0]
        if found:
            raise InputError(
                f"{job_id}: stands for {len(found)} jobs of an array; name one of them: "
                f"{', '.join(job.display_id for job in found[:5])}"
            )
        raise NotFoundError(
            f"job {job_id}: slurmctld does not know it; it forgets ended jobs after MinJobAge, `sacct` does not"
        )

    def accounting(
        self,
        *,
        job_ids: Sequence[str] = (),
        users: Sequence[str] = (),
        since: datetime | None = None,
        until: datetime | None = None,
        with_steps: bool = False,
    ) -> list[AccountingRecord]:
        """Return what slurmdbd keeps; see `SlurmClient.accounting`.

        Always from text, whose columns have been the same for years; sacct's JSON of 22.05 refuses time ranges when
        SLURM_TIME_FORMAT is set.
        """
        ids = [_check_job_id(job_id) for job_id in job_ids]
        fields = self._sacct_fields()
        argv = ["sacct", "--duplicates", "--noheader", "--parsable2", f"--delimiter={slurm_text.SACCT_SEPARATOR}"]
        argv.append(f"--format={','.join(fields)}")
        argv.append(f"--user={','.join(users)}" if users else "--allusers")
        argv += [] if with_steps else ["--allocations"]
        argv += [f"--jobs={','.join(ids)}"] if ids else []
        argv += [f"--starttime={_slurm_moment(since)}"] if since else []
        argv += [f"--endtime={_slurm_moment(until)}"] if until else []
        result = self._query(argv)
        records = self._accept(slurm_text.parse_accounting(result.stdout, fields), result)
        records = slurm_text.order_attempts(records)
        return slurm_text.count_restarts(records) if ids and since is None else records

    def priorities(self, job_ids: Sequence[str] = ()) -> list[JobPriority]:
        """Return how the priority of pending jobs is made up; see `SlurmClient.priorities`."""
        argv = ["sprio", "--noheader", f"--format={slurm_text.SPRIO_FORMAT}"]
        argv += [f"--jobs={','.join(_check_job_id(job_id) for job_id in job_ids)}"] if job_ids else []
        result = self._run(argv, environment=_QUERY_ENVIRONMENT)
        if _NO_PRIORITIES.search(result.stdout + result.stderr):
            return []
        if result.returncode != 0:
            raise slurm_error(result, timeout_s=self._timeout_s)
        return self._accept(slurm_text.parse_priorities(result.stdout), result)

    def expected_start(self, job_id: str) -> datetime | None:
        """Return when a pending job may start; see `SlurmClient.expected_start`."""
        job = self.job(job_id)
        return job.start_time if job.is_pending else None

    # Acting

    def drain(self, nodes: Sequence[str], *, reason: str) -> None:
        """Let these nodes take no new jobs; see `SlurmClient.drain`."""
        if not reason.strip() or not reason.isprintable():
            raise InputError(f"{reason!r}: a drain needs a reason of one line that an admin can act on")
        self._act(["scontrol", "update", f"NodeName={_fold_some(nodes)}", "State=DRAIN", f"Reason={reason.strip()}"])

    def resume(self, nodes: Sequence[str]) -> None:
        """Put nodes back into service; see `SlurmClient.resume`."""
        try:
            self._act(["scontrol", "update", f"NodeName={_fold_some(nodes)}", "State=RESUME"])
        except StateError:
            # Slurm refuses to resume a node that is in service, and may then leave others of the list as they were.
            out = [node for node in self.nodes(nodes) if node.states & {"DOWN", "DRAIN", "FAIL"}]
            for node in out:
                self._act(["scontrol", "update", f"NodeName={node.name}", "State=RESUME"])

    def requeue(self, job_id: str, *, hold: bool = False) -> None:
        """Send a job back to the queue; see `SlurmClient.requeue`."""
        self._act(["scontrol", "requeuehold" if hold else "requeue", _check_job_id(job_id)], may_repeat=False)

    def hold(self, job_id: str) -> None:
        """Keep a pending job from starting; see `SlurmClient.hold`."""
        self._act(["scontrol", "hold", _check_job_id(job_id)])

    def release(self, job_id: str) -> None:
        """Let a held job start; see `SlurmClient.release`."""
        self._act(["scontrol", "release", _check_job_id(job_id)])

    def update_job(self, job_id: str, **fields: str | int | datetime) -> None:
        """Change a job; see `SlurmClient.update_job`."""
        settings = []
        for name, value in fields.items():
            text = _slurm_moment(value) if isinstance(value, datetime) else str(value)
            if not _FIELD_NAME.fullmatch(name) or not text.isprintable():
                raise InputError(f"{name}={text!r}: a field of a job is a word and its value stands on one line")
            settings.append(f"{name}={text}")
        if not settings:
            raise InputError(f"job {job_id}: no field to change was given; pass one such as StartTime='now'")
        self._act(["scontrol", "update", f"JobId={_check_job_id(job_id)}", *settings])

    def cancel(
        self,
        job_ids: Sequence[str],
        *,
        signal: str | None = None,
        batch: bool = False,
        full: bool = False,
    ) -> None:
        """End jobs, or only signal them; see `SlurmClient.cancel`."""
        ids = [_check_job_id(job_id, _JOB_ID if signal is None else _STEP_ID) for job_id in job_ids]
        if not ids:  # a bare scancel with filters could end anything
            raise InputError("no job id was given; name the jobs to cancel")
        if signal is None and (batch or full):
            raise InputError("batch and full say where a signal goes; give the signal too, such as signal='USR2'")
        if signal is not None and not _SIGNAL.fullmatch(signal):
            raise InputError(f"{signal!r} is not the name or number of a signal; write it like USR2")
        options = [] if signal is None else [f"--signal={signal}"]
        options += ["--batch"] if batch else []
        options += ["--full"] if full else []
        self._act(["scancel", *options, *ids], may_repeat=signal is None)

    def submit(
        self,
        script: str | None = None,
        *,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
    ) -> str:
        """Submit a batch job; see `SlurmClient.submit`."""
        argv = ["sbatch", "--parsable", *arguments]
        self._check_configuration_file()
        try:
            # Not the environment of queries: sbatch hands its own on to the job.
            result = self._shell.run(
                argv,
                timeout_s=self._timeout_s,
                input_text=script,
                env={**self._environment, **(environment or {})},
                cwd=directory,
                check=False,
            )
        except CommandTimeout as error:
            raise CommandTimeout(
                f"{error}; the job may have been accepted all the same: look with `squeue --me` before submitting it again",
                argv=error.argv,
                timeout_s=error.timeout_s,
            ) from error
        if result.returncode != 0:
            raise slurm_error(result, timeout_s=self._timeout_s)
        # 123, or 123;cluster on a federation. Plugins may print lines before it.
        match = re.search(r"^(\d+)(?:;\S+)?\s*\Z", result.stdout, re.MULTILINE)
        if match is None:
            raise _unreadable(result, (f"no job id in {result.stdout.strip()!r} {result.stderr.strip()!r}",))
        return match.group(1)

    # How

    def _all_jobs(self) -> list[Job]:
        # 22.05 ignores every filter beside --json, so the filtering is the caller's in any case.
        return self._read(
            ["squeue", "--all", "--states=all", "--json"],
            slurm_json.parse_jobs_json,
            ["scontrol", "--all", "--oneliner", "--details", "show", "jobs"],
            slurm_text.parse_jobs_text,
        )

    def _jobs_of_id(self, job_id: str) -> list[Job]:
        """Return a job, or the elements of an array; none where Slurm knows no such job.

        From 22.05 as text: it has more than the JSON (paths of the logs, planned nodes) and is one job instead of all of them.
        """
        try:
            if self.version().release >= _SCONTROL_JSON_SINCE:
                return self._read(
                    ["scontrol", "--all", "--details", "--json", "show", "job", job_id],
                    slurm_json.parse_jobs_json,
                    ["scontrol", "--all", "--oneliner", "--details", "show", "job", job_id],
                    slurm_text.parse_jobs_text,
                )
            result = self._query(["scontrol", "--all", "--oneliner", "--details", "show", "job", job_id])
        except NotFoundError:
            return []
        jobs = self._accept(slurm_text.parse_jobs_text(result.stdout), result)
        if any(job.reason is None and job.reason_detail for job in jobs):  # the text hides the reason's name then
            reasons = {job.id: job.reason for job in self._all_jobs()}
            jobs = [job if job.reason else replace(job, reason=reasons.get(job.id)) for job in jobs]
        return jobs

    def _sacct_fields(self) -> tuple[str, ...]:
        if self._accounting_fields is None:
            known = self._query(["sacct", "--helpformat"]).stdout.lower().split()
            extra = ("Restarts",) if "restarts" in known else ()
            self._accounting_fields = (*slurm_text.SACCT_FIELDS, *extra)
        return self._accounting_fields

    def _read(
        self,
        json_argv: Sequence[str],
        parse_json: Callable[[str], Parsed[RecordT]],
        text_argv: Sequence[str],
        parse_text: Callable[[str], Parsed[RecordT]],
    ) -> list[RecordT]:
        """Ask for JSON, and for text where this build of Slurm has no JSON (it is a plugin that packagers may leave out)."""
        source = " ".join(json_argv[:2])
        if source not in self._json_refused:
            result = self._run(json_argv, environment=_QUERY_ENVIRONMENT)
            if result.returncode == 0:
                parsed = parse_json(result.stdout)
                if parsed.items or not parsed.problems:
                    return self._accept(parsed, result)
                # 22.05 ends well and says only "Unspecified error" where slurmctld is away; the text command says why.
                logger.info("%s: %s; reading text instead", json_argv[0], "; ".join(parsed.problems[:3]))
            elif not _NO_JSON.search(result.stderr):
                raise slurm_error(result, timeout_s=self._timeout_s)
            else:
                logger.debug("%s has no JSON here; reading text instead", json_argv[0])
                self._json_refused.add(source)
        result = self._query(text_argv)
        return self._accept(parse_text(result.stdout), result)

    def _accept(self, parsed: Parsed[RecordT], result: CommandResult) -> list[RecordT]:
        if parsed.problems and not parsed.items:
            raise _unreadable(result, parsed.problems)
        for problem in parsed.problems[:_MOST_PROBLEMS]:
            logger.warning("%s: %s", result.argv[0], problem)
        if len(parsed.problems) > _MOST_PROBLEMS:
            logger.warning("%s: and %d more of these", result.argv[0], len(parsed.problems) - _MOST_PROBLEMS)
        return list(parsed.items)

    def _query(self, argv: Sequence[str]) -> CommandResult:
        result = self._run(argv, environment=_QUERY_ENVIRONMENT)
        if result.returncode != 0:
            raise slurm_error(result, timeout_s=self._timeout_s)
        return result

    def _act(self, argv: Sequence[str], *, may_repeat: bool = True) -> None:
        result = self._run(argv, environment={"TZ": "UTC"}, may_repeat=may_repeat)
        if result.returncode != 0:
            raise slurm_error(result, timeout_s=self._timeout_s)

    def _run(self, argv: Sequence[str], *, environment: Mapping[str, str], may_repeat: bool = True) -> CommandResult:
        """Run a command, once more if slurmctld was too busy to answer, both within one deadline."""
        self._check_configuration_file()
        deadline_s = self._clock() + self._timeout_s
        env = {**self._environment, **environment}
        result = self._shell.run(argv, timeout_s=self._timeout_s, env=env, check=False)
        left_s = deadline_s - self._clock()
        if may_repeat and is_transient(result) and left_s > _LEAST_RETRY_S:
            logger.info("%s: slurmctld was too busy to answer; asking once more", argv[0])
            result = self._shell.run(argv, timeout_s=left_s, env=env, check=False)
        return result

    def _check_configuration_file(self) -> None:
        """Look for the file that SLURM_CONF names: Slurm's commands wait a minute for a missing one before they complain."""
        named = self._environment.get("SLURM_CONF", os.environ.get("SLURM_CONF"))
        if named and not Path(named).is_file():
            raise MissingError(
                f"SLURM_CONF={named}: there is no such file; is the cluster up? For a cluster on this machine run "
                '`muster local up`, then `eval "$(muster local env)"`'
            )


_MOST_PROBLEMS = 5
"""Most problems of one answer that are logged one by one."""

_LEAST_RETRY_S = 1.0
"""Least time that must be left of the deadline for a second try to make sense."""


def _unreadable(result: CommandResult, problems: Sequence[str]) -> SlurmError:
    said = "; ".join(problems[:3])
    return SlurmError(
        f"{shorten_command(result.argv)}: its answer cannot be read: {said}; if this is a new version of Slurm, report it",
        argv=result.argv,
        returncode=result.returncode,
        stdout=result.stdout,
        stderr=result.stderr,
    )


def _check_job_id(job_id: str, pattern: re.Pattern[str] = _JOB_ID) -> str:
    if not pattern.fullmatch(job_id):
        raise InputError(f"{job_id!r} is not the id of a job; write it like 12, or 12_3 for an element of an array")
    return job_id


def _fold_some(nodes: Sequence[str]) -> str:
    if not nodes:
        raise InputError("no node was named; name the nodes to change")
    return fold(nodes)


def _slurm_moment(moment: datetime) -> str:
    """Write a point in time as Slurm's commands take it when they run with TZ=UTC. Without a zone it is local time."""
    return moment.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")
