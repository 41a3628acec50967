"""Clusters for benchmarks: brought up for one entry, with its settings, and gone after it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.errors import OutsideError
from cluster.local import LocalCluster
from cluster.settings import ClusterSpec, load_spec
from cluster.slurm import SlurmCliClient
from tests.benchmarks.comparison import REPOSITORY
from tests.benchmarks.scratch import CLUSTERS, scratch

LOCAL_DEMO = REPOSITORY / "templates" / "cluster" / "local-demo.yaml"
_POLL_S = 0.2
_MARKER_POLL_S = 0.01


def demo_spec(
    *, nodes: int | None = None, low: Mapping[str, Any] | None = None, scheduling: Mapping[str, Any] | None = None
) -> ClusterSpec:
    """Return the local demo's description with some values changed: of the only pool, of queue `low`, of `scheduling`."""
    plain = load_spec(LOCAL_DEMO).model_dump(mode="python")
    plain["pools"][0].update({} if nodes is None else {"nodes": nodes})
    next(queue for queue in plain["queues"] if queue["name"] == "low").update(low or {})
    plain["scheduling"].update(scheduling or {})
    return ClusterSpec.model_validate(plain)


class BenchCluster:
    """A running cluster, and what the benchmarks do on it."""

    def __init__(self, cluster: LocalCluster, spec: ClusterSpec, directory: Path) -> None:
        self.cluster = cluster
        self.spec = spec
        self.directory = directory
        self.environment = {**os.environ, **cluster.environment()}
        self.slurm = SlurmCliClient(environment=cluster.environment())
        self._high_jobs = 0

    def launch(self, values: Mapping[str, Any]) -> str:
        """Submit a job as `muster submit` does; returns its id."""
        from jobs.jobspec import make_job
        from jobs.submit import Launcher

        launcher = Launcher(self.spec, self.slurm, runs=self.directory / "runs", environment=self.environment)
        return str(launcher.submit(make_job(values)).job_id)

    def sbatch(self, name: str, lines: list[str], *options: str) -> str:
        """Submit a script the way people do without Muster; returns the job's id. Its log is `NAME.log`."""
        script = "\n".join(["#!/bin/bash", *lines, ""])
        arguments = [
            f"--job-name={name}",
            f"--output={self.directory / name}.log",
            f"--account={self.spec.projects[0].name}",
            *options,
        ]
        return self.slurm.submit(script, arguments=arguments, directory=REPOSITORY)

    def run_high(self) -> float:
        """Let a job of the high queue take every GPU, for a moment; returns the seconds from its submission until it ran."""
        self._high_jobs += 1
        pool = self.spec.pools[0]
        marker = self.directory / f"high-{self._high_jobs}"
        submitted = time.time()
        job_id = self.sbatch(
            f"high-job-{self._high_jobs}",
            [f"date +%s.%N > {marker}.new && mv {marker}.new {marker}"],
            "--partition=high",
            f"--nodes={pool.nodes}",
            f"--gpus-per-node={pool.gpus_per_node}",
        )
        wait_until(marker.exists, f"high job {job_id} runs", timeout_s=180, poll_s=_MARKER_POLL_S)
        self.wait_ended(job_id)
        return float(marker.read_text(encoding="utf-8")) - submitted

    def wait_ended(self, job_id: str, timeout_s: float = 120) -> str:
        """Wait until a job has ended; returns its state."""
        wait_until(lambda: self.slurm.job(job_id).is_ended, f"job {job_id} ends", timeout_s=timeout_s)
        return self.slurm.job(job_id).state

    def wait_gone(self, job_id: str) -> None:
        """Cancel a job and wait until it holds nothing any more."""
        self.slurm.cancel([job_id])
        self.wait_ended(job_id)

    def end_of_attempt(self, job_id: str, number: int = 0) -> float:
        """Return when an attempt of a job ended, by Slurm's accounting, in seconds since 1970; whole seconds."""

        def ends() -> list[float]:
            records = [record for record in self.slurm.accounting(job_ids=[job_id]) if record.step is None]
            return [record.end_time.timestamp() for record in records if record.end_time is not None]

        wait_until(lambda: len(ends()) > number, f"accounting knows the end of job {job_id}", timeout_s=60)
        return ends()[number]


@contextmanager
def running_cluster(name: str, spec: ClusterSpec) -> Iterator[BenchCluster]:
    """Have a cluster for as long as the block runs; `scratch` takes it down."""
    with scratch() as directory:
        cluster = LocalCluster(name, root=directory / CLUSTERS)
        cluster.up(spec)
        yield BenchCluster(cluster, spec, directory)


def wait_until(is_so: Callable[[], bool], what: str, *, timeout_s: float, poll_s: float = _POLL_S) -> None:
    """Look until `is_so`.

    Raises:
        OutsideError: The time is over.
    """
    deadline = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > deadline:
            raise OutsideError(f"waited {timeout_s:.0f} s in vain until {what}")
        time.sleep(poll_s)
