"""Submission on real Slurm: what people type, what the daemons make of it, and what happens when nodes are taken away."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import MusterError, SlurmError, StateError
from cluster.local import LocalCluster
from cluster.settings import load_spec
from cluster.slurm import SlurmCliClient
from cluster.slurm_records import Job
from jobs.jobspec import JobSpec, make_job
from jobs.journal import EndReason, RunDirectory
from jobs.submit import Launcher

pytestmark = [pytest.mark.daemons, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[2]
TEMPLATES = ROOT / "templates" / "jobs"


@pytest.fixture
def environment(local_cluster: LocalCluster) -> dict[str, str]:
    """What a shell has after `eval "$(muster local env)"`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SBATCH_", "SLURM_", "MUSTER_"))}
    return {**kept, **local_cluster.environment()}


@pytest.fixture
def slurm(local_cluster: LocalCluster) -> Iterator[SlurmCliClient]:
    client = SlurmCliClient(environment=local_cluster.environment())
    yield client
    left = [job.id for job in client.jobs() if not job.is_ended]
    if left:
        client.cancel(left)
    wait_until(lambda: all(job.is_ended for job in client.jobs()), "the cluster to be idle again")


@pytest.fixture
def launcher(
    local_cluster: LocalCluster, slurm: SlurmCliClient, environment: dict[str, str], tmp_path: Path
) -> Launcher:
    spec = load_spec(Path(local_cluster.environment()["MUSTER_CLUSTER"]))
    return Launcher(spec, slurm, runs=tmp_path / "runs", environment=environment)


def wait_until(condition: Callable[[], Any], what: str, *, timeout_s: float = 90.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        answer = condition()
        if answer:
            return answer
        time.sleep(0.3)
    raise AssertionError(f"waited {timeout_s:g} s for {what}")


def ended(slurm: SlurmCliClient, job_id: str) -> Job:
    return wait_until(lambda: (job := slurm.job(job_id)).is_ended and job, f"job {job_id} to end")  # type: ignore[no-any-return]


def shell(line: str, **values: Any) -> JobSpec:
    return make_job(
        {
            "name": "job",
            "command": ["bash", "-c", line],
            "tasks_per_node": 1,
            "cpus_per_task": 1,
            "memory_gb": 0.25,
            **values,
        }
    )


def muster(
    arguments: list[str], environment: Mapping[str, str], cwd: Path, given: str | None = None
) -> subprocess.CompletedProcess[str]:
    code = "from cluster.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env={**environment, "PYTHONPATH": str(ROOT)},
        cwd=cwd, input=given, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def test_a_job_runs_on_every_task_as_described(launcher: Launcher, slurm: SlurmCliClient, tmp_path: Path) -> None:
    """Nodes, tasks, GPUs, CPUs, environment, account and requeue flag arrive; the result is a submitit result."""
    line = 'echo "$SLURM_PROCID $SLURM_NTASKS $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES $ODD $SLURM_RESTART_COUNT"; nproc >/dev/null'
    job = launcher.submit(
        shell(line, nodes=2, gpus_per_node=2, tasks_per_node=2, environment={"ODD": "it's $HOME"}, time="10m")
    )
    state = ended(slurm, job.job_id)
    assert state.state == "COMPLETED"
    assert (state.node_count, state.gpu_count, state.account, state.may_requeue) == (2, 4, "research", True)
    for rank in range(4):
        text = (tmp_path / "runs" / "job" / "slurm" / f"{job.job_id}_{rank}_log.out").read_text()
        assert re.search(rf"^{rank} 4 gpu-\d+ 0,1 it's \$HOME\s*$", text, re.MULTILINE), text
    assert job.results() == [0, 0, 0, 0]


def test_what_slurm_runs_is_what_the_dry_run_printed(launcher: Launcher, slurm: SlurmCliClient, tmp_path: Path) -> None:
    """The batch script in slurmctld's own hands equals the dry run, byte for byte."""
    spec = shell("true", nodes=2, environment={"A": "x'y"})
    said = launcher.script(spec)
    job_id = launcher.submit(spec).job_id
    kept = tmp_path / "kept.sh"
    subprocess.run(
        ["scontrol", "write", "batch_script", job_id, str(kept)], check=True, capture_output=True,
        env={**os.environ, **slurm._environment},
    )  # fmt: skip
    assert kept.read_text().rstrip("\0") == said
    ended(slurm, job_id)


def test_an_exit_code_comes_through(launcher: Launcher, slurm: SlurmCliClient, tmp_path: Path) -> None:
    """A command that fails with 7 makes a job that failed with 7, once, and the journal says so."""
    job = ended(slurm, launcher.submit(shell("exit 7")).job_id)
    assert (job.state, job.exit_code, job.restarts) == ("FAILED", 7, 0)
    attempts = RunDirectory(tmp_path / "runs" / "job").attempts()
    assert [attempt.reason for attempt in attempts] == [EndReason.CRASHED]
    assert "exit code 7" in attempts[0].message


def test_a_failing_rank_does_not_make_the_job_come_back_for_ever(launcher: Launcher, slurm: SlurmCliClient) -> None:
    """One of two ranks fails, srun ends the other by TERM: that is a failure of the job, not a preemption."""
    line = 'if [ "$SLURM_PROCID" = 1 ]; then sleep 1; exit 3; fi; sleep 60'
    job = ended(slurm, launcher.submit(shell(line, nodes=2)).job_id)
    assert (job.state, job.restarts) == ("FAILED", 0)


def test_a_rank_that_fails_after_the_first_is_done_counts(
    launcher: Launcher, slurm: SlurmCliClient, tmp_path: Path
) -> None:
    """Rank 0 ends with 0, rank 1 fails later: the attempt has failed, is retried once as allowed, and then given up."""
    line = 'if [ "$SLURM_PROCID" = 1 ]; then sleep 3; exit 3; fi'
    job = ended(slurm, launcher.submit(shell(line, nodes=2, retries=1)).job_id)
    assert (job.state, job.restarts) == ("FAILED", 1)
    reasons = [attempt.reason for attempt in RunDirectory(tmp_path / "runs" / "job").attempts()]
    assert reasons == [EndReason.CRASHED, EndReason.CRASHED]


def test_a_command_of_several_ranks_is_finished_when_all_are(
    launcher: Launcher, slurm: SlurmCliClient, tmp_path: Path
) -> None:
    """The journal says finished once, after the slowest rank."""
    line = 'if [ "$SLURM_PROCID" = 1 ]; then sleep 3; fi'
    job = ended(slurm, launcher.submit(shell(line, nodes=2)).job_id)
    attempts = RunDirectory(tmp_path / "runs" / "job").attempts()
    assert (job.state, [attempt.reason for attempt in attempts]) == ("COMPLETED", [EndReason.FINISHED])
    assert attempts[0].ended is not None
    assert attempts[0].started is not None
    assert (attempts[0].ended - attempts[0].started).total_seconds() >= 2


def test_a_command_is_retried_as_often_as_allowed(launcher: Launcher, slurm: SlurmCliClient, tmp_path: Path) -> None:
    """With retries: 1 a failing command runs twice under one number, then gives up with its own exit code."""
    job = ended(slurm, launcher.submit(shell("exit 4", retries=1)).job_id)
    assert (job.state, job.exit_code, job.restarts) == ("FAILED", 4, 1)
    assert len(RunDirectory(tmp_path / "runs" / "job").attempts()) == 2


def test_elements_of_an_array_run_with_their_own_values(
    launcher: Launcher, slurm: SlurmCliClient, tmp_path: Path
) -> None:
    """Each element gets its index, its command and its run directory; its log is found under its own name."""
    spec = shell("echo element {index} $MUSTER_ARRAY_INDEX $MUSTER_RUN_DIRECTORY", array={"tasks": 3, "at_once": 2})
    jobs = launcher.submit_array(spec)
    for index, job in enumerate(jobs):
        assert ended(slurm, job.job_id).state == "COMPLETED"
        run = tmp_path / "runs" / "job"
        text = (run / "slurm" / f"{job.job_id}_0_log.out").read_text()
        assert f"element {index} {index} {run / str(index)}" in text
    assert [job.result() for job in jobs] == [0, 0, 0]


@pytest.mark.parametrize("pollution", ["package", "module", "pythonpath"])
def test_a_users_own_jobs_package_does_no_harm(
    launcher: Launcher,
    slurm: SlurmCliClient,
    environment: dict[str, str],
    tmp_path: Path,
    pollution: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With jobs/, jobs.py and cluster.py in the working directory or in PYTHONPATH, Muster's own are used; the user's program
    still imports the user's."""
    work = tmp_path / "work"
    work.mkdir()
    if pollution == "module":
        (work / "jobs.py").write_text("WHOSE = 'user'\n")
    else:
        (work / "jobs").mkdir()
        (work / "jobs" / "__init__.py").write_text("WHOSE = 'user'\n")
    (work / "cluster.py").write_text("raise RuntimeError('the wrong one')\n")
    (work / "mine.py").write_text("import jobs; print('jobs of', jobs.WHOSE)\n")
    monkeypatch.chdir(work)
    if pollution == "pythonpath":
        monkeypatch.setenv("PYTHONPATH", str(work))
    spec = make_job({"name": "job", "command": [sys.executable, "mine.py"], "memory_gb": 0.25})
    job = launcher.submit(spec)
    assert ended(slurm, job.job_id).state == "COMPLETED", job.stdout()
    assert "jobs of user" in str(job.stdout())


def test_a_preempted_command_that_does_not_save_begins_again(
    launcher: Launcher, slurm: SlurmCliClient, tmp_path: Path
) -> None:
    """A program that simply dies of TERM in the grace of a preemption is not lost: it comes back under its number."""
    mark = tmp_path / "ran"
    low = launcher.submit(
        shell(
            f'echo x >> {mark}; [ "$SLURM_RESTART_COUNT" ] && exit 0; sleep 100', nodes=4, gpus_per_node=8, queue="low"
        )
    )
    wait_until(lambda: mark.exists() and len(mark.read_text().split()) == 4, "the low job to run")
    high = launcher.submit(shell("true", name="high", nodes=4, gpus_per_node=8, queue="high"))
    assert ended(slurm, high.job_id).state == "COMPLETED"
    job = ended(slurm, low.job_id)
    assert (job.state, job.restarts) == ("COMPLETED", 1)
    reasons = [attempt.reason for attempt in RunDirectory(tmp_path / "runs" / "job").attempts()]
    assert reasons == [EndReason.PREEMPTED, EndReason.FINISHED]


def test_the_ready_made_script_survives_preemption(
    slurm: SlurmCliClient, environment: dict[str, str], tmp_path: Path
) -> None:
    """templates/jobs/survives-preemption.sbatch by plain sbatch: saves on TERM, comes back by exit code 75, goes on, one log."""
    script = TEMPLATES / "survives-preemption.sbatch"
    job_id = slurm.submit(
        arguments=["--nodes=1", "--gpus-per-node=8", str(script)], environment={"STEPS": "12"}, directory=tmp_path
    )
    log = tmp_path / f"survives-{job_id}.out"
    wait_until(lambda: log.exists() and "starting at step 0" in log.read_text(), "the script to start")
    time.sleep(3)
    high = slurm.submit("#!/bin/bash\ntrue\n", arguments=["-p", "high", "-N4", "--gpus-per-node=8"], directory=tmp_path)
    assert ended(slurm, high).state == "COMPLETED"
    job = ended(slurm, job_id)
    text = log.read_text()
    assert (job.state, job.restarts) == ("COMPLETED", 1), text
    saved = re.search(r"saved at step (\d+)", text)
    assert saved is not None, text
    assert f"starting at step {saved[1]} of 12" in text
    assert "finished at step 12" in text


def test_the_ready_made_array_runs(slurm: SlurmCliClient, environment: dict[str, str], tmp_path: Path) -> None:
    """templates/jobs/array.sbatch leaves one result an element, and a second submission finds them done."""
    for _ in range(2):
        job_id = slurm.submit(arguments=["--array=0-2%2", str(TEMPLATES / "array.sbatch")], directory=tmp_path)
        for index in range(3):
            assert ended(slurm, f"{job_id}_{index}").state == "COMPLETED"
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["0.txt", "1.txt", "2.txt"]
    assert "is done already" in (tmp_path / f"array-{job_id}_0.out").read_text()


def test_wrong_jobs_are_refused_and_leave_nothing(launcher: Launcher, slurm: SlurmCliClient, tmp_path: Path) -> None:
    """What only Slurm knows is wrong comes back as Slurm's message, and the run directory is gone again."""
    with pytest.raises(SlurmError, match=r"(?i)constraint|feature|node configuration"):
        launcher.submit(shell("true", slurm={"constraint": "no-such-feature"}))
    with pytest.raises(MusterError, match=r"(?i)reservation"):
        launcher.submit(shell("true", slurm={"reservation": "no-such-reservation"}))
    with pytest.raises(MusterError, match=r"(?i)invalid qos"):
        launcher.submit(shell("true", slurm={"qos": "no-such-qos"}))
    assert not (tmp_path / "runs").exists()


def test_a_run_in_use_is_found_out_from_slurm(launcher: Launcher, slurm: SlurmCliClient) -> None:
    """While the job waits or runs, a second submission is refused; when it is cancelled, the run may go on."""
    first = launcher.submit(shell("sleep 100"))
    with pytest.raises(StateError, match=f"job {first.job_id} uses this run"):
        launcher.submit(shell("true"))
    slurm.cancel([first.job_id])
    ended(slurm, first.job_id)
    assert ended(slurm, launcher.submit(shell("true")).job_id).state == "COMPLETED"


def test_the_commands_on_a_real_cluster(slurm: SlurmCliClient, environment: dict[str, str], tmp_path: Path) -> None:
    """submit, list, why, show, logs, cancel: one job through all of them, as a person would."""
    (tmp_path / "j.yaml").write_text(
        "name: talk\ncommand: [bash, -c, 'echo hello; sleep 100']\nqueue: low\nmemory_gb: 0.25\n"
    )

    def say(*arguments: str) -> subprocess.CompletedProcess[str]:
        return muster(list(arguments), environment, tmp_path)

    submitted = json.loads(say("submit", "j.yaml", "--json").stdout)
    job_id = submitted["job_id"]
    assert submitted["run_directory"] == str(tmp_path / "runs" / "talk")
    wait_until(lambda: slurm.job(job_id).state == "RUNNING", "the job to run")
    wait_until(lambda: "hello" in say("jobs", "logs", "talk").stdout, "the first words")
    assert re.search(rf"^{job_id} +talk +low +running", say("jobs", "list").stdout, re.MULTILINE)
    assert "runs on gpu-" in say("jobs", "why", job_id).stdout
    assert f"run directory    {tmp_path}/runs/talk" in say("jobs", "show", job_id).stdout
    second = say("submit", "j.yaml")
    assert second.returncode == 9
    assert f"job {job_id} uses this run" in second.stderr
    assert say("jobs", "cancel", job_id).returncode == 0
    ended(slurm, job_id)
    assert "was cancelled" in say("jobs", "why", job_id).stdout
    assert say("jobs", "cancel", job_id).returncode == 9
    assert say("jobs", "why", "987654").returncode == 7


def test_why_names_the_job_that_is_in_the_way(
    launcher: Launcher, slurm: SlurmCliClient, environment: dict[str, str], tmp_path: Path
) -> None:
    """A job that waits for nodes names who holds them, its place in the queue, and when Slurm expects to start it."""
    first = launcher.submit(shell("sleep 100", name="first", nodes=4, gpus_per_node=8, time="10m", queue="low"))
    wait_until(lambda: slurm.job(first.job_id).state == "RUNNING", "the first job to run")
    second = launcher.submit(shell("true", name="second", nodes=2, gpus_per_node=8, time="5m", queue="low"))
    wait_until(lambda: slurm.job(second.job_id).reason in {"Resources", "Priority"}, "Slurm to say why it waits")
    text = muster(["jobs", "why", second.job_id], environment, tmp_path).stdout
    assert f"job {second.job_id} (second) waits in queue low" in text
    assert "4, of them 0 free, 4 busy, 0 out of service" in text
    assert f"4 nodes held by job {first.job_id} (first)" in text
    assert "It is number 1 of 1 waiting in queue low" in text


def test_sbatch_adds_only_what_is_missing(slurm: SlurmCliClient, environment: dict[str, str], tmp_path: Path) -> None:
    """muster sbatch with sbatch's own answers: number on standard output, queue from the script, exit code of --wait."""
    (tmp_path / "s.sh").write_text("#!/bin/bash\n#SBATCH -p high --no-requeue\necho args: $*\n")
    submitted = muster(["sbatch", "--parsable", "s.sh", "a", "--", "-p", "low"], environment, tmp_path)
    job = ended(slurm, submitted.stdout.strip())
    assert (job.partition, job.may_requeue, job.account) == ("high", False, "research")
    assert "args: a -- -p low" in (tmp_path / f"slurm-{job.id}.out").read_text()
    waited = muster(["sbatch", "-W", "--wrap", "exit 3"], environment, tmp_path)
    assert waited.returncode == 3
    read = muster(["sbatch", "--parsable"], environment, tmp_path, "#!/bin/bash\n#SBATCH -J from-stdin\ntrue\n")
    job = ended(slurm, read.stdout.strip())
    assert (job.name, job.partition, job.may_requeue) == ("from-stdin", "low", True)
