"""The real trainer on real Slurm: whatever happens to it, its losses are those of a run to which nothing happened, to the bit.

Shapes of preemption and failure are tried one by one with a light stand-in in `test_lifecycle_shapes.py`; damage to checkpoints and full
disks with the trainer alone in `tests/jobs/test_train.py`. Here everything is real and put together: submission, two nodes,
the trainer, Slurm's own kill and requeue.
"""

from __future__ import annotations

import io
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cluster.local import LocalCluster
from cluster.settings import load_spec
from cluster.slurm import SlurmCliClient
from jobs.attempts import EndReason
from jobs.demo_report import count_run_samples, run_lineage
from jobs.jobspec import JobSpec, make_job
from jobs.journal import RunDirectory
from jobs.shards import new_shard, shard_name
from jobs.submit import Launcher

pytestmark = [pytest.mark.daemons, pytest.mark.training, pytest.mark.timeout(900)]

PICTURES = 50
KEYS = [f"p{number:02d}" for number in range(PICTURES)]
BATCH = 8
STEPS = 400


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard of small noisy pictures."""
    directory = tmp_path_factory.mktemp("survive-shards")
    noise = np.random.default_rng(0)
    with new_shard(directory / shard_name(0)) as writer:
        for key in KEYS:
            buffer = io.BytesIO()
            Image.fromarray(noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
            writer.add(key, image=buffer.getvalue(), extension="png", caption=key)
    return directory


class Range:
    """A cluster, and runs of the trainer on it."""

    def __init__(self, cluster: LocalCluster, shards: Path, folder: Path) -> None:
        self.cluster = cluster
        self.shards = shards
        self.folder = folder
        environment = {
            key: value for key, value in os.environ.items() if not key.startswith(("SBATCH_", "SLURM_", "MUSTER_"))
        }
        environment |= cluster.environment()
        self.slurm = SlurmCliClient(environment=environment)
        spec = load_spec(Path(cluster.environment()["MUSTER_CLUSTER"]))
        self.launcher = Launcher(spec, self.slurm, runs=folder, environment=environment)

    def train(self, name: str, *, queue: str = "low", steps: int = STEPS, **changes: Any) -> tuple[str, Path]:
        """Submit the trainer on two nodes; returns the job's id and the run directory."""
        spec = job(name, queue, self.shards, self.folder / name, steps, **changes)
        return str(self.launcher.submit(spec).job_id), self.folder / name

    def urgent(self, *, seconds: float = 0.5, nodes: int = 4) -> str:
        """Submit a high-priority job that needs every node whole."""
        return self.slurm.submit(
            f"#!/bin/bash\nsleep {seconds}\n",
            arguments=["--partition=high", f"--nodes={nodes}", "--exclusive", "--output=/dev/null"],
            directory=self.folder,
        )

    def wait(self, condition: Callable[[], Any], what: str, *, timeout_s: float = 240.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}\n{self.logs()}"
            time.sleep(0.1)

    def logs(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in self.folder.glob("*/slurm/*_0_log.out"))

    def wait_until_completed(self, job_id: str) -> None:
        self.wait(lambda: self.slurm.job(job_id).is_ended, f"job {job_id} to end", timeout_s=500)
        assert self.slurm.job(job_id).state == "COMPLETED"

    def is_running_again(self, job_id: str, restarts: int) -> bool:
        """Whether the job runs for this many times and one."""
        job = self.slurm.job(job_id)
        return job.state == "RUNNING" and job.restarts == restarts

    def is_training(self, run: Path, restarts: int) -> bool:
        """Whether the attempt after this many restarts has put a step on record."""
        numbers = {attempt.number for attempt in RunDirectory(run).attempts() if attempt.restart_count == restarts}
        return bool(numbers & {int(record["attempt"]) for record in run_lineage(run).values()})

    def end(self) -> None:
        live = [job.id for job in self.slurm.jobs() if not job.is_ended]
        if live:
            self.slurm.cancel(live)
        self.wait(lambda: all(job.is_ended for job in self.slurm.jobs()), "the cluster to be idle")


def job(name: str, queue: str, shards: Path, run: Path, steps: int, **changes: Any) -> JobSpec:
    config: dict[str, Any] = {
        "data": {"directory": str(shards)},
        "steps": steps,
        "batch_size": BATCH,
        "threads": 1,
        "model": {
            "channels": [8, 16],
            "layers_per_block": 1,
            "norm_groups": 4,
            "attention_head_channels": 8,
            "dropout": 0.1,
        },
        "schedule": {"warmup_steps": 3},
        "checkpoint": {"every_steps": 1000, "keep": 3},
        "sampling": {"count": 2, "inference_steps": 2},
        "trackers": [],
        "record_samples": True,
        **changes.pop("config", {}),
    }
    values = {
        "name": name,
        "queue": queue,
        "nodes": 2,
        "gpus_per_node": 1,
        "cpus_per_task": 1,
        "memory_gb": 2,
        "entry": "jobs.train",
    }
    return make_job({**values, "run_directory": str(run), "config": config, **changes})


@pytest.fixture
def field(local_cluster: LocalCluster, shards: Path, tmp_path: Path) -> Iterator[Range]:
    where = Range(local_cluster, shards, tmp_path)
    yield where
    where.end()


@pytest.fixture(scope="module")
def straight(local_cluster: LocalCluster, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Losses of a run on two nodes that nothing ever happened to, from step 0."""
    where = Range(local_cluster, shards, tmp_path_factory.mktemp("straight"))
    job_id, run = where.train("straight", queue="high")
    where.wait_until_completed(job_id)
    assert [attempt.reason for attempt in RunDirectory(run).attempts()] == [EndReason.FINISHED]
    losses = losses_of(run)
    assert list(losses) == list(range(STEPS))
    return losses


def losses_of(run: Path) -> dict[int, str]:
    """Step -> the loss that counts, with every bit."""
    return {step: str(record["loss_hex"]) for step, record in run_lineage(run).items()}


def nothing_lost(run: Path, straight: dict[int, str]) -> None:
    """Assert that a run has the losses of the straight one, and saw each sample when it was due."""
    assert losses_of(run) == straight
    counted = count_run_samples(run, keys=KEYS, batch_size=BATCH)
    assert (counted.steps, counted.seen, counted.repeated, counted.missed) == (STEPS, STEPS * BATCH, 0, 0)


def test_preempted_five_times_at_random_moments(field: Range, straight: dict[int, str]) -> None:
    """Taken off its nodes five times, during start-up or at any step, it ends with the very losses of an uninterrupted run."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"moments drawn with seed {seed}")
    moments = random.Random(seed)
    job_id, run = field.train("hunted")
    for restarts in range(5):
        field.wait(lambda restarts=restarts: field.is_running_again(job_id, restarts), f"attempt {restarts + 1} to run")
        if restarts % 2:  # while it starts: imports, rendezvous, loading
            time.sleep(moments.uniform(0, 5))
        else:  # while it trains
            field.wait(lambda restarts=restarts: field.is_training(run, restarts), f"a step of attempt {restarts + 1}")
            time.sleep(moments.uniform(0, 0.6))
        assert not field.slurm.job(job_id).is_ended, "it finished before it could be preempted five times: raise STEPS"
        urgent = field.urgent()
        field.wait(lambda urgent=urgent: field.slurm.job(urgent).is_ended, "the urgent job to be done")
        assert field.slurm.job(urgent).state == "COMPLETED"
    field.wait_until_completed(job_id)
    assert (field.slurm.job(job_id).restarts or 0) == 5
    reasons = [attempt.reason for attempt in RunDirectory(run).attempts()]
    assert reasons.count(EndReason.PREEMPTED) >= 3
    assert reasons[-1] is EndReason.FINISHED
    nothing_lost(run, straight)


def test_a_power_cut_in_the_middle_of_saving(field: Range, straight: dict[int, str]) -> None:
    """A node dies while checkpoints are written at every step: the run goes on on another node, from a whole one."""
    job_id, run = field.train("powerless", config={"checkpoint": {"every_steps": 1, "keep": 3}})
    field.wait(lambda: len(losses_of(run)) >= 30, "thirty steps")
    lost = field.slurm.job(job_id).nodes[1]
    field.cluster.power_off(lost)
    try:
        field.wait_until_completed(job_id)
        attempts = RunDirectory(run).attempts()
        assert len(attempts) >= 2
        assert lost in attempts[0].nodes
        assert lost not in attempts[-1].nodes
        assert attempts[1].first_step >= 29  # at most the step that was under way is done again
        nothing_lost(run, straight)
    finally:
        field.cluster.power_on(lost)
        time.sleep(2)  # Slurm compares boot times by the second
        field.slurm.resume([lost])
        field.wait(lambda: field.slurm.node(lost).is_usable, f"{lost} to be back in service")


def test_slurmd_killed_mid_step(field: Range, straight: dict[int, str]) -> None:
    """A node whose slurmd is gone is given up by Slurm although the ranks on it still run; those cannot disturb the next attempt."""
    job_id, run = field.train("headless", config={"checkpoint": {"every_steps": 10, "keep": 3}})
    field.wait(lambda: len(losses_of(run)) >= 20, "twenty steps")
    lost = field.slurm.job(job_id).nodes[1]
    field.cluster.stop_slurmd(lost, 9)
    try:
        field.wait_until_completed(job_id)
        nothing_lost(run, straight)
    finally:
        field.cluster.start_slurmd(lost)
        field.wait(
            lambda: "DOWN" not in field.slurm.node(lost).states or field.slurm.resume([lost]), f"{lost} to be back"
        )
        field.wait(lambda: field.slurm.node(lost).is_usable, f"{lost} to be usable")


@pytest.mark.parametrize(("mode", "grace"), [("cancel", "0"), ("cancel", "20s"), ("requeue", "0")])
def test_other_shapes_of_preemption(
    make_cluster: Callable[..., LocalCluster],
    shards: Path,
    tmp_path: Path,
    straight: dict[int, str],
    mode: str,
    grace: str,
) -> None:
    """Cancelled instead of requeued, with time to save and without, the trainer still comes back and ends the same to the bit."""
    low = {"name": "low", "pools": ["gpu"], "tier": 10, "preemption": mode, "grace": grace, "default": True}
    cluster = make_cluster(nodes=2, queues=[{"name": "high", "pools": ["gpu"], "tier": 100}, low])
    field = Range(cluster, shards, tmp_path)
    job_id, run = field.train("shaped")
    field.wait(lambda: field.is_training(run, 0), "a step")
    urgent = field.urgent(nodes=2)
    field.wait_until_completed(urgent)
    field.wait_until_completed(job_id)
    assert [attempt.reason for attempt in RunDirectory(run).attempts()] == [EndReason.PREEMPTED, EndReason.FINISHED]
    nothing_lost(run, straight)


def test_a_disk_that_is_full_for_a_while(
    make_cluster: Callable[..., LocalCluster], shards: Path, tmp_path: Path, straight: dict[int, str]
) -> None:
    """Saves fail on a full file system, training goes on, and once there is room again nothing is missing."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64M", "tmpfs", str(disk)], check=True, timeout=30)
    try:
        field = Range(make_cluster(nodes=2), shards, disk)  # its nodes see the mount: they start after it
        job_id, run = field.train("crowded", config={"checkpoint": {"every_steps": 10, "keep": 3}})
        field.wait(lambda: len(losses_of(run)) >= 25, "twenty-five steps")
        fill(disk / "ballast")
        filled_at = newest_checkpoint(run)
        time.sleep(4)
        assert newest_checkpoint(run) <= filled_at + 10  # one may have been under way
        assert field.slurm.job(job_id).is_running, "training stopped although only periodic saves failed"
        (disk / "ballast").unlink()
        field.wait_until_completed(job_id)
        attempts = RunDirectory(run).attempts()
        assert [attempt.reason for attempt in attempts] == [EndReason.FINISHED], attempts
        nothing_lost(run, straight)
        field.cluster.down()
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True, timeout=30)


def fill(path: Path) -> None:
    """Write until the file system is full."""

    def write_for_ever() -> None:
        with path.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    with pytest.raises(OSError, match="No space left"):
        write_for_ever()


def newest_checkpoint(run: Path) -> int:
    """Step of the newest committed checkpoint; 0 if there is none."""
    return max((int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*")), default=0)
