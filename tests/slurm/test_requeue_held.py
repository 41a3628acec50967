"""A job that puts itself on hold, as one does whose disk is full, stays there whatever it then exits with."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.local import LocalCluster
from cluster.slurm import SlurmCliClient

pytestmark = pytest.mark.daemons

SCRIPT = """#!/bin/bash
echo run >> "$1"
[ "$(wc -l < "$1")" -gt 1 ] && exit 0
trap '' TERM
scontrol requeuehold "$SLURM_JOB_ID"
exit 75
"""


def test_a_job_held_by_itself_waits_for_a_person(make_cluster: Callable[..., LocalCluster], tmp_path: Path) -> None:
    """`scontrol requeuehold`, then exit code 75: RequeueExit does not lift the hold; a release does."""
    cluster = make_cluster(nodes=1)
    slurm = SlurmCliClient(environment=cluster.environment())
    runs = tmp_path / "runs"
    script = SCRIPT.replace('"$1"', f"'{runs}'")
    job_id = slurm.submit(script, arguments=["--requeue", "--output=/dev/null"], directory=tmp_path)
    deadline = time.monotonic() + 60
    while not slurm.job(job_id).is_held and time.monotonic() < deadline:
        time.sleep(0.5)
    time.sleep(12)  # longer than the requeue hold of a test cluster
    job = slurm.job(job_id)
    assert job.is_held, (job.state, job.reason)
    assert runs.read_text().splitlines() == ["run"]
    slurm.release(job_id)
    while len(runs.read_text().splitlines()) < 2 and time.monotonic() < deadline + 60:
        time.sleep(0.5)
    assert runs.read_text().splitlines() == ["run", "run"]
