"""The commands people type: what they print, what they refuse, and how quickly they load."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.cli import main
from cluster.errors import CommandTimeout, NotFoundError, SlurmError
from cluster.settings import load_spec
from cluster.slurm_records import AccountingRecord, Job, Partition
from jobs import commands
from jobs.follow import follow, read_tail
from jobs.jobspec import read_job
from jobs.journal import RunDirectory
from jobs.lookup import find_job
from jobs.queues import check_job
from jobs.submit import Launcher

ROOT = Path(__file__).parents[2]
READY_MADE = sorted((ROOT / "jobs" / "definitions").glob("*.yaml"))
SCRIPTS = sorted((ROOT / "templates" / "jobs").glob("*.sbatch"))
NOW = datetime.now(timezone.utc)


class TalkativeSlurm:
    """Knows a few jobs, and remembers what it is told to do."""

    def __init__(self, jobs: Sequence[Job] = (), records: Sequence[AccountingRecord] = ()) -> None:
        self.kept = list(jobs)
        self.records = list(records)
        self.cancelled: list[str] = []
        self.has_accounting = True

    def jobs(
        self, *, job_ids: Sequence[str] = (), users: Sequence[str] = (), partitions: Sequence[str] = (), **_: Any
    ) -> list[Job]:
        return [
            job
            for job in self.kept
            if (not job_ids or {job.id, job.display_id, job.array_job_id} & set(job_ids))
            and (not users or job.user in users)
            and (not partitions or job.partition in partitions)
        ]

    def accounting(self, *, job_ids: Sequence[str] = (), users: Sequence[str] = (), **_: Any) -> list[AccountingRecord]:
        if not self.has_accounting:
            raise SlurmError("Slurm accounting storage is disabled", argv=["sacct"], returncode=1)
        return [r for r in self.records if (not job_ids or r.id in job_ids) and (not users or r.user in users)]

    def partitions(self) -> list[Partition]:
        return [Partition(name="high", tier=100), Partition(name="low", tier=10)]

    def nodes(self, names: Sequence[str] = ()) -> list[Any]:
        return []

    def priorities(self, job_ids: Sequence[str] = ()) -> list[Any]:
        return []

    def expected_start(self, job_id: str) -> None:
        return None

    def cancel(self, job_ids: Sequence[str], **_: Any) -> None:
        self.cancelled += job_ids


def known_job(number: str, **changes: Any) -> Job:
    values: dict[str, Any] = {
        "id": number, "name": "train", "user": "me", "partition": "low", "state": "PENDING", "reason": "Priority",
        "submit_time": NOW - timedelta(minutes=2), "node_count": 1, "tres": {"gres/gpu": "8"}, "restarts": 0,
    }  # fmt: skip
    return Job(**{**values, **changes})


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> TalkativeSlurm:
    made = TalkativeSlurm()
    monkeypatch.setattr(commands, "_slurm", lambda: made)
    monkeypatch.setattr(commands.getpass, "getuser", lambda: "me")
    return made


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.delenv("MUSTER_CLUSTER", raising=False)

    def run_it(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run_it


# --- submit ------------------------------------------------------------------------------------------------------------------


def test_a_missing_file_names_the_ready_made_jobs(run: Run, slurm: TalkativeSlurm) -> None:
    """A name that is neither a file nor a ready-made job is answered with what there is."""
    code, _, said = run("submit", "trian-emoji")
    assert code == 3
    assert "train-emoji" in said
    assert "all-reduce" in said
    assert run("submit", "nothing.yaml")[0] == 3


def test_options_are_overrides(
    run: Run, slurm: TalkativeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--queue, --nodes, --name and --time win over the file; names that look like numbers stay names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "j.yaml").write_text("name: x\ncommand: [true]\n")
    code, out, _ = run(
        "submit", "j.yaml", "--dry-run", "-q", "high", "-N", "3", "--name", "007", "-t", "90m", "--set", "memory_gb=2.5"
    )
    assert code == 0
    for line in ("--partition=high", "--nodes=3", "--job-name=007", "--time=0-01:30:00", "--mem=2560M"):
        assert f"#SBATCH {line}\n" in out
    assert [path.name for path in tmp_path.iterdir()] == ["j.yaml"]


def test_a_dry_run_as_json_has_the_job_itself(run: Run, slurm: TalkativeSlurm, tmp_path: Path) -> None:
    """The script does not say what runs in it; with --json the job stands beside it, as file and options made it."""
    (tmp_path / "j.yaml").write_text("name: x\ncommand: [python, a.py]\n")
    _, out, _ = run("submit", str(tmp_path / "j.yaml"), "--dry-run", "--json", "--set", "arguments=[--fast]")
    told = json.loads(out)
    assert told["job"] == {"name": "x", "command": ["python", "a.py"], "arguments": ["--fast"]}
    assert told["script"].startswith("#!")


def test_without_a_description_of_the_cluster_it_is_said(run: Run, slurm: TalkativeSlurm, tmp_path: Path) -> None:
    """What could not be checked is a warning on standard error, and not an error."""
    (tmp_path / "j.yaml").write_text("name: x\ncommand: [true]\n")
    if Path("/etc/muster/cluster.yaml").exists():
        pytest.skip("this machine has a description of its cluster")
    code, _, said = run("submit", str(tmp_path / "j.yaml"), "--dry-run")
    assert code == 0
    assert "unchecked" in said


@pytest.mark.parametrize("path", READY_MADE, ids=lambda path: path.stem)
def test_ready_made_jobs_fit_the_local_cluster(path: Path) -> None:
    """Each definition is valid, runs on `muster local up` as it stands, and would be accepted by its entry point."""
    spec = read_job(path)
    cluster = load_spec(ROOT / "templates" / "cluster" / "local-demo.yaml")
    assert check_job(spec, cluster, user="me") == []
    assert "srun" in Launcher(cluster, TalkativeSlurm(), runs=Path("/r"), user="me", environment={}).script(spec)  # type: ignore[arg-type]
    assert path.stem == spec.name


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_ready_made_scripts_survive_preemption(path: Path) -> None:
    """Each plain script is valid shell, may be requeued, keeps its log, and runs its work under srun."""
    text = path.read_text()
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    for needed in ("#SBATCH --requeue\n", "#SBATCH --open-mode=append\n", "srun "):
        assert needed in text


# --- sbatch ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_sbatch(tmp_path: Path) -> Path:
    """A program called sbatch that prints its arguments and what it reads, and ends with 7."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "sbatch"
    program.write_text('#!/bin/bash\nprintf "<%s>" "$@"\necho\nif [ -z "$NOREAD" ]; then cat; fi\nexit 7\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return folder


def muster(
    arguments: Sequence[str], folder: Path, *, given: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SBATCH_", "MUSTER_", "SLURM_"))}
    return subprocess.run(
        [sys.executable, "-c", "from cluster.cli import main; main()", *arguments],
        env={**kept, "PATH": f"{folder}:/usr/bin:/bin", "PYTHONPATH": str(ROOT), "SLURM_CONF": "/nowhere", **environment},
        cwd=folder.parent, input=given, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def test_sbatch_keeps_its_output_and_exit_code(fake_sbatch: Path) -> None:
    """Standard output and exit code are sbatch's own; nothing else is printed."""
    ended = muster(["sbatch", "s.sh", "a", "--", "-p", "x"], fake_sbatch)
    assert ended.returncode == 7
    assert ended.stdout == "<--requeue><--open-mode=append><s.sh><a><--><-p><x>\n"
    assert ended.stderr == ""


def test_sbatch_passes_a_script_from_standard_input_on(fake_sbatch: Path) -> None:
    """The script that was read to find its directives reaches sbatch whole."""
    script = "#!/bin/bash\n#SBATCH --no-requeue\necho hällo\n"
    ended = muster(["sbatch"], fake_sbatch, given=script)
    assert ended.stdout == f"<--open-mode=append>\n{script}"


def test_sbatch_says_what_it_added_when_asked(fake_sbatch: Path) -> None:
    """muster -v sbatch, and sbatch's own -v, name each added flag and its reason; the latter is passed on too."""
    assert "added --requeue: a preempted job" in muster(["-v", "sbatch", "s.sh"], fake_sbatch, NOREAD="1").stderr
    ended = muster(["sbatch", "-v", "s.sh"], fake_sbatch, NOREAD="1")
    assert "added --requeue" in ended.stderr
    assert "<-v>" in ended.stdout


@pytest.mark.parametrize("content", [None, "name: [", "name: X\n"])
def test_sbatch_works_where_the_description_is_broken(fake_sbatch: Path, tmp_path: Path, content: str | None) -> None:
    """A missing, malformed or wrong cluster.yaml costs queue and account, and is named only with -v."""
    path = tmp_path / "cluster.yaml"
    if content is not None:
        path.write_text(content)
    quiet = muster(["sbatch", "s.sh"], fake_sbatch, NOREAD="1", MUSTER_CLUSTER=str(path))
    assert (quiet.stdout, quiet.stderr) == ("<--requeue><--open-mode=append><s.sh>\n", "")
    told = muster(["-v", "sbatch", "s.sh"], fake_sbatch, NOREAD="1", MUSTER_CLUSTER=str(path)).stderr
    assert "left to Slurm" in " ".join(told.split())


def test_sbatch_fills_in_queue_and_account(fake_sbatch: Path) -> None:
    """With a description, the default queue and the only project are added; the script's own lines win."""
    cluster = str(ROOT / "templates" / "cluster" / "local-demo.yaml")
    (fake_sbatch.parent / "s.sh").write_text("#!/bin/bash\n#SBATCH -p high\n")
    ended = muster(["sbatch", "s.sh"], fake_sbatch, NOREAD="1", MUSTER_CLUSTER=cluster)
    assert ended.stdout == "<--requeue><--open-mode=append><--account=research><s.sh>\n"
    ended = muster(["sbatch", "--wrap", "hostname"], fake_sbatch, NOREAD="1", MUSTER_CLUSTER=cluster)
    assert "<--partition=low>" in ended.stdout


# --- jobs --------------------------------------------------------------------------------------------------------------------


def test_the_list_shows_ones_own_jobs(run: Run, slurm: TalkativeSlurm) -> None:
    """Mine by default, everybody's with --all, one queue's with --queue; the same as JSON."""
    slurm.kept = [
        known_job("1"),
        known_job("2", user="bob", state="RUNNING", nodes=("gpu-1", "gpu-2"), start_time=NOW),
        known_job("3", partition="high"),
    ]
    _, out, _ = run("jobs", "list")
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["3", "1"]
    _, out, _ = run("jobs", "list", "--all")
    assert "bob" in out
    assert "gpu-[1-2]" in out
    _, out, _ = run("jobs", "list", "--queue", "high", "--json")
    assert [row["id"] for row in json.loads(out)] == ["3"]


def test_the_list_is_in_order_of_numbers(run: Run, slurm: TalkativeSlurm) -> None:
    """10 is newer than 9, also as an element of an array, and a requeue, which resets the time of submission, moves nothing."""
    slurm.kept = [
        *(known_job(n, array_job_id="15", array_task=i) for n, i in (("16", "9"), ("17", "10"), ("15", "11-20%2"))),
        known_job("9", submit_time=NOW),
        known_job("10"),
    ]
    _, out, _ = run("jobs", "list")
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["15_[11-20%2]", "15_10", "15_9", "10", "9"]


def test_an_unknown_queue_is_named(run: Run, slurm: TalkativeSlurm) -> None:
    """A queue that is not there is an error with the nearest name, not an empty list."""
    code, _, said = run("jobs", "list", "--queue", "hgih")
    assert code == 7
    assert "did you mean high?" in said


def test_an_empty_list_says_what_else_to_try(run: Run, slurm: TalkativeSlurm) -> None:
    """No jobs is said on standard error, so that scripts see nothing; JSON is an empty list."""
    code, out, said = run("jobs", "list")
    assert (code, out) == (0, "")
    assert "--all" in said
    assert json.loads(run("jobs", "list", "--json")[1]) == []


@pytest.mark.parametrize("verb", ["show", "why", "logs", "cancel"])
def test_an_unknown_job_is_answered_with_recent_ones(run: Run, slurm: TalkativeSlurm, verb: str) -> None:
    """Exit code 7, and the user's own recent jobs with names and states, from slurmctld and accounting."""
    slurm.kept = [known_job("41")]
    slurm.records = [AccountingRecord(id="40", raw_id="40", name="old", user="me", state="FAILED")]
    code, _, said = run("jobs", verb, "99")
    assert code == 7
    assert "41 (train, pending)" in said
    assert "40 (old, failed)" in said


def test_an_unknown_job_is_answered_without_accounting(slurm: TalkativeSlurm) -> None:
    """Where there is no accounting the answer is the same, with what slurmctld knows."""
    slurm.has_accounting = False
    with pytest.raises(NotFoundError, match="no such job"):
        find_job(slurm, "99", user="me")  # type: ignore[arg-type]


def test_a_name_means_its_newest_job(slurm: TalkativeSlurm) -> None:
    """Of several jobs of a name, mine come first, and of those the newest."""
    slurm.kept = [known_job("5"), known_job("7"), known_job("9", user="bob"), known_job("8", name="other")]
    assert find_job(slurm, "train", user="me").id == "7"  # type: ignore[arg-type]


def test_a_run_of_an_earlier_cluster_is_not_this_jobs(
    slurm: TalkativeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Job numbers begin at 1 again when a cluster is rebuilt: a script's number alone does not make it this job's."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "old" / "slurm"
    folder.mkdir(parents=True)
    (folder.parent / "job.yaml").write_text("name: old\n")
    (folder / "5_submission.sh").write_text("#!/bin/bash\n#SBATCH --job-name=old\n")
    slurm.records = [AccountingRecord(id="5", raw_id="5", name="new", user="me", state="COMPLETED")]
    assert find_job(slurm, "5", user="me").run_directory is None  # type: ignore[arg-type]
    slurm.records = [AccountingRecord(id="5", raw_id="5", name="old", user="me", state="COMPLETED")]
    assert find_job(slurm, "5", user="me").run_directory == folder.parent  # type: ignore[arg-type]
    slurm.kept = [known_job("5", name="old", stdout="/home/me/slurm-5.out")]
    assert find_job(slurm, "5", user="me").run_directory is None  # type: ignore[arg-type]


def test_elements_of_arrays_are_found(slurm: TalkativeSlurm) -> None:
    """`12_3` is that element and no other."""
    slurm.kept = [known_job(str(20 + i), array_job_id="12", array_task=str(i)) for i in range(4)]
    assert find_job(slurm, "12_3", user="me").job == slurm.kept[3]  # type: ignore[arg-type]


def test_cancelling_several_jobs_is_asked_about(run: Run, slurm: TalkativeSlurm) -> None:
    """One job goes at once; several need --yes where nobody can be asked; with an ended one among them none is cancelled."""
    slurm.kept = [known_job("1"), known_job("2"), known_job("3", state="COMPLETED")]
    assert run("jobs", "cancel", "1")[0] == 0
    code, _, said = run("jobs", "cancel", "1", "2")
    assert code == 3
    assert "--yes" in said
    code, _, said = run("jobs", "cancel", "1", "3", "--yes")
    assert code == 9
    assert "job 3 is completed" in said
    assert slurm.cancelled == ["1"]
    assert run("jobs", "cancel", "1", "2", "--yes")[0] == 0
    assert slurm.cancelled == ["1", "1", "2"]


def test_cancelling_a_whole_array_is_asked_about(run: Run, slurm: TalkativeSlurm) -> None:
    """The id of an array stands for many jobs."""
    slurm.kept = [known_job(str(20 + i), array_job_id="12", array_task=str(i)) for i in range(3)]
    assert run("jobs", "cancel", "12")[0] == 3
    assert slurm.cancelled == []


def test_a_name_stands_for_a_whole_array(run: Run, slurm: TalkativeSlurm) -> None:
    """Slurm gives the array's number to its last element too: by name or number it is the whole array that is asked about."""
    slurm.kept = [
        known_job("12", array_job_id="12", array_task="1"),
        known_job("13", array_job_id="12", array_task="0", state="COMPLETED"),
    ]
    for wanted in ("train", "12"):
        code, _, said = run("jobs", "cancel", wanted)
        assert code == 3
        assert "12 train, an array of 2" in said
    assert slurm.cancelled == []
    assert run("jobs", "cancel", "train", "--yes")[0] == 0
    assert slurm.cancelled == ["12"]
    slurm.kept = [known_job("12", array_job_id="12", array_task="0-9:3%2")]  # not split up yet: one record for all
    assert "an array of 4" in run("jobs", "cancel", "train")[2]


def test_the_element_that_stands_for_an_array_is_named(run: Run, slurm: TalkativeSlurm) -> None:
    """`why`, `show` and `logs` explain one element: the first that has not ended, else the first; they say which."""
    slurm.kept = [
        known_job("12", array_job_id="12", array_task="10"),
        known_job("13", array_job_id="12", array_task="0", state="COMPLETED"),
        known_job("14", array_job_id="12", array_task="9"),
    ]
    for verb in ("why", "show", "logs"):
        assert "array 12 has 3 elements; this is 12_9" in run("jobs", verb, "12")[2]
    assert "this is" not in run("jobs", "show", "12_9")[2]
    found = find_job(slurm, "train", user="me")  # type: ignore[arg-type]
    assert not found.is_ended(slurm.kept)
    assert found.is_ended([known_job("14", array_job_id="12", array_task="9", state="FAILED"), slurm.kept[0]])


def test_an_array_that_only_accounting_remembers_is_found(run: Run, slurm: TalkativeSlurm, monkeypatch: Any) -> None:
    """Its attempts are those of the element that is shown, not of all elements one after the other."""
    kept = [AccountingRecord(id=f"12_{i}", raw_id=str(13 - i), name="t", state="COMPLETED") for i in (0, 1)]
    monkeypatch.setattr(slurm, "accounting", lambda **_: kept)
    found = find_job(slurm, "12", user="me")  # type: ignore[arg-type]
    assert [record.id for record in found.records] == ["12_0"]
    assert "array 12 has 2 elements; this is 12_0" in run("jobs", "why", "12")[2]


def test_logs_of_a_run_are_found_by_rank(run: Run, slurm: TalkativeSlurm, tmp_path: Path) -> None:
    """A job of Muster's has a log for each rank; --lines takes the end; for a rank without one, those that have are said."""
    folder = tmp_path / "run" / "slurm"
    folder.mkdir(parents=True)
    (tmp_path / "run" / "job.yaml").write_text("name: x\n")
    (folder / "5_0_log.out").write_text("one\ntwo\nthree\n")
    (folder / "5_1_log.out").write_text("other\n")
    slurm.kept = [known_job("5", state="RUNNING", stdout=str(folder / "5_0_log.out"))]
    assert run("jobs", "logs", "5")[1] == "one\ntwo\nthree\n"
    assert run("jobs", "logs", "5", "-n", "1")[1] == "three\n"
    assert run("jobs", "logs", "5", "--rank", "1")[1] == "other\n"
    code, _, said = run("jobs", "logs", "5", "--rank", "2")
    assert code == 7
    assert "ranks 0 to 1 have" in said


def test_following_outlasts_a_hiccup_of_slurm(
    run: Run, slurm: TalkativeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A question that Slurm does not answer is not the end of the job: `logs -f` goes on, and shows what comes after it."""
    log = tmp_path / "log"
    log.write_text("before\n")
    slurm.kept = [known_job("5", state="RUNNING", stdout=str(log))]
    real, questions = slurm.jobs, 0

    def jobs(**wanted: Any) -> list[Job]:
        nonlocal questions
        questions += 1
        if questions == 2:  # the first finds the job
            log.write_text("before\nafter\n")
            raise CommandTimeout("squeue: no answer", argv=["squeue"], timeout_s=10)
        if questions > 2:
            slurm.kept = [known_job("5", state="COMPLETED", stdout=str(log))]
        return real(**wanted)

    monkeypatch.setattr(slurm, "jobs", jobs)
    monkeypatch.setattr(commands.time, "sleep", lambda _seconds: None)
    code, out, _ = run("jobs", "logs", "-f", "5")
    assert (code, out) == (0, "before\nafter\n")


def test_a_job_that_has_written_nothing_says_so(run: Run, slurm: TalkativeSlurm, tmp_path: Path) -> None:
    """Before it runs there is no log; the message leads to `why`."""
    slurm.kept = [known_job("5", stdout=str(tmp_path / "none.out"))]
    code, _, said = run("jobs", "logs", "5")
    assert code == 7
    assert "muster jobs why 5" in said


def test_an_empty_log_is_no_silence(run: Run, slurm: TalkativeSlurm, tmp_path: Path) -> None:
    """A log without a word in it is told from a command that did not work; standard output stays empty."""
    (tmp_path / "log").write_text("")
    slurm.kept = [known_job("5", state="RUNNING", stdout=str(tmp_path / "log"))]
    assert run("jobs", "logs", "5") == (0, "", "(nothing written yet)\n")
    slurm.kept = [known_job("5", state="COMPLETED", stdout=str(tmp_path / "log"))]
    assert run("jobs", "logs", "5") == (0, "", "(nothing written)\n")


def test_show_leaves_out_what_is_not_known(run: Run, slurm: TalkativeSlurm) -> None:
    """Names and values, none of them empty."""
    slurm.kept = [known_job("5", account="research", time_limit=timedelta(hours=2))]
    _, out, _ = run("jobs", "show", "5")
    assert "project          research" in out
    assert "time limit       2h" in out
    assert not [line for line in out.splitlines() if not line[16:].strip()]
    assert json.loads(run("jobs", "show", "5", "--json")[1])["job"]["id"] == "5"


def test_why_is_also_json(run: Run, slurm: TalkativeSlurm) -> None:
    """Scripts get the same answer in parts."""
    slurm.kept = [known_job("5")]
    answer = json.loads(run("jobs", "why", "5", "--json")[1])
    assert answer["job_id"] == "5"
    assert answer["state"] == "PENDING"


def test_why_tells_the_attempts_of_this_job_only(run: Run, slurm: TalkativeSlurm, tmp_path: Path) -> None:
    """An element's run directory keeps the attempts of earlier arrays too, under the raw numbers of their elements."""
    (tmp_path / "slurm").mkdir()
    element = tmp_path / "0"
    element.mkdir()
    for folder in (tmp_path, element):
        (folder / "job.yaml").write_text("name: train\n")
    begin = (
        '{{"event": "begin", "attempt": {}, "job_id": "{}", "time": "2026-11-21T12:00:00+00:00", "nodes": ["n{}"]}}\n'
    )
    (element / "attempts.jsonl").write_text(begin.format(1, 6, 1) + begin.format(2, 16, 2))
    log = str(tmp_path / "slurm" / "15_0_0_log.out")
    slurm.kept = [known_job("16", array_job_id="15", array_task="0", state="RUNNING", start_time=NOW, stdout=log)]
    out = run("jobs", "why", "15_0")[1]
    assert "attempt 2: " in out
    assert "attempt 1: " not in out


def test_clear_lets_a_run_try_again(run: Run, slurm: TalkativeSlurm, tmp_path: Path) -> None:
    """A run that has given up is cleared by its directory; one that has not is an error."""
    journal = RunDirectory(tmp_path)
    journal.give_up("it was the disk")
    assert run("jobs", "clear", str(tmp_path))[0] == 0
    assert journal.failure is None
    assert run("jobs", "clear", str(tmp_path))[0] == 9


# --- following ---------------------------------------------------------------------------------------------------------------


@given(st.lists(st.text("ab\n", max_size=20), max_size=6), st.integers(min_value=0, max_value=5))
def test_the_tail_is_the_last_lines(pieces: list[str], lines: int) -> None:
    """As many lines as asked for, whole, from the end; the offset is where the file ends."""
    import tempfile

    text = "".join(pieces)
    with tempfile.NamedTemporaryFile("w", suffix=".log") as file:
        file.write(text)
        file.flush()
        tail, offset = read_tail(Path(file.name), lines)
    expected = text.splitlines(keepends=True)
    assert tail == "".join(expected[len(expected) - min(lines, len(expected)) :])
    assert offset == len(text)


def test_following_goes_on_over_requeues_and_truncation(tmp_path: Path) -> None:
    """Everything is shown once: while the file is missing, grows, is emptied by a job without append mode, until the end."""
    path = tmp_path / "log"

    def add(text: str) -> None:
        with path.open("a") as file:
            file.write(text)

    script = iter(
        [
            lambda: None,
            lambda: path.write_text("attempt 1\n"),
            lambda: add("saved\n"),
            lambda: path.write_text("attempt 2\n"),
            lambda: add("done\n"),
        ]
    )
    over = False

    def sleep(_seconds: float) -> None:
        nonlocal over
        step = next(script, None)
        if step is None:
            over = True
        else:
            step()

    assert (
        "".join(follow(path, offset=0, is_over=lambda: over, sleep=sleep, ask_every=1))
        == "attempt 1\nsaved\nattempt 2\ndone\n"
    )


def test_characters_that_come_in_two_parts_are_whole(tmp_path: Path) -> None:
    """A log read between two bytes of a character shows the character, also where the first byte ended the tail."""
    path = tmp_path / "log"
    euro = "€".encode()
    path.write_bytes(b"5 " + euro[:1])
    parts = iter([euro[1:2], euro[2:] + b"\n", euro[:2]])
    over = False

    def sleep(_seconds: float) -> None:
        nonlocal over
        part = next(parts, None)
        over = part is None
        with path.open("ab") as file:
            file.write(part or b"")

    tail, offset = read_tail(path, None)
    shown = tail + "".join(follow(path, offset=offset, is_over=lambda: over, sleep=sleep, ask_every=1))
    assert shown == "5 €\n\N{REPLACEMENT CHARACTER}"


def test_the_last_words_are_not_missed(tmp_path: Path) -> None:
    """What is written between the job's end and the last look is still shown."""
    path = tmp_path / "log"
    path.write_text("")

    def is_over() -> bool:
        path.write_text("last words\n")
        return True

    assert list(follow(path, offset=0, is_over=is_over, sleep=lambda _s: None)) == ["last words\n"]


def test_the_commands_load_quickly() -> None:
    """Loading the verbs loads neither torch nor submitit nor pydantic models of training."""
    code = "import sys, jobs.commands; print([m for m in ('torch', 'submitit', 'numpy', 'jobs.settings') if m in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ended.stdout.strip() == "[]"
