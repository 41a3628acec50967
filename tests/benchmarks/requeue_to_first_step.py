"""End of a preempted attempt -> end of the next attempt's first step.

Two clusters that differ in one setting only: how long Slurm holds a requeued job (`cred_expire`): what Muster's local
description asks for, and Slurm's default. On each, Muster's trainer and the plain loop train side by side in the low queue
until one high job takes all nodes for a moment. The low queue has no grace time here, as with one the plain loop would not come
back at all (see `high_wait`).
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from jobs.records import read_json_lines
from tests.benchmarks.clusters import BenchCluster, demo_spec, running_cluster, wait_until
from tests.benchmarks.comparison import FORGOTTEN, Case, plain_command
from tests.benchmarks.high_wait import in_attempt, training_job
from tests.benchmarks.pictures import make_pictures
from tests.benchmarks.results import Result
from tests.benchmarks.step_cpu import MILLION

DEFAULT_HOLD_S = 120
"""slurm.conf(5): cred_expire of AuthInfo."""
_START_S = 300.0


@dataclass(frozen=True)
class Gaps:
    """Seconds without work, on one cluster."""

    ours_s: float
    plain_s: float


def measure(*, default_hold_s: int = DEFAULT_HOLD_S) -> list[Result]:
    """Measure both trainers on both clusters."""
    with_default = _measure_on(default_hold_s)
    with_ours = _measure_on(None)
    held = f"the plain loop, {default_hold_s} s hold"
    resolution = "no grace; ends by Slurm's accounting, which counts whole seconds"
    return [
        _result("Muster's cluster", with_ours.ours_s, with_default.plain_s, held, note=resolution),
        _result(
            f"cluster with Slurm's {default_hold_s} s hold",
            with_default.ours_s,
            with_default.plain_s,
            held,
            note="the trainer lifts the hold by itself",
        ),
        _result(
            "the plain loop on Muster's cluster",
            with_ours.plain_s,
            with_default.plain_s,
            held,
            note="what the setting alone gives to jobs that are not Muster's",
        ),
    ]


def _measure_on(hold_s: int | None) -> Gaps:
    scheduling = {} if hold_s is None else {"requeue_hold": f"{hold_s}s"}
    with running_cluster("bench", demo_spec(low={"grace": "0s"}, scheduling=scheduling)) as cluster:
        pictures = make_pictures(cluster.directory, count=256)
        case = Case(pictures=pictures, model=MILLION, batch_size=32, steps=FORGOTTEN, threads=1)
        ours, plain = cluster.directory / "runs" / "train", cluster.directory / "plain"
        job_ours = cluster.launch(training_job("train", case, ours, nodes=1))
        job_plain = _start_plain(cluster, case, plain)
        for run in (ours, plain):
            wait_until(in_attempt(run, 1, 2), f"{run.name} trains", timeout_s=_START_S)
        cluster.run_high()
        wait_until(in_attempt(ours, 2, 1), "Muster's trainer is back", timeout_s=_START_S)
        gap_ours_s = _gap(cluster, job_ours, ours)
        cluster.wait_gone(
            job_ours
        )  # the plain loop is to have the machine to itself, as ours has it while that one is held
        wait_until(in_attempt(plain, 2, 1), "the plain loop is back", timeout_s=_START_S)
        gap_plain_s = _gap(cluster, job_plain, plain)
        cluster.wait_gone(job_plain)
    return Gaps(gap_ours_s, gap_plain_s)


def _start_plain(cluster: BenchCluster, case: Case, output: Path) -> str:
    return cluster.sbatch(
        "plain",
        [f"srun --cpus-per-task=1 {shlex.join(plain_command(case.plain(output, record=True)))}"],
        "--partition=low",
        "--nodes=1",
        "--gpus-per-node=1",
        "--requeue",
        "--open-mode=append",
    )


def _gap(cluster: BenchCluster, job_id: str, run: Path) -> float:
    first = min(record["time"] for record in read_json_lines(run / "metrics.jsonl") if record["attempt"] == 2)
    return float(first) - cluster.end_of_attempt(job_id)


def _result(where: str, ours: float, other: float, other_is: str, *, note: str) -> Result:
    return Result(
        name=f"requeue_to_first_step: {where}",
        ours=ours,
        other=other,
        other_is=other_is,
        unit="s",
        ratio=ours / other,
        note=note,
    )
