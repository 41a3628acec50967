"""`SlurmClient`: the only place that spells a Slurm command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Protocol

from cluster.slurm_records import (
    AccountingRecord,
    ControllerStatus,
    Job,
    JobPriority,
    Node,
    Partition,
    SlurmVersion,
)


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
        """Put drained or down nodes back into service."""

    def requeue(self, job_id: str, *, hold: bool = False) -> None:
        """Send a job back to the queue: its tasks get TERM and KILL, its id stays. With `hold` it waits for `release`."""

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
        """End jobs, or with `signal` (such as `USR2`) only signal them.

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
