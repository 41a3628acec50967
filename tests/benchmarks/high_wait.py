"""High job submitted -> running, while a low job holds its nodes, on a cluster whose low queue has a grace time.

Slurm gives a preempted job the whole grace time, whether it uses it or not: the nodes are free when the job leaves. Muster's
trainer saves and leaves. The others are what a low queue is otherwise full of.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

from jobs.records import read_json_lines
from tests.benchmarks.clusters import BenchCluster, demo_spec, running_cluster, wait_until
from tests.benchmarks.comparison import FORGOTTEN, Case
from tests.benchmarks.pictures import make_pictures
from tests.benchmarks.results import Result
from tests.benchmarks.step_cpu import MILLION

GRACE_S = 15
KILL_WAIT_S = 5
"""Slurm's own default is 30 s. The shorter it is, the better for scripts that ignore signals."""
_STEPS_BEFORE = 3
_RUNS_FOR_S = 3.0
_START_S = 240.0


@dataclass(frozen=True)
class Other:
    """A low job to compare with."""

    is_what: str
    lines: list[str]


OTHERS = (
    Other(
        "plain Slurm, a script that ignores signals",
        ["srun bash -c 'trap \"\" TERM CONT; while true; do sleep 1; done'"],
    ),
    Other("plain Slurm, a script with no handler", ["srun sleep 600"]),
)


def measure(*, rounds: int = 3, rounds_of_others: int = 2, grace_s: int = GRACE_S) -> list[Result]:
    """Preempt each kind of low job several times, on one cluster."""
    spec = demo_spec(low={"grace": f"{grace_s}s"}, scheduling={"kill_wait": f"{KILL_WAIT_S}s"})
    with running_cluster("bench", spec) as cluster:
        waits, fates = [], []
        for other in OTHERS:
            found = [_preempt_script(cluster, other) for _ in range(rounds_of_others)]
            waits.append([wait_s for wait_s, _ in found])
            fates.append(found[-1][1])
        ours, step_s = _preempt_trainer(cluster, rounds)
    return [
        Result(
            name="high_wait",
            ours=median(ours),
            other=median(wait),
            other_is=other.is_what,
            unit="s",
            ratio=median(ours) / median(wait),
            note=f"grace {grace_s} s; ours {_range(ours)} (steps of {step_s:.1f} s) and back each time, "
            f"other {_range(wait)} and then {fate}",
        )
        for other, wait, fate in zip(OTHERS, waits, fates, strict=True)
    ]


def _preempt_trainer(cluster: BenchCluster, rounds: int) -> tuple[list[float], float]:
    """Let one training be preempted again and again, each time once it is back at work.

    Returns:
        The waits, and how long a step takes: the trainer finishes the one it is in, and one more, before it saves.
    """
    pictures = make_pictures(cluster.directory, count=256)
    case = Case(pictures=pictures, model=MILLION, batch_size=32, steps=FORGOTTEN, threads=1)
    run = cluster.directory / "runs" / "train"
    job_id = cluster.launch(training_job("train", case, run))
    waits = []
    for number in range(rounds):
        wait_until(in_attempt(run, number + 1, _STEPS_BEFORE), f"attempt {number + 1} trains", timeout_s=_START_S)
        waits.append(cluster.run_high())
    wait_until(in_attempt(run, rounds + 1, 1), "training is back after the last high job", timeout_s=_START_S)
    cluster.wait_gone(job_id)
    return waits, _step_s(run)


def _preempt_script(cluster: BenchCluster, other: Other) -> tuple[float, str]:
    """Preempt a job of plain Slurm; returns the wait, and what has become of the job."""
    job_id = cluster.sbatch("low", other.lines, "--partition=low", "--nodes=2", "--gpus-per-node=1", "--requeue")
    wait_until(lambda: cluster.slurm.job(job_id).state == "RUNNING", f"job {job_id} runs", timeout_s=60)
    time.sleep(_RUNS_FOR_S)
    waited_s = cluster.run_high()
    job = cluster.slurm.job(job_id)
    fate = "waits for its next attempt" if job.is_pending or job.is_running else f"is lost ({job.state})"
    if not job.is_ended:
        cluster.wait_gone(job_id)
    return waited_s, fate


def training_job(name: str, case: Case, run: Path, *, nodes: int = 2) -> dict[str, object]:
    """Return the job that trains `case` in the low queue, one rank a node, as a job file would have it."""
    config = {key: value for key, value in case.ours(run).items() if key != "run_directory"}
    return {
        "name": name,
        "queue": "low",
        "nodes": nodes,
        "gpus_per_node": 1,
        "cpus_per_task": 1,
        "entry": "jobs.train",
        "run_directory": str(run),
        "config": config,
    }


def in_attempt(run: Path, attempt: int, steps: int) -> Callable[[], bool]:
    """Return a question: has this attempt (or a later one) of a run done so many steps?"""

    def is_so() -> bool:
        done = [record for record in read_json_lines(run / "metrics.jsonl") if record["attempt"] >= attempt]
        return len(done) >= steps

    return is_so


def _step_s(run: Path) -> float:
    """Return the median time between two steps of the same attempt."""
    records = list(read_json_lines(run / "metrics.jsonl"))
    return median(
        float(later["time"]) - float(earlier["time"])
        for earlier, later in pairwise(records)
        if earlier["attempt"] == later["attempt"]
    )


def _range(values: list[float]) -> str:
    return f"{min(values):.1f}-{max(values):.1f} s"
