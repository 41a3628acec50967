"""Submission: the script is what --dry-run says, a failure leaves nothing behind, and no run is used twice at a time."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import JobError, MissingError, SlurmError, StateError
from cluster.settings import ClusterSpec
from cluster.shell import CommandResult
from cluster.slurm_records import Job
from jobs.entry import Task, command_environment, run_command, training_config
from jobs.jobspec import JobSpec, make_job
from jobs.journal import EndReason, RunDirectory
from jobs.run_folder import RunFolder, read_run
from jobs.submit import Launcher, default_runs

CLUSTER = ClusterSpec.model_validate(
    {
        "name": "demo",
        "pools": [{"name": "gpu", "nodes": 4, "gpus_per_node": 8, "cpus_per_node": 32, "memory_gb_per_node": 64}],
        "queues": [
            {"name": "high", "pools": ["gpu"], "tier": 100},
            {"name": "low", "pools": ["gpu"], "time_limit": "48h", "default": True},
        ],
        "projects": [{"name": "research"}],
    }
)  # fmt: skip


class RememberingSlurm:
    """A cluster that accepts jobs, keeps them, and refuses when told to."""

    def __init__(self) -> None:
        self.kept: dict[str, Job] = {}
        self.scripts: dict[str, str] = {}
        self.arguments: dict[str, list[str]] = {}
        self.refusal: Exception | None = None

    def submit(
        self,
        script: str | None = None,
        *,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
    ) -> str:
        if self.refusal is not None:
            raise self.refusal
        number = str(len(self.kept) + 1)
        self.scripts[number] = Path(arguments[-1]).read_text()
        self.arguments[number] = list(arguments)
        self.kept[number] = Job(id=number, state="PENDING")
        return number

    def jobs(self, *, job_ids: Sequence[str] = (), **_: Any) -> list[Job]:
        return [job for number, job in self.kept.items() if not job_ids or number in job_ids]

    def end(self, number: str, state: str = "COMPLETED") -> None:
        self.kept[number] = Job(id=number, state=state, end_time=datetime.fromtimestamp(0).astimezone())


@pytest.fixture
def slurm() -> RememberingSlurm:
    return RememberingSlurm()


@pytest.fixture
def launcher(slurm: RememberingSlurm, tmp_path: Path) -> Launcher:
    return Launcher(CLUSTER, slurm, runs=tmp_path / "runs", user="alice", environment={})  # type: ignore[arg-type]


def command(**values: Any) -> JobSpec:
    return make_job({"name": "job", "command": ["true"], **values})


def training(tmp_path: Path, **values: Any) -> JobSpec:
    config = {"data": {"directory": str(tmp_path / "shards")}, "steps": 10, "batch_size": 8, **values.pop("config", {})}
    return make_job({"name": "train", "entry": "jobs.train", "config": config, **values})


def everything_under(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]


def test_a_dry_run_prints_what_is_submitted_to_the_byte(
    launcher: Launcher, slurm: RememberingSlurm, tmp_path: Path
) -> None:
    """The script of --dry-run, the one Slurm gets and the one kept in the run directory are equal; a dry run writes nothing."""
    spec = command(nodes=2, gpus_per_node=8, time="90m", environment={"A": "it's"}, exclude=["gpu-3"], warning="1m")
    said = launcher.script(spec)
    assert not (tmp_path / "runs").exists()
    job = launcher.submit(spec)
    assert slurm.scripts[job.job_id] == said
    assert job.paths.submission_file.read_text() == said


def test_a_dry_run_of_an_array_is_exact_too(launcher: Launcher, slurm: RememberingSlurm) -> None:
    """The same holds for arrays, whose script submitit makes in another way."""
    spec = command(array={"tasks": 3, "at_once": 2})
    said = launcher.script(spec)
    jobs = launcher.submit_array(spec)
    assert [job.job_id for job in jobs] == ["1_0", "1_1", "1_2"]
    assert slurm.scripts["1"] == said
    assert "--array=0-2%2" in directives(said)


def test_what_survives_preemption_is_in_every_script(launcher: Launcher, tmp_path: Path) -> None:
    """Requeue, append mode, a warning for trainers, safe path, unbuffered output and the settling last lines are there."""
    script = launcher.script(training(tmp_path, time="2h"))
    for line in (
        "--requeue",
        "--open-mode=append",
        "--signal=USR2@120",
        "--time=0-02:00:00",
        "--partition=low",
        "--account=research",
    ):
        assert line in directives(script)
    assert "export PYTHONSAFEPATH=1" in script
    assert "--unbuffered" in script
    assert "--kill-on-bad-exit=1" in script
    assert '-m jobs.requeue --run-directory "$MUSTER_RUN_DIRECTORY" --status "$status"' in script
    assert sys.executable in script


def test_a_command_without_a_warning_gets_no_signal(launcher: Launcher) -> None:
    """submitit would always ask for USR2, which ends a program that does not expect it."""
    assert not [line for line in directives(launcher.script(command(time="2h"))) if line.startswith("--signal")]


def test_the_script_is_valid_shell(launcher: Launcher, tmp_path: Path) -> None:
    """bash accepts the script, whatever quotes are in names and values."""
    spec = command(environment={"A": 'it\'s "$HOME" `x`'}, run_directory=str(tmp_path / 'it\'s a "run"'))
    checked = subprocess.run(["bash", "-n"], input=launcher.script(spec), text=True, capture_output=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_values_reach_the_job_through_the_shell_unchanged(launcher: Launcher, tmp_path: Path) -> None:
    """An environment value with quotes, dollars and spaces is exported as it was written."""
    value = 'a\'b "c" $HOME `date` \\n'
    script = launcher.script(command(environment={"ODD": value}))
    setup = script.partition("# command")[0] + 'printf %s "$ODD"\n'
    assert subprocess.run(["bash"], input=setup, text=True, capture_output=True, check=True).stdout == value


def test_a_job_that_asks_for_no_limit_gets_none(launcher: Launcher) -> None:
    """submitit's own default of five minutes does not reach the script."""
    assert not [line for line in directives(launcher.script(command(queue="high"))) if line.startswith("--time")]


def test_the_run_directory_holds_the_job_before_slurm_knows_it(launcher: Launcher, tmp_path: Path) -> None:
    """job.yaml reads back as the job, --set and all; the pickle holds nothing but the directory's name."""
    spec = training(tmp_path, nodes=2)
    job = launcher.submit(spec)
    run = tmp_path / "runs" / "train"
    assert read_run(run) == spec
    delayed = pickle.loads(job.paths.submitted_pickle.read_bytes())
    assert vars(delayed.function) == {"directory": str(run), "index": None}


def test_elements_of_an_array_have_their_own_run_directories(launcher: Launcher, tmp_path: Path) -> None:
    """Each element has a job.yaml with its own values, and a pickle that names it."""
    spec = training(tmp_path, array=[{"config.seed": 5}, {"config.seed": 6}])
    jobs = launcher.submit_array(spec)
    for index, job in enumerate(jobs):
        run = tmp_path / "runs" / "train" / str(index)
        assert read_run(run).config["seed"] == 5 + index
        assert pickle.loads(job.paths.submitted_pickle.read_bytes()).function.directory == str(run)


@pytest.mark.parametrize("array", [None, 3])
def test_a_refused_submission_leaves_nothing(
    launcher: Launcher, slurm: RememberingSlurm, tmp_path: Path, array: int | None
) -> None:
    """When sbatch says no, not even the directory that holds the runs has been made."""
    slurm.refusal = SlurmError("Invalid account", argv=["sbatch"], returncode=1)
    with pytest.raises(SlurmError, match="Invalid account"):
        (launcher.submit if array is None else launcher.submit_array)(command(array=array))
    assert not (tmp_path / "runs").exists()


def test_a_refused_second_submission_leaves_the_run_as_it_was(
    launcher: Launcher, slurm: RememberingSlurm, tmp_path: Path
) -> None:
    """A run directory with an earlier job in it is restored byte by byte."""
    launcher.submit(command())
    slurm.end("1", "FAILED")
    (tmp_path / "runs" / "job" / "mine.txt").write_text("keep me")
    before = everything_under(tmp_path)
    slurm.refusal = SlurmError("no", argv=["sbatch"], returncode=1)
    with pytest.raises(SlurmError):
        launcher.submit(command(command=["other"]))
    assert everything_under(tmp_path) == before


def test_a_run_in_use_is_not_submitted_again(launcher: Launcher, slurm: RememberingSlurm) -> None:
    """While its job waits or runs, a second one is refused with the job's number; once it has ended it may go on."""
    launcher.submit(command())
    with pytest.raises(StateError, match="job 1 uses this run"):
        launcher.submit(command())
    slurm.end("1", "FAILED")
    assert launcher.submit(command()).job_id == "2"


def test_two_submissions_at_once_do_not_mix(launcher: Launcher, slurm: RememberingSlurm, tmp_path: Path) -> None:
    """While one submission holds the run directory, another one is refused."""
    with (
        RunFolder(tmp_path / "runs" / "job").claimed(slurm, command()),
        pytest.raises(StateError, match="another submission"),
    ):  # type: ignore[arg-type]
        launcher.submit(command())


def test_a_finished_run_is_not_submitted_again(launcher: Launcher, slurm: RememberingSlurm, tmp_path: Path) -> None:
    """A run that has reached its end says so, and what to do instead."""
    launcher.submit(training(tmp_path))
    slurm.end("1")
    (tmp_path / "runs" / "train" / "finished").write_text("{}")
    with pytest.raises(StateError, match="this run is finished; choose another name"):
        launcher.submit(training(tmp_path))


def test_a_run_that_has_given_up_waits_for_a_person(
    launcher: Launcher, slurm: RememberingSlurm, tmp_path: Path
) -> None:
    """A training that failed too often names its reasons and the command that clears it; a command simply tries again."""
    launcher.submit(training(tmp_path))
    slurm.end("1", "FAILED")
    run = RunDirectory(tmp_path / "runs" / "train")
    run.give_up("CUDA error on gpu-3")
    with pytest.raises(StateError, match=r"(?s)CUDA error on gpu-3.*muster jobs clear"):
        launcher.submit(training(tmp_path))
    run.clear_failures()
    launcher.submit(training(tmp_path))
    launcher.submit(command())
    slurm.end("3", "FAILED")
    RunDirectory(tmp_path / "runs" / "job").give_up("exit code 1")
    assert launcher.submit(command()).job_id == "4"


def test_a_wrong_training_configuration_is_refused_before_slurm(
    launcher: Launcher, slurm: RememberingSlurm, tmp_path: Path
) -> None:
    """Unknown keys, and batches that the ranks cannot share, are found at submission."""
    with pytest.raises(JobError, match="did you mean batch_size"):
        launcher.submit(training(tmp_path, config={"batchsize": 4}))
    with pytest.raises(JobError, match=r"batch_size \(8\).*ranks \(3\)"):
        launcher.submit(training(tmp_path, nodes=3))
    assert not slurm.kept
    assert not (tmp_path / "runs").exists()


def test_a_wrong_element_of_an_array_is_refused_before_slurm(launcher: Launcher, tmp_path: Path) -> None:
    """The values of every element are checked, not only those of the first."""
    with pytest.raises(JobError, match="learning_rate"):
        launcher.submit_array(training(tmp_path, array=[{}, {"config.optimizer.learning_rate": -1}]))


def test_what_the_cluster_cannot_do_is_refused_with_every_reason(launcher: Launcher) -> None:
    """Findings of the cluster come as one message."""
    with pytest.raises(JobError) as caught:
        launcher.script(command(nodes=9, time="72h"))
    assert "nodes (9)" in str(caught.value)
    assert "time (3d)" in str(caught.value)


@pytest.mark.parametrize("path", ["/tmp/100%/run", "/tmp/a\nb"])
def test_a_directory_that_sbatch_would_rewrite_is_refused(launcher: Launcher, path: str) -> None:
    """% stands for something in sbatch's file names, and a line break would end the line."""
    with pytest.raises(JobError, match="run_directory"):
        launcher.script(command(run_directory=path))


def test_a_directory_that_cannot_be_made_is_named(launcher: Launcher, tmp_path: Path) -> None:
    """A file in the way is the user's to remove; the message names the place."""
    (tmp_path / "file").write_text("")
    with pytest.raises(JobError, match="cannot be made"):
        launcher.submit(command(run_directory=str(tmp_path / "file" / "run")))


def test_arrays_and_single_jobs_have_their_own_call(launcher: Launcher) -> None:
    """submit gives one job, so an array is sent to submit_array, and the reverse."""
    with pytest.raises(JobError, match="submit_array"):
        launcher.submit(command(array=2))
    with pytest.raises(JobError, match="call submit"):
        launcher.submit_array(command())


def test_the_environment_cannot_overrule_the_job(slurm: RememberingSlurm, tmp_path: Path) -> None:
    """SBATCH_PARTITION in the shell would win over the script, so the options are repeated where it cannot."""
    shell = {"SBATCH_PARTITION": "high", "SBATCH_TIMELIMIT": "1"}
    Launcher(CLUSTER, slurm, runs=tmp_path, user="alice", environment=shell).submit(command(queue="low", time="2h"))  # type: ignore[arg-type]
    assert "--partition=low" in slurm.arguments["1"]
    assert "--time=0-02:00:00" in slurm.arguments["1"]


def test_without_a_description_slurms_defaults_hold(slurm: RememberingSlurm, tmp_path: Path) -> None:
    """Nothing is asked for that nobody asked for, and any queue is accepted."""
    launcher = Launcher(None, slurm, runs=tmp_path, user="alice", environment={})  # type: ignore[arg-type]
    lines = directives(launcher.script(command()))
    assert not [line for line in lines if line.startswith(("--partition", "--account", "--mem", "--cpus"))]
    assert "--partition=anything" in directives(launcher.script(command(queue="anything")))


class ShellSaying:
    """Answers every command with the same text."""

    def __init__(self, text: str) -> None:
        self.text = text

    def run(self, argv: Sequence[str], **_: Any) -> CommandResult:
        return CommandResult(tuple(argv), 0, self.text, "", 0.0)


def test_a_container_needs_pyxis(slurm: RememberingSlurm, tmp_path: Path) -> None:
    """Where srun knows no containers the job is refused; where it does, image, mounts and interpreter are in the script."""
    spec = command(
        container={"image": "nvcr.io#nvidia/pytorch:25.01", "mounts": ["/fsx"], "python": "/opt/venv/bin/python"}
    )

    def made(said: str) -> Launcher:
        return Launcher(CLUSTER, slurm, runs=tmp_path, user="alice", environment={}, shell=ShellSaying(said))  # type: ignore[arg-type]

    with pytest.raises(MissingError, match="pyxis"):
        made("Usage: srun [OPTIONS]").script(spec)
    script = made("--container-image=[USER@][REGISTRY#]IMAGE[:TAG]").script(spec)
    assert "--container-image=nvcr.io#nvidia/pytorch:25.01" in script
    assert f"--container-mounts={tmp_path}/job:{tmp_path}/job,/fsx" in script
    assert "/opt/venv/bin/python -u -m submitit" in script


def test_muster_found_through_pythonpath_stays_found(slurm: RememberingSlurm, tmp_path: Path) -> None:
    """PYTHONPATH is put aside for the user's own program; Muster's own directory stays where that is how it is found."""
    root = str(Path(__file__).parents[2])
    own = Launcher(CLUSTER, slurm, runs=tmp_path, user="a", environment={"PYTHONPATH": f"/x:{root}"}).script(command())  # type: ignore[arg-type]
    other = Launcher(CLUSTER, slurm, runs=tmp_path, user="a", environment={"PYTHONPATH": "/x"}).script(command())  # type: ignore[arg-type]
    assert f"export PYTHONPATH={root}" in own
    assert "unset PYTHONPATH" in other


def test_the_users_own_pythonpath_is_for_the_users_program(launcher: Launcher) -> None:
    """PYTHONPATH of the job description reaches the command, and nothing of Muster's."""
    assert "export MUSTER_PYTHONPATH=src" in launcher.script(command(environment={"PYTHONPATH": "src"}))
    given = {"PYTHONSAFEPATH": "1", "MUSTER_PYTHONPATH": "src", "HOME": "/h"}
    assert command_environment(given) == {"PYTHONPATH": "src", "HOME": "/h"}
    assert command_environment({"MUSTER_PYTHONPATH": ""}) == {}


def test_runs_are_kept_on_the_shared_file_system_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """storage.shared if it is there and writable, else the present directory."""
    there = CLUSTER.model_copy(update={"storage": CLUSTER.storage.model_copy(update={"shared": tmp_path})})
    assert default_runs(there) == tmp_path / "runs"
    monkeypatch.chdir(tmp_path)
    assert (
        default_runs(
            CLUSTER.model_copy(update={"storage": CLUSTER.storage.model_copy(update={"shared": Path("/no/such")})})
        )
        == tmp_path / "runs"
    )
    assert default_runs(None) == tmp_path / "runs"


def test_the_number_of_a_job_of_an_earlier_cluster_is_nobodys(
    launcher: Launcher, slurm: RememberingSlurm, tmp_path: Path
) -> None:
    """A live job of the same number that writes elsewhere uses another run; one that writes here, through a link, this one."""
    launcher.submit(command())
    folder = tmp_path / "runs" / "job" / "slurm"
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    slurm.kept["1"] = Job(id="1", state="RUNNING", stdout=str(tmp_path / "link" / "job" / "slurm" / "1_0_log.out"))
    with pytest.raises(StateError, match="job 1 uses this run"):
        launcher.submit(command())
    slurm.kept["1"] = Job(id="1", state="RUNNING", stdout="/home/bob/slurm-1.out", command=str(folder / "1.sh"))
    with pytest.raises(StateError, match="job 1 uses this run"):
        launcher.submit(command())
    slurm.kept["1"] = Job(id="1", state="RUNNING", stdout="/home/bob/slurm-1.out", command="/home/bob/train.sh")
    assert launcher.submit(command()).job_id == "2"


# --- what runs in the job ----------------------------------------------------------------------------------------------------


def test_a_command_hands_its_exit_code_on() -> None:
    """A program's own exit code is the task's; one ended by a signal has 128 + its number, as in a shell."""
    assert run_command(command()) == 0
    assert run_command(command(command=["bash", "-c", "exit 7"])) == 7
    assert run_command(command(command=["bash", "-c", "kill -TERM $$"])) == 143
    assert run_command(command(command=["bash", "-c"], arguments=["exit 9"])) == 9


def test_a_command_that_is_not_there_is_named() -> None:
    """A program that this node does not have is named, with the question that helps."""
    with pytest.raises(MissingError, match="no-such-program: not found on node"):
        run_command(command(command=["no-such-program"]))


@pytest.mark.parametrize(("code", "expected"), [(0, None), (5, 5), (75, 75)])
def test_a_task_ends_as_its_program_did(tmp_path: Path, code: int, expected: int | None) -> None:
    """Outside Slurm a task leaves with its program's exit code, and the journal has the attempt."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "job.yaml").write_text(f"name: x\ncommand: [bash, -c, 'exit {code}']\n")
    ended = subprocess.run(
        [sys.executable, "-c", f"from jobs.entry import Task; Task({str(run)!r})()"],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == (expected or 0), ended.stderr
    assert len(RunDirectory(run).attempts()) == 1
    assert not RunDirectory(run).is_finished


def start_task(run: Path, code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_a_task_that_failed_ends_at_once(tmp_path: Path) -> None:
    """Threads and exit handlers that take their time (torch's do) do not keep the nodes; what was printed is there."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "job.yaml").write_text("name: x\ncommand: [bash, -c, 'echo printed; exit 75']\n")
    slow = "import atexit; atexit.register(print, 'took its time')"
    ended = start_task(run, f"{slow}\nfrom jobs.entry import Task; print('begun'); Task({str(run)!r})()")
    said = ended.communicate(timeout=60)[0]
    assert ended.returncode == 75
    assert "begun" in said
    assert "printed" in said
    assert "took its time" not in said


def test_a_command_told_to_stop_that_ends_with_0_is_doubted(tmp_path: Path) -> None:
    """It counts as finished, as its exit code says; log and journal say that it was told to stop, and of exit code 75."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "job.yaml").write_text("name: x\ncommand: [bash, -c, 'kill -TERM $PPID; sleep 0.2; exit 0']\n")
    ended = start_task(run, f"from jobs.entry import Task; Task({str(run)!r})()")
    said = ended.communicate(timeout=60)[0]
    assert ended.returncode == 0, said
    (attempt,) = RunDirectory(run).attempts()
    assert attempt.reason is EndReason.FINISHED
    for text in (said, attempt.message):
        assert "exit code 0 after SIGTERM" in text


def test_the_run_directory_of_the_job_is_that_of_the_training(tmp_path: Path) -> None:
    """Whatever the file says, the trainer works where the job is kept, and retries follow the job."""
    config = training_config(training(tmp_path, retries=7), tmp_path / "there")
    assert config.run_directory == tmp_path / "there"
    assert config.retries == 7


def test_preprocessing_is_checked_at_submission(launcher: Launcher) -> None:
    """A wrong key in a preprocessing job is found before it waits in the queue."""
    with pytest.raises(JobError, match="sice"):
        launcher.script(make_job({"name": "p", "entry": "jobs.preprocess", "config": {"output": "x", "sice": 3}}))


def test_tasks_hold_nothing_but_names() -> None:
    """A requeued job unpickles the bytes of its first submission, so nothing that may change is in them."""
    assert vars(pickle.loads(pickle.dumps(Task("/runs/x", index=3)))) == {"directory": "/runs/x", "index": 3}
