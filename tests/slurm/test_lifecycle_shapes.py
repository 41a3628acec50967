"""A job's life on real Slurm: every shape of preemption, limits, cancels, crashes and lost nodes, with a stand-in trainer.

`pytest -m daemons tests/slurm/test_lifecycle_shapes.py -s` prints the figures of docs/preemption.md.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import pytest

from cluster.local import LocalCluster
from cluster.settings import ClusterSpec, load_spec
from cluster.slurm import SlurmCliClient
from cluster.slurm_records import Job
from jobs.attempts import AttemptRecord, EndReason, failures_without_progress
from jobs.journal import RunDirectory

pytestmark = [pytest.mark.daemons, pytest.mark.timeout(600)]

STANDIN = Path(__file__).parent / "standin_trainer.py"
LOCAL_DEMO = Path(__file__).parents[2] / "templates" / "cluster" / "local-demo.yaml"
HOLD_S = 60
"""Requeue hold of the clusters here: a job that is back sooner has had it lifted."""
GRACE_S = 20
KILL_WAIT_S = 20


class Lab:
    """A cluster with one queue for each shape of preemption, and the jobs that a test runs on it."""

    def __init__(self, cluster: LocalCluster, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self.slurm = SlurmCliClient(environment=cluster.environment())
        self.submitted: list[str] = []

    def submit(
        self, name: str, *, queue: str, steps: int = 3000, modes: Sequence[str] = (), options: Sequence[str] = ()
    ) -> Trial:
        """Submit a stand-in trainer of two ranks."""
        run = RunDirectory(self.folder / name)
        run.path.mkdir(parents=True)
        train = shlex.join([sys.executable, str(STANDIN), str(run.path), str(steps), *modes])
        settle = shlex.join([sys.executable, "-m", "jobs.requeue", "--run-directory", str(run.path), "--retries", "2"])
        script = f'#!/bin/bash\nsrun --kill-on-bad-exit=1 {train}\nstatus=$?\n{settle} --status "$status"\n'
        job_id = self.slurm.submit(
            script,
            arguments=[
                f"--partition={queue}", f"--job-name={name}", "--requeue", "--open-mode=append", "--ntasks=2",
                "--cpus-per-task=1", "--mem=1G", f"--output={run.path}/log", *options,
            ],
            directory=self.folder,
        )  # fmt: skip
        self.submitted.append(job_id)
        return Trial(self, job_id, run)

    def submit_high(self, nodes: int = 4, *, seconds: float = 1.0) -> str:
        """Submit a job of the high queue that needs whole nodes."""
        job_id = self.slurm.submit(
            f"#!/bin/bash\nsleep {seconds}\n",
            arguments=["--partition=high", f"--nodes={nodes}", "--exclusive", "--output=/dev/null"],
            directory=self.folder,
        )
        self.submitted.append(job_id)
        return job_id

    def end(self) -> None:
        """Cancel what is left and wait until the nodes are free."""
        self.slurm.cancel(self.submitted)
        wait_for(lambda: all(not self.slurm.job(job).is_running for job in self.submitted), 60, "the jobs to be gone")


class Trial:
    """One stand-in trainer: its job and its run."""

    def __init__(self, lab: Lab, job_id: str, run: RunDirectory) -> None:
        self.lab = lab
        self.job_id = job_id
        self.run = run

    @property
    def job(self) -> Job:
        return self.lab.slurm.job(self.job_id)

    @property
    def attempts(self) -> list[AttemptRecord]:
        return self.run.attempts()

    @property
    def log(self) -> str:
        path = self.run.path / "log"
        return path.read_text() if path.exists() else ""

    def wait_until_at_work(self, attempt: int = 1, timeout_s: float = 90) -> None:
        """Wait until that attempt has committed something new."""

        def at_work() -> bool:
            attempts = self.attempts
            return len(attempts) >= attempt and attempts[attempt - 1].made_progress

        wait_for(at_work, timeout_s, f"attempt {attempt} of job {self.job_id} to save", lambda: self.log)

    def wait_until_ended(self, timeout_s: float = 120) -> Job:
        wait_for(lambda: self.job.is_ended, timeout_s, f"job {self.job_id} to end", lambda: self.log)
        return self.job


def wait_for(condition: Callable[[], bool], timeout_s: float, what: str, log: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}\n{log()}"
        time.sleep(0.2)


def seconds_between(earlier: AttemptRecord, later: AttemptRecord) -> float:
    assert earlier.ended is not None
    assert later.started is not None
    return (later.started - earlier.ended).total_seconds()


def bring_back(lab: Lab, node: str) -> None:
    """Boot a node and put it into service again: Slurm keeps one that was rebooted unexpectedly out until somebody says so."""
    lab.cluster.power_on(node)
    time.sleep(2)
    lab.slurm.resume([node])
    wait_for(lambda: lab.slurm.node(node).is_usable, 60, f"{node} to come back")


def spec_of_shapes(*, user_signal: bool) -> ClusterSpec:
    """local-demo with a low queue for each preemption mode, with and without grace, and a long requeue hold."""
    spec = load_spec(LOCAL_DEMO).model_dump()
    low = {"pools": ("gpu",), "tier": 10}
    spec["queues"] = [
        {"name": "high", "pools": ("gpu",), "tier": 100},
        {**low, "name": "requeue-now", "preemption": "requeue", "default": True},
        {**low, "name": "requeue-grace", "preemption": "requeue", "grace": timedelta(seconds=GRACE_S)},
        {**low, "name": "cancel-now", "preemption": "cancel"},
        {**low, "name": "cancel-grace", "preemption": "cancel", "grace": timedelta(seconds=GRACE_S)},
    ]
    spec["scheduling"] |= {
        "kill_wait": timedelta(seconds=KILL_WAIT_S),
        "requeue_hold": timedelta(seconds=HOLD_S),
        "user_signal_on_preemption": user_signal,
    }
    return ClusterSpec.model_validate(spec)


SHAPES = ("requeue-now", "requeue-grace", "cancel-now", "cancel-grace")


@pytest.fixture(scope="module", params=[False, True], ids=["sends-term", "sends-user-signal"])
def shapes_cluster(
    request: pytest.FixtureRequest, local_cluster: LocalCluster, cluster_root: Path
) -> Iterator[LocalCluster]:
    """A cluster per value of preempt_send_user_signal. (`local_cluster` is asked for so that its skips hold here too.)"""
    cluster = LocalCluster(f"shapes-{os.getpid()}-{int(request.param)}", root=cluster_root)
    cluster.up(spec_of_shapes(user_signal=request.param))
    yield cluster
    cluster.down()


@pytest.fixture
def lab(shapes_cluster: LocalCluster, tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(shapes_cluster, tmp_path)
    yield lab
    lab.end()


@pytest.fixture
def plain_lab(local_cluster: LocalCluster, tmp_path: Path) -> Iterator[Lab]:
    """The session's cluster: grace 30 s, a hold of 5 s, nodes that are given up after 20 s."""
    lab = Lab(local_cluster, tmp_path)
    yield lab
    lab.end()


@pytest.mark.parametrize("warning", [(), ("--signal=USR2@60",)], ids=["no-signal", "signal"])
def test_every_shape_of_preemption_comes_back(lab: Lab, warning: tuple[str, ...]) -> None:
    """REQUEUE and CANCEL, with and without grace, with and without --signal: saved, out of the way within seconds, back
    before Slurm's hold is over, at the very step where it stopped."""
    trials = {
        queue: lab.submit(queue, queue=queue, options=[*warning, f"--nodelist=gpu-{number}"])
        for number, queue in enumerate(SHAPES, start=1)
    }
    for trial in trials.values():
        trial.wait_until_at_work()
    submitted = time.time()
    high = lab.submit_high()
    wait_for(
        lambda: lab.slurm.job(high).start_time is not None and not lab.slurm.job(high).is_pending, 60, "the high job"
    )
    started = lab.slurm.job(high).start_time
    assert started is not None
    for trial in trials.values():
        trial.wait_until_at_work(attempt=2)
    for queue, trial in trials.items():
        first, second = trial.attempts[:2]
        print(f"{queue:14} {' '.join(warning):17} high job waits {started.timestamp() - submitted:4.1f} s, "
              f"saved -> at work again {seconds_between(first, second):4.1f} s")  # fmt: skip
        assert first.reason is EndReason.PREEMPTED, trial.log
        assert second.first_step == first.last_step == first.committed_step
        assert first.seconds_lost == 0
        assert trial.job.restarts == 1
        assert seconds_between(first, second) < HOLD_S - 10
    assert started.timestamp() - submitted < 15  # the grace alone would be 20 s


def test_a_cancelled_job_stays_cancelled(lab: Lab) -> None:
    """scancel looks like a preemption from inside (TERM); the trainer saves, and nothing brings the job back."""
    trial = lab.submit("cancelled", queue="requeue-grace")
    trial.wait_until_at_work()
    lab.slurm.cancel([trial.job_id])
    job = trial.wait_until_ended(60)
    time.sleep(3)
    assert (job.state, trial.job.state, trial.job.restarts) == ("CANCELLED", "CANCELLED", 0)
    (attempt,) = trial.attempts
    assert attempt.reason is EndReason.CANCELLED
    assert attempt.seconds_lost == 0


def test_a_requeue_and_a_signal_by_hand_lose_nothing(lab: Lab) -> None:
    """`scontrol requeue` and `scancel --signal=USR2` by a person: both save and come back, and are told apart."""
    requeued = lab.submit("requeued", queue="requeue-grace")
    signalled = lab.submit("signalled", queue="cancel-now")
    requeued.wait_until_at_work()
    signalled.wait_until_at_work()
    lab.slurm.requeue(requeued.job_id)
    lab.slurm.cancel([signalled.job_id], signal="USR2")
    for trial, reason in ((requeued, EndReason.REQUEUED), (signalled, EndReason.SIGNALLED)):
        trial.wait_until_at_work(attempt=2)
        first, second = trial.attempts[:2]
        assert first.reason is reason, trial.log
        assert second.first_step == first.last_step
        assert seconds_between(first, second) < HOLD_S - 10


def test_past_its_time_limit_a_job_comes_back(plain_lab: Lab) -> None:
    """Without a warning Slurm only says TERM when the time is up and the job is already final: it is requeued all the same."""
    trial = plain_lab.submit("limited", queue="low", options=["--time=1"])
    trial.wait_until_at_work()
    trial.wait_until_at_work(attempt=2, timeout_s=200)
    first, second = trial.attempts[:2]
    assert first.reason is EndReason.TIME_LIMIT, trial.log
    assert second.first_step == first.last_step
    assert first.seconds_lost == 0


def test_a_failing_rank_is_retried_on_other_nodes(plain_lab: Lab) -> None:
    """Rank 1 fails once: its node is excluded, the run goes on from its last checkpoint and finishes."""
    trial = plain_lab.submit("crash", queue="low", steps=40, modes=["gloo", "crash"], options=["--nodes=2"])
    job = trial.wait_until_ended()
    first, second = trial.attempts
    assert job.state == "COMPLETED", trial.log
    assert (first.reason, first.failing_rank, first.committed_step) == (EndReason.CRASHED, 1, 10), trial.log
    assert first.failing_node == first.nodes[1]
    assert job.excluded_nodes == (first.failing_node,)
    assert first.failing_node not in second.nodes
    assert (second.first_step, second.reason) == (10, EndReason.FINISHED)
    assert trial.run.is_finished


def test_a_run_that_always_fails_stops_with_its_reasons(plain_lab: Lab) -> None:
    """The same error at the same step: the first attempt still saved something, then 2 retries, then the job has FAILED."""
    trial = plain_lab.submit("hopeless", queue="low", modes=["gloo", "crash-always"], options=["--nodes=2"])
    job = trial.wait_until_ended(240)
    assert job.state == "FAILED", trial.log
    assert all(attempt.reason is EndReason.CRASHED for attempt in trial.attempts)
    assert trial.attempts[-4].made_progress
    assert len(failures_without_progress(trial.attempts, None)) == 3
    assert trial.run.failure is not None
    assert "the loss is not a number" in trial.run.failure


def test_a_rank_killed_without_a_word_is_retried(plain_lab: Lab) -> None:
    """SIGKILL (the kernel out of memory) on one rank: the other one's broken connection is enough to find out and go on."""
    trial = plain_lab.submit("killed", queue="low", steps=40, modes=["gloo", "killed"], options=["--nodes=2"])
    job = trial.wait_until_ended()
    assert job.state == "COMPLETED", trial.log
    first, second = trial.attempts
    assert first.reason is EndReason.CRASHED
    assert (second.first_step, second.reason) == (10, EndReason.FINISHED)


def test_a_lost_node_is_left_behind(plain_lab: Lab) -> None:
    """The second node loses its power mid-step: the run goes on elsewhere from its last checkpoint."""
    trial = plain_lab.submit("lost", queue="low", modes=["gloo"], options=["--nodes=2"])
    trial.wait_until_at_work()
    lost = trial.attempts[0].nodes[1]
    plain_lab.cluster.power_off(lost)
    try:
        trial.wait_until_at_work(attempt=2, timeout_s=180)
        first, second = trial.attempts[:2]
        print(f"node lost -> at work again {seconds_between(first, second):.1f} s, {first.seconds_lost} s of work lost")
        assert first.reason in {EndReason.NODE_FAILURE, EndReason.CRASHED}, trial.log
        assert lost not in second.nodes
        assert second.first_step == first.committed_step
    finally:
        bring_back(plain_lab, lost)


def test_the_first_node_may_be_lost_as_well(plain_lab: Lab) -> None:
    """Rank 0 and the batch shell die with their node: nobody may be left to ask, and Slurm brings the job back by itself."""
    trial = plain_lab.submit("headless", queue="low", modes=["gloo"], options=["--nodes=2"])
    trial.wait_until_at_work()
    lost = trial.attempts[0].nodes[0]
    plain_lab.cluster.power_off(lost)
    try:
        trial.wait_until_at_work(attempt=2, timeout_s=180)
        first, second = trial.attempts[:2]
        assert first.reason in {EndReason.NODE_FAILURE, EndReason.CRASHED, EndReason.REQUEUED}, trial.log
        assert lost not in second.nodes
        assert second.first_step == first.committed_step
    finally:
        bring_back(plain_lab, lost)


def test_elements_of_an_array_are_preempted_one_by_one(plain_lab: Lab) -> None:
    """Each element requeues itself, not its array (the last one has the array's own number), and meets at a port of its own."""
    run = plain_lab.folder / "array"
    (run / "0").mkdir(parents=True)
    (run / "1").mkdir()
    train = f"{shlex.join([sys.executable, str(STANDIN)])} {shlex.quote(str(run))}/$SLURM_ARRAY_TASK_ID 3000"
    array = plain_lab.slurm.submit(
        f"#!/bin/bash\nsrun --kill-on-bad-exit=1 {train}\n",
        arguments=[
            "--partition=low", "--array=0-1", "--ntasks=2", "--mem=1G", "--requeue", "--open-mode=append",
            f"--output={run}/%a/log",
        ],
        directory=plain_lab.folder,
    )  # fmt: skip
    plain_lab.submitted.append(f"{array}_0")
    plain_lab.submitted.append(f"{array}_1")
    first, second = (Trial(plain_lab, f"{array}_{index}", RunDirectory(run / str(index))) for index in range(2))
    first.wait_until_at_work()
    second.wait_until_at_work()
    plain_lab.slurm.cancel([f"{array}_1"], signal="USR2")
    second.wait_until_at_work(attempt=2)
    assert (first.job.restarts, second.job.restarts) == (0, 1)
    assert len(first.attempts) == 1
    ports = {
        line.rpartition(" ")[2] for log in (first.log, second.log) for line in log.splitlines() if " port " in line
    }
    assert len(ports) == 3  # two elements, and the second attempt of one


def test_under_submitit_its_own_handlers_stay_out_of_the_way(
    plain_lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """submitit has set its handlers before the callable runs; USR2 then reaches ours, and the job comes back in one piece."""
    import submitit

    for name, value in plain_lab.cluster.environment().items():
        monkeypatch.setenv(name, value)
    run = RunDirectory(tmp_path / "submitit")
    run.path.mkdir()
    executor = submitit.SlurmExecutor(folder=tmp_path / "submitit-files", python=sys.executable)
    executor.update_parameters(
        partition="low", ntasks_per_node=2, time=30, mem="1GB", additional_parameters={"requeue": True},
        srun_args=["--kill-on-bad-exit=1"], setup=[f"export PYTHONPATH={shlex.quote(str(STANDIN.parent))}"],
    )  # fmt: skip
    monkeypatch.syspath_prepend(str(STANDIN.parent))
    import standin_trainer

    job = executor.submit(standin_trainer.train, str(run.path), 3000)
    plain_lab.submitted.append(job.job_id)
    trial = Trial(plain_lab, job.job_id, run)
    trial.wait_until_at_work()
    plain_lab.slurm.cancel([job.job_id], signal="USR2")
    trial.wait_until_at_work(attempt=2)
    first, second = trial.attempts[:2]
    assert first.reason is EndReason.SIGNALLED
    assert second.first_step == first.last_step
