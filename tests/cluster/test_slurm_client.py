"""SlurmCliClient: which command it spells, what it does with the answer, and what becomes of every refusal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import (
    CommandTimeout,
    InputError,
    MissingError,
    MusterError,
    NotFoundError,
    OutsideError,
    SlurmError,
    StateError,
)
from cluster.shell import CommandResult
from cluster.slurm import SlurmCliClient, SlurmClient
from cluster.slurm_text import SACCT_SEPARATOR

DATA = Path(__file__).parent.parent / "data" / "slurm"

Answer = str | tuple[int, str, str]
"""Standard output of a command that ended well, or exit status, standard output and standard error."""


class ScriptedShell:
    """Answers each command from a table: the longest beginning of the command line that is in it decides.

    A list of answers is used up one by one; its last one stays. Every command is kept in `calls`.
    """

    def __init__(self, answers: Mapping[str, Answer | list[Answer]], on_run: Callable[[], None] | None = None) -> None:
        self.answers = {key: list(value) if isinstance(value, list) else [value] for key, value in answers.items()}
        self.calls: list[dict[str, Any]] = []
        self._on_run = on_run

    def run(
        self,
        argv: Sequence[str],
        *,
        timeout_s: float,
        input_text: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        check: bool = True,
    ) -> CommandResult:
        line = " ".join(argv)
        self.calls.append(
            {"line": line, "timeout_s": timeout_s, "input": input_text, "env": dict(env or {}), "cwd": cwd}
        )
        if self._on_run:
            self._on_run()
        key = max((key for key in self.answers if line.startswith(key)), key=len, default=None)
        assert key is not None, f"no answer for {line}"
        answer = self.answers[key].pop(0) if len(self.answers[key]) > 1 else self.answers[key][0]
        returncode, stdout, stderr = (0, answer, "") if isinstance(answer, str) else answer
        return CommandResult(tuple(argv), returncode, stdout, stderr, 0.01)

    def lines(self) -> list[str]:
        return [call["line"] for call in self.calls]


def captured(name: str, version: str = "22.05.8") -> str:
    return (DATA / version / name).read_text(encoding="utf-8")


def client_22_05(**answers: Answer | list[Answer]) -> tuple[SlurmCliClient, ScriptedShell]:
    shell = ScriptedShell(
        {
            "scontrol --version": "slurm-wlm 22.05.8\n",
            "sinfo --all --json": captured("sinfo.json"),
            "squeue --all --states=all --json": captured("squeue.json"),
            "scontrol --all --oneliner show partitions": captured("scontrol_partitions.txt"),
            "scontrol --all --oneliner --details show jobs": captured("scontrol_jobs.txt"),
            "scontrol --all --oneliner --details show nodes": captured("scontrol_nodes.txt"),
            **{key.replace("_", " "): value for key, value in answers.items()},
        }
    )
    return SlurmCliClient(shell, environment={"MARK": "1"}), shell


@pytest.fixture(autouse=True)
def no_cluster_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_CONF", raising=False)


def test_the_client_is_what_the_protocol_asks_for() -> None:
    """Code written against SlurmClient takes SlurmCliClient."""
    client: SlurmClient = SlurmCliClient(ScriptedShell({}))
    assert client is not None


def test_queries_run_in_utc_with_the_clusters_environment() -> None:
    """Nobody's time zone or truncated array lists get into an answer."""
    client, shell = client_22_05()
    client.nodes()
    expected = {"MARK": "1", "TZ": "UTC", "SLURM_TIME_FORMAT": "%s", "SLURM_BITSTR_LEN": "0"}
    assert shell.calls[-1]["env"] == expected


def test_22_05_reads_nodes_from_sinfo_and_newer_ones_from_scontrol() -> None:
    """`sinfo --json` lists nodes only up to 22.05; afterwards it lists groups of them."""
    client, shell = client_22_05()
    assert len(client.nodes()) == 5
    assert shell.lines()[-1] == "sinfo --all --json"
    newer = ScriptedShell(
        {
            "scontrol --version": "slurm 25.11.2",
            "scontrol --all --json show nodes": captured("scontrol_nodes.json", "25.11"),
        }
    )
    assert SlurmCliClient(newer).node("low-st-p4d-2").is_draining
    assert newer.lines()[-1] == "scontrol --all --json show nodes low-st-p4d-2"


def test_a_slurm_built_without_json_is_read_as_text_and_asked_only_once() -> None:
    """The JSON serializer is a plugin that a packager may leave out."""
    client, shell = client_22_05(sinfo=(1, "", "sinfo: unrecognized option '--json'"))
    shell.answers["sinfo --all --json"] = [(1, "", "sinfo: unrecognized option '--json'")]
    assert [node.name for node in client.nodes()][-1] == "gpu-2"
    client.nodes()
    assert shell.lines().count("sinfo --all --json") == 1


def test_json_of_an_unknown_shape_falls_back_to_text() -> None:
    """An answer without the list of nodes is not an empty cluster."""
    client, shell = client_22_05()
    shell.answers["sinfo --all --json"] = ['{"sinfo": []}']
    assert len(client.nodes()) == 5


def test_an_empty_list_beside_an_error_is_no_empty_queue() -> None:
    """22.05 ends well and prints this where slurmctld is away (captured); text then tells the cause."""
    client, shell = client_22_05()
    error = '{"error": "Unspecified error", "error_number": -1, "source": "slurm_load_jobs"}'
    shell.answers["squeue --all --states=all --json"] = [f'{{"errors": [{error}], "jobs": []}}']
    shell.answers["scontrol --all --oneliner --details show jobs"] = [
        (1, "", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    ]
    with pytest.raises(SlurmError, match="scontrol ping"):
        client.jobs()


def test_an_answer_that_cannot_be_read_at_all_is_an_error() -> None:
    """Never an empty list in place of a cluster."""
    client, shell = client_22_05()
    shell.answers["sinfo --all --json"] = ["<html>"]
    shell.answers["scontrol --all --oneliner --details show nodes"] = ["<html>"]
    with pytest.raises(SlurmError, match="cannot be read"):
        client.nodes()


def test_nodes_asked_for_by_name_come_in_that_order_or_not_at_all() -> None:
    """A missing one is named, not left out."""
    client, _ = client_22_05()
    assert [node.name for node in client.nodes(["gpu-2", "gpu-1", "gpu-2"])] == ["gpu-2", "gpu-1"]
    with pytest.raises(NotFoundError, match=r"gpu-\[3-4\]"):
        client.nodes(["gpu-1", "gpu-3", "gpu-4"])


def test_jobs_are_filtered_by_every_condition() -> None:
    """22.05 ignores filters beside --json, so the client does it: by array, user, partition and node."""
    client, _ = client_22_05()
    assert {job.id for job in client.jobs(job_ids=["32", "17"])} == {"32", "22"}
    assert {job.id for job in client.jobs(partitions=["high"])} == {"24", "34"}
    assert {job.id for job in client.jobs(nodes=["gpu-2"], partitions=["low"])} >= {"31"}
    assert client.jobs(users=["nobody"]) == []


def test_one_job_of_22_05_is_read_as_text() -> None:
    """The text has the log paths that the JSON leaves out, and is one job instead of all of them."""
    one = next(line for line in captured("scontrol_jobs.txt").splitlines(keepends=True) if line.startswith("JobId=31 "))
    client, shell = client_22_05()
    shell.answers["scontrol --all --oneliner --details show job 31"] = [one]
    assert client.job("31").stdout == "/tmp/a/c/work/slurm-31.out"
    assert "squeue" not in " ".join(shell.lines())


def test_the_name_of_a_reason_that_text_hides_is_looked_up() -> None:
    """scontrol prints a description in place of the reason; squeue's JSON still has the reason."""
    one = next(line for line in captured("scontrol_jobs.txt").splitlines(keepends=True) if line.startswith("JobId=22 "))
    client, shell = client_22_05()
    shell.answers["scontrol --all --oneliner --details show job 17_1"] = [one]
    job = client.job("17_1")
    assert (job.reason, job.reason_detail) == ("JobHeldUser", "job requeued in held state")


def test_an_array_is_not_one_job() -> None:
    """Asking for one job by an id that stands for several says so and names them."""
    jobs = [line for line in captured("scontrol_jobs.txt").splitlines() if line.startswith("JobId=22 ")]
    text = jobs[0] + "\n" + jobs[0].replace("JobId=22 ", "JobId=21 ").replace("ArrayTaskId=1 ", "ArrayTaskId=0 ") + "\n"
    client, shell = client_22_05()
    shell.answers["scontrol --all --oneliner --details show job 17"] = [text]
    with pytest.raises(InputError, match="17_1, 17_0"):
        client.job("17")


def test_an_unknown_job_is_not_found() -> None:
    """`jobs` leaves it out, `job` raises."""
    client, shell = client_22_05()
    shell.answers["scontrol --all --oneliner --details show job 999"] = [
        (1, "", "slurm_load_jobs error: Invalid job id specified")
    ]
    assert client.jobs(job_ids=["999"]) == []
    with pytest.raises(NotFoundError, match="job 999"):
        client.job("999")


def test_accounting_asks_for_every_attempt_and_counts_them() -> None:
    """Duplicates are asked for, times go in UTC, and restarts are counted only where every attempt was asked for."""
    client, shell = client_22_05(sacct_=captured("sacct.txt"))
    shell.answers["sacct --helpformat"] = ["JobID Restart Submit"]
    records = [record for record in client.accounting(job_ids=["24", "17_0"], with_steps=True) if record.id == "24"]
    assert [(record.state, record.restarts) for record in records] == [("REQUEUED", 0), ("COMPLETED", 1)]
    line = shell.lines()[-1]
    assert "--duplicates" in line
    assert "--jobs=24,17_0" in line
    assert "--allocations" not in line
    moment = datetime(2026, 1, 2, 12, 0, tzinfo=timezone(timedelta(hours=9)))
    assert all(record.restarts is None for record in client.accounting(since=moment, users=["alice"]))
    line = shell.lines()[-1]
    assert "--starttime=2026-01-02T03:00:00" in line
    assert "--user=alice --allocations" in line
    assert shell.lines().count("sacct --helpformat") == 1


def test_restarts_of_newer_sacct_are_believed() -> None:
    """Where sacct has the column it is asked for and not counted over."""
    shell = ScriptedShell(
        {"sacct --helpformat": "JobID Restarts", "sacct": SACCT_SEPARATOR.join(["7", "7", *[""] * 20, "4"])}
    )
    assert [record.restarts for record in SlurmCliClient(shell).accounting(job_ids=["7"])] == [4]


def test_priorities_are_empty_where_there_are_none() -> None:
    """A job that sprio does not list, and a cluster without the multifactor plugin, are answers."""
    shell = ScriptedShell(
        {"sprio": [captured("sprio.txt"), "Unable to find jobs matching user/id(s) specified\n", (1, "", "boom")]}
    )
    client = SlurmCliClient(shell)
    assert len(client.priorities()) == 4
    assert client.priorities(["6"]) == []
    with pytest.raises(SlurmError, match="boom"):
        client.priorities()


def test_a_dead_controller_is_an_answer_of_ping() -> None:
    """scontrol ends with an error then; the status is read all the same."""
    shell = ScriptedShell({"scontrol ping": (1, "Slurmctld(primary) at head is DOWN\n", "")})
    assert [status.is_up for status in SlurmCliClient(shell).ping()] == [False]


def test_drain_says_nodes_and_reason_in_one_command() -> None:
    """Nodes are folded, the reason stays one argument whatever is in it."""
    client, shell = client_22_05(scontrol_update="")
    client.drain(["gpu-1", "gpu-2"], reason=' it\'s "bad" = x; $(y) ')
    assert shell.lines() == ['scontrol update NodeName=gpu-[1-2] State=DRAIN Reason=it\'s "bad" = x; $(y)']


@pytest.mark.parametrize("reason", ["", "  ", "two\nlines", "nul\0"])
def test_a_drain_without_a_readable_reason_is_refused(reason: str) -> None:
    """Nothing is sent to Slurm."""
    client, shell = client_22_05()
    with pytest.raises(InputError, match="reason"):
        client.drain(["gpu-1"], reason=reason)
    assert shell.calls == []


def test_resume_of_nodes_in_service_changes_nothing() -> None:
    """Slurm refuses the whole list for one such node; the others are resumed one by one."""
    client, shell = client_22_05()
    shell.answers["scontrol update NodeName=gone-02,gpu-1 State=RESUME"] = [
        (1, "", "slurm_update error: Invalid node state specified")
    ]
    shell.answers["scontrol update NodeName=gone-02 State=RESUME"] = [""]
    client.resume(["gone-02", "gpu-1"])
    assert shell.lines()[-1] == "scontrol update NodeName=gone-02 State=RESUME"
    assert "NodeName=gpu-1" not in " ".join(shell.lines())


def test_actions_on_jobs_spell_slurms_commands() -> None:
    """Requeue, hold, release, update and cancel, each as Slurm takes it."""
    client, shell = client_22_05(scontrol_="", scancel_="")
    shell.answers["scontrol"] = [""]
    shell.answers["scancel"] = [""]
    client.requeue("12")
    client.requeue("12_3", hold=True)
    client.hold("12")
    client.release("12_[1-3,5%2]")
    client.update_job("12", StartTime=datetime(2026, 1, 1, tzinfo=timezone.utc), ExcNodeList="gpu-[1-2]", Nice=5)
    client.cancel(["12", "13_1"])
    client.cancel(["12.0"], signal="USR2")
    client.cancel(["12"], signal="USR2", full=True)
    client.cancel(["12"], signal="9", batch=True)
    assert shell.lines() == [
        "scontrol requeue 12",
        "scontrol requeuehold 12_3",
        "scontrol hold 12",
        "scontrol release 12_[1-3,5%2]",
        "scontrol update JobId=12 StartTime=2026-01-01T00:00:00 ExcNodeList=gpu-[1-2] Nice=5",
        "scancel 12 13_1",
        "scancel --signal=USR2 12.0",
        "scancel --signal=USR2 --full 12",
        "scancel --signal=9 --batch 12",
    ]


@pytest.mark.parametrize(
    "act",
    [
        lambda client: client.cancel([]),
        lambda client: client.cancel(["--user=root"]),
        lambda client: client.cancel(["12"], full=True),
        lambda client: client.cancel(["12"], signal="USR2 --me"),
        lambda client: client.requeue("all"),
        lambda client: client.hold(""),
        lambda client: client.release("1,2"),
        lambda client: client.job("x"),
        lambda client: client.jobs(job_ids=["1 --json"]),
        lambda client: client.update_job("12"),
        lambda client: client.update_job("12", Comment="a\nb"),
        lambda client: client.drain([], reason="x"),
        lambda client: client.drain(["gpu-1,gpu-2"], reason="x"),
        lambda client: client.resume([]),
        lambda client: client.accounting(job_ids=["-a"]),
    ],
)
def test_wrong_arguments_reach_no_command(act: Callable[[SlurmCliClient], object]) -> None:
    """What is no id, node or signal is refused here; it might be an option, or an empty filter, to Slurm."""
    client, shell = client_22_05()
    with pytest.raises(InputError):
        act(client)
    assert shell.calls == []


def test_submit_gives_the_script_and_returns_the_id() -> None:
    """The script goes in on standard input, with the job's environment and not that of queries."""
    client, shell = client_22_05()
    shell.answers["sbatch"] = ["some plugin talks\n123;cluster\n"]
    job_id = client.submit("#!/bin/sh\n", arguments=["-p", "low"], environment={"A": "b"}, directory=Path("/tmp"))
    assert job_id == "123"
    (call,) = shell.calls
    assert call["line"] == "sbatch --parsable -p low"
    assert call["input"] == "#!/bin/sh\n"
    assert call["env"] == {"MARK": "1", "A": "b"}
    assert call["cwd"] == Path("/tmp")


def test_a_submission_without_an_id_is_an_error() -> None:
    """--test-only, for one, prints no id."""
    client, shell = client_22_05()
    shell.answers["sbatch"] = [(0, "", "sbatch: Job 27 to start at 2027-01-10T10:21:32")]
    with pytest.raises(SlurmError, match="no job id"):
        client.submit("#!/bin/sh\n")


BUSY: Answer = (1, "", "slurm_load_jobs error: Socket timed out on send/recv operation")


def test_a_busy_controller_is_asked_once_more_within_the_deadline() -> None:
    """The second try gets only what the first one left."""
    now = [0.0]
    shell = ScriptedShell(
        {"scontrol show config": [BUSY, "KillWait = 5 sec"]}, on_run=lambda: now.__setitem__(0, now[0] + 10)
    )
    client = SlurmCliClient(shell, timeout_s=25, clock=lambda: now[0])
    assert client.configuration() == {"KillWait": "5 sec"}
    assert [call["timeout_s"] for call in shell.calls] == [25, 15]


def test_a_controller_that_stays_busy_is_a_timeout() -> None:
    """Two tries, then the error says that it is load, not an outage."""
    shell = ScriptedShell({"scontrol show config": BUSY})
    with pytest.raises(CommandTimeout, match="too busy"):
        SlurmCliClient(shell).configuration()
    assert len(shell.calls) == 2


def test_no_second_try_when_the_deadline_is_used_up() -> None:
    """A caller who gave ten seconds waits ten seconds."""
    now = [0.0]
    shell = ScriptedShell({"scontrol show config": BUSY}, on_run=lambda: now.__setitem__(0, now[0] + 10))
    with pytest.raises(CommandTimeout):
        SlurmCliClient(shell, timeout_s=10.5, clock=lambda: now[0]).configuration()
    assert len(shell.calls) == 1


@pytest.mark.parametrize(
    "act",
    [
        lambda client: client.submit("#!/bin/sh\n"),
        lambda client: client.requeue("12"),
        lambda client: client.cancel(["12"], signal="USR2"),
    ],
)
def test_what_may_have_happened_is_not_done_twice(act: Callable[[SlurmCliClient], object]) -> None:
    """A timeout does not tell whether the job was submitted, requeued or signalled."""
    shell = ScriptedShell({"s": BUSY})
    with pytest.raises(CommandTimeout):
        act(SlurmCliClient(shell))
    assert len(shell.calls) == 1


def test_a_submission_that_times_out_warns_before_a_second_one() -> None:
    """The job may be there all the same."""

    class Hanging(ScriptedShell):
        def run(self, argv: Sequence[str], **settings: Any) -> CommandResult:
            raise CommandTimeout("sbatch: no answer within 5 s", argv=argv, timeout_s=5)

    with pytest.raises(CommandTimeout, match="squeue --me"):
        SlurmCliClient(Hanging({})).submit("#!/bin/sh\n")


def test_a_missing_slurm_conf_is_said_at_once(tmp_path: Path) -> None:
    """Slurm's own commands wait a minute for it."""
    shell = ScriptedShell({})
    client = SlurmCliClient(shell, environment={"SLURM_CONF": str(tmp_path / "slurm.conf")})
    for act in (client.version, client.ping, lambda: client.submit("#!/bin/sh\n")):
        with pytest.raises(MissingError, match="muster local env"):
            act()
    assert shell.calls == []


# Each is what 22.05.8 really prints (captured), with the exception it becomes and a word of the next step.
REFUSALS: list[tuple[str, type[MusterError], str]] = [
    ("slurm_load_jobs error: Invalid job id specified", NotFoundError, "sacct"),
    ("scancel: error: Kill job error on job id 999: Invalid job id specified", NotFoundError, "sacct"),
    ("slurm_update error: Invalid node name specified", NotFoundError, "sinfo -N"),
    ("Node zzz not found", NotFoundError, "sinfo -N"),
    ("Partition zz not found", NotFoundError, "sinfo -s"),
    ("sbatch: error: Batch job submission failed: Invalid partition name specified", SlurmError, "sinfo -s"),
    ("sbatch: error: Batch job submission failed: Invalid account or account/partition combination", SlurmError, "assoc"),
    ("sbatch: error: Batch job submission failed: Invalid qos specification", SlurmError, "assoc"),
    ("sbatch: error: Batch job submission failed: Requested node configuration is not available", SlurmError, "gres"),
    (
        "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size and/or "
        "time limits)",
        SlurmError,
        "limit",
    ),
    ("sbatch: error: Invalid generic resource (gres) specification", SlurmError, "GresTypes"),
    ("sbatch: error: Batch job submission failed: Invalid feature specification", SlurmError, "features"),
    ("sbatch: unrecognized option '--bogus'\nTry \"sbatch --help\" for more information", SlurmError, "manual"),
    ("Job is pending execution for job 6", StateError, "state"),
    ("slurm_suspend error: Job has already finished", StateError, "state"),
    ("slurm_update error: Invalid node state specified", StateError, "state"),
    ("scancel: error: Kill job error on job id 7: Job can not be altered now, try again later", StateError, "state"),
    ("scancel: error: Kill job error on job id 7: Access/permission denied", MissingError, "owner"),
    ("slurm_update error: Invalid user id", MissingError, "owner"),
    ("slurm_load_partitions: Unable to contact slurm controller (connect failure)", SlurmError, "scontrol ping"),
    (
        "scontrol: error: fetch_config: DNS SRV lookup failed\nscontrol: fatal: Could not establish a configuration source",
        MissingError,
        "muster local env",
    ),
    (
        "sacct: error: If munged is up, restart with --num-threads=10\nsacct: error: Munge encode failed: Failed to access "
        '"/run/munge/munge.socket.2": No such file or directory (Did you start munged?)\n'
        "sacct: error: slurm_persist_conn_open: failed to send persistent connection init message to 127.0.0.1:26819",
        SlurmError,
        "munge",
    ),
    ("Slurm accounting storage is disabled", MissingError, "slurmdbd"),
    ("sacct: error: slurm_persist_conn_open_without_init: failed to open persistent connection to host:localhost:6819: "
     "Connection refused", SlurmError, "slurmdbd does not answer"),
]  # fmt: skip


@pytest.mark.parametrize(("said", "error", "advice"), REFUSALS, ids=[said[:50] for said, _, _ in REFUSALS])
def test_slurms_refusals_keep_its_words_and_add_the_next_step(said: str, error: type[MusterError], advice: str) -> None:
    """The message has the command, what Slurm said, and what to do; the type decides the exit code."""
    shell = ScriptedShell({"scontrol": (1, "", said)})
    with pytest.raises(error) as caught:
        SlurmCliClient(shell).hold("7")
    assert type(caught.value) is error
    message = str(caught.value)
    assert message.startswith("scontrol hold 7: ")
    assert said.splitlines()[-1].split()[-1] in message
    assert advice in message


def test_a_refusal_nobody_foresaw_is_passed_on_whole() -> None:
    """No advice is better than wrong advice; exit status and words are there."""
    shell = ScriptedShell({"scontrol": (3, "", "the moon is in the wrong phase")})
    with pytest.raises(SlurmError, match=r"wrong phase \(exit status 3\)") as caught:
        SlurmCliClient(shell).hold("7")
    assert (caught.value.returncode, caught.value.exit_code) == (3, 5)
    assert isinstance(caught.value, OutsideError)


def test_errors_that_newer_versions_print_as_json_are_understood() -> None:
    """With --json, errors stand in the document on standard output."""
    shell = ScriptedShell(
        {
            "scontrol --version": "slurm 24.11.5",
            "scontrol --all --details --json show job 9": (
                1,
                '{"jobs": [], "errors": [{"error": "Invalid job id specified"}]}',
                "",
            ),
        }
    )
    with pytest.raises(NotFoundError):
        SlurmCliClient(shell).job("9")


def test_newer_versions_give_one_job_as_json() -> None:
    """scontrol has JSON there, with everything in it."""
    shell = ScriptedShell(
        {
            "scontrol --version": "slurm 24.11.5",
            "scontrol --all --details --json show job 101": captured("scontrol_jobs.json", "24.11"),
        }
    )
    client = SlurmCliClient(shell)
    assert client.job("101").stdout == "/fsx/alice/logs/101.out"
    assert client.expected_start("101") is None
