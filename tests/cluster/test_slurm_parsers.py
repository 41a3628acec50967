"""Slurm's answers become the same records whichever version and format they come in, and no text makes a parser fail."""

from __future__ import annotations

import json
from dataclasses import fields
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import slurm_json, slurm_text, slurm_values
from cluster.slurm_records import UNLIMITED, Job, Node

DATA = Path(__file__).parent.parent / "data" / "slurm"
CAPTURED = DATA / "22.05.8"
NEWER = ["23.02", "23.11", "24.11", "25.11"]


def read(name: str, version: str = "22.05.8") -> str:
    return (DATA / version / name).read_text(encoding="utf-8")


def captured_jobs() -> dict[str, Job]:
    parsed = slurm_text.parse_jobs_text(read("scontrol_jobs.txt"))
    assert parsed.problems == ()
    return {job.id: job for job in parsed.items}


def utc(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, timezone.utc)


def test_text_and_json_of_one_moment_give_the_same_nodes() -> None:
    """22.05's `sinfo --json` and `scontrol show nodes` differ in nothing but a load that Slurm rounds."""
    from_json = slurm_json.parse_nodes_json(read("sinfo.json"))
    from_text = slurm_text.parse_nodes_text(read("scontrol_nodes.txt"))
    assert from_json.problems == from_text.problems == ()
    assert [node.name for node in from_json.items] == ["gone-01", "gone-02", "gone-03", "gpu-1", "gpu-2"]
    assert from_json.items == from_text.items


def test_text_and_json_of_one_moment_give_the_same_jobs() -> None:
    """Where 22.05 gives a value in both formats it is the same one; the JSON leaves a few out."""
    from_json = slurm_json.parse_jobs_json(read("squeue.json"))
    from_text = captured_jobs()
    assert from_json.problems == ()
    assert {job.id for job in from_json.items} == set(from_text)
    for job in from_json.items:
        for name in (field.name for field in fields(Job)):
            value = getattr(job, name)
            if name == "reason" and job.reason_detail:  # scontrol prints the description in its place
                assert from_text[job.id].reason is None
            elif value is not None and value != ():
                assert value == getattr(from_text[job.id], name), (job.id, name)
    left_out = {"preempt_eligible_time", "stdout", "stderr", "nice"}
    assert all(getattr(job, name) is None for job in from_json.items for name in left_out)


def test_free_text_in_a_job_cannot_pretend_to_be_its_fields() -> None:
    """Names and comments with `Key=value`, quotes and line breaks stay what they are, and make no job of their own."""
    jobs = captured_jobs()
    assert jobs["1"].name == 'train: sd=1.4 "x" Ünï'
    assert jobs["1"].comment == "Reason=fake JobId=9 a=b c"
    assert jobs["1"].state == "FAILED"
    assert jobs["18"].name == "new\nline JobId=77"
    assert "77" not in jobs
    assert jobs["19"].name == "pipe|d UserId=x(0)"
    assert jobs["19"].user == "root"


def test_a_job_in_its_grace_time_shows_that_it_was_chosen() -> None:
    """preempt_time is set while the job still runs; it holds its GPUs on each node by index."""
    job = captured_jobs()["31"]
    assert job.state == "RUNNING"
    assert job.preempt_time is not None
    assert job.nodes == ("gpu-1", "gpu-2")
    assert job.gpus_by_node == {"gpu-1": (0, 1, 2), "gpu-2": (0, 1, 2)}
    assert job.gpu_count == 6
    assert job.exit_code is None


def test_pending_jobs_say_what_they_wait_for() -> None:
    """Reasons, dependencies, holds and array parts come through."""
    jobs = captured_jobs()
    assert (jobs["4"].reason, jobs["4"].dependency) == ("DependencyNeverSatisfied", "afterok:2(failed)")
    assert jobs["5"].is_held
    assert jobs["6"].reason == "BeginTime"
    assert (jobs["22"].is_held, jobs["22"].reason_detail) == (True, "job requeued in held state")
    assert jobs["22"].display_id == "17_1"
    assert jobs["32"].display_id == "32_[0,3,6,9%2]"
    assert jobs["32"].excluded_nodes == ("gpu-2",)
    assert jobs["7"].time_limit == UNLIMITED
    assert jobs["34"].is_pending


def test_a_requeued_job_keeps_count_and_the_code_of_its_last_attempt() -> None:
    """Restarts are read; code 75 survives the requeue."""
    jobs = captured_jobs()
    assert jobs["24"].restarts == 1
    assert jobs["19"].exit_code == 75
    assert (jobs["19"].restarts or 0) > 10


def test_a_drained_node_tells_who_when_and_why() -> None:
    """The reason may hold blanks, `=` and brackets; state words are told apart from it."""
    nodes = {node.name: node for node in slurm_text.parse_nodes_text(read("scontrol_nodes.txt")).items}
    node = nodes["gone-02"]
    assert node.reason == "Xid 79 on GPU 3 State=IDLE [x@y], ticket=12"
    assert node.reason_user == "root"
    assert node.reason_time is not None
    assert {"DRAIN", "NOT_RESPONDING"} <= node.states
    assert not node.is_usable
    assert nodes["gpu-1"].is_usable
    assert nodes["gpu-1"].gpus == {"a100": 4}
    assert nodes["gpu-1"].gpus_allocated == {"a100": 3}
    assert nodes["gpu-1"].reason_user is None


def test_partitions_carry_what_preemption_depends_on() -> None:
    """Tier, mode, grace, limits and who may use it."""
    parsed = slurm_text.parse_partitions_text(read("scontrol_partitions.txt"))
    assert parsed.problems == ()
    low, high, spare = parsed.items
    assert (low.name, low.tier, low.preempt_mode, low.grace_time) == ("low", 10, "REQUEUE", timedelta(seconds=10))
    assert (low.max_time, low.default_time, low.is_default) == (timedelta(days=2), timedelta(hours=1), True)
    assert (high.tier, high.preempt_mode, high.max_time, high.is_default) == (100, "OFF", UNLIMITED, False)
    assert (high.allow_accounts, low.allow_accounts) == (("main",), ())
    assert (spare.state, spare.nodes) == ("DOWN", ("gone-01", "gone-02", "gone-03"))


def test_every_attempt_of_a_requeued_job_is_in_the_accounting() -> None:
    """Attempts come in order, counted, with their steps behind them; a line break in a name splits no record."""
    parsed = slurm_text.parse_accounting(read("sacct.txt"))
    assert parsed.problems == ()
    records = slurm_text.count_restarts(slurm_text.order_attempts(parsed.items))
    first, second = [record for record in records if record.id == "24"]
    assert (first.state, first.restarts, first.elapsed) == ("REQUEUED", 0, timedelta(seconds=2))
    assert (second.state, second.restarts, second.elapsed) == ("COMPLETED", 1, timedelta(seconds=200))
    assert first.end_time == second.submit_time
    assert [record.id for record in records[records.index(first) :][:3]] == ["24", "24.batch", "24.0"]
    assert next(record for record in records if record.id == "18").name == "new\nline JobId=77"
    assert [record.restarts for record in records if record.id == "17_0"] == [0, 1]
    assert {record.raw_id for record in records if record.id == "17_0"} == {"21"}


def test_accounting_of_what_has_not_started_or_ended_leaves_it_open() -> None:
    """No node, no start, no end and no exit code are None, never 0 or a node called `None`."""
    records = slurm_text.parse_accounting(read("sacct.txt")).items
    waiting = next(record for record in records if record.id == "6")
    assert (waiting.nodes, waiting.start_time, waiting.end_time, waiting.exit_code) == ((), None, None, None)
    cancelled = slurm_text.parse_accounting(
        slurm_text.SACCT_SEPARATOR.join(
            {"JobID": "9", "State": "CANCELLED by 0"}.get(name, "") for name in slurm_text.SACCT_FIELDS
        )
    ).items[0]
    assert (cancelled.state, cancelled.cancelled_by) == ("CANCELLED", "0")


def test_priorities_configuration_ping_and_version_are_read() -> None:
    """The small answers, too, are those of the captured cluster."""
    priorities = slurm_text.parse_priorities(read("sprio.txt"))
    assert priorities.problems == ()
    urgent = next(priority for priority in priorities.items if priority.job_id == "34")
    assert (urgent.partition, urgent.priority) == ("high", 26891)
    assert urgent.factors["partition"] == 20000
    assert urgent.priority == sum(urgent.factors.values()) - 1  # Slurm adds before it rounds
    config = slurm_text.parse_configuration(read("scontrol_config.txt"))
    assert (config["RequeueExit"], config["PreemptMode"], config["KillWait"]) == ("75", "REQUEUE", "5 sec")
    assert config["AccountingStorageBackupHost"] == ""
    ping = slurm_text.parse_ping(read("scontrol_ping.txt"))
    assert [(status.role, status.is_up) for status in ping.items] == [("primary", True)]
    assert str(slurm_text.parse_version(read("scontrol_version.txt"))) == "22.05.8"
    newer = slurm_text.parse_version("slurm 24.11.0-0rc1")
    assert newer is not None
    assert (newer.release, newer.suffix) == ((24, 11), "-0rc1")
    assert slurm_text.parse_version("no version here") is None


@pytest.mark.parametrize("version", NEWER)
def test_newer_json_gives_the_same_nodes(version: str) -> None:
    """Wrapped numbers, lists of states and lists of features mean the same as the old plain ones."""
    parsed = slurm_json.parse_nodes_json(read("scontrol_nodes.json", version))
    assert parsed.problems == ()
    busy, bad = parsed.items
    assert (busy.state_text, bad.state_text) == ("MIXED", "IDLE+DRAIN+NOT_RESPONDING")
    assert (busy.gpus, busy.gpus_allocated, bad.gpus_allocated) == ({"a100": 8}, {"a100": 4}, {})
    assert busy.features == ("efa", "p4d")
    assert busy.boot_time == utc(1_764_000_000)
    assert (busy.memory_mb, busy.memory_free_mb, bad.memory_free_mb) == (1124352, 1000000, None)
    assert busy.cpu_load == 12.34
    assert (bad.reason, bad.reason_user, bad.reason_time) == ("muster: Xid 79 on GPU 3", "root", utc(1_764_001_200))
    assert (busy.reason, busy.reason_user, busy.reason_time) == (None, None, None)
    assert busy.instance_id == (None if version == "23.02" else "i-0123456789abcdef1")


@pytest.mark.parametrize("version", NEWER)
def test_newer_json_gives_the_same_jobs(version: str) -> None:
    """States as lists, verbose exit codes, infinite limits and arrays come out as they do from 22.05."""
    parsed = slurm_json.parse_jobs_json(read("scontrol_jobs.json", version))
    assert parsed.problems == ()
    running, pending, ending = parsed.items
    assert (running.state, running.restarts, running.time_limit) == ("RUNNING", 3, timedelta(days=2))
    assert running.gpus_by_node["low-st-p4d-2"] == (0, 1, 2, 3, 5, 6, 7)
    assert running.preempt_time == utc(1_764_005_000)
    assert running.exit_code is None
    assert running.array_job_id is None
    assert running.stdout == f"/fsx/alice/logs/{'101' if version >= '24.11' else '%j'}.out"
    assert (pending.display_id, pending.time_limit, pending.exit_code) == ("102_[1-9%2]", UNLIMITED, 75)
    assert (pending.planned_nodes, pending.excluded_nodes) == (("low-st-p4d-1",), ("low-st-p4d-2",))
    assert pending.end_time is None
    assert (ending.display_id, ending.state) == ("100_0", "COMPLETING")
    assert ending.flags == (frozenset() if version == "23.02" else frozenset({"FAILED"}))
    assert ending.exit_signal == 9
    assert ending.is_running
    assert not ending.is_ended


def test_what_cannot_be_read_is_named_and_the_rest_is_kept() -> None:
    """One broken field or record costs neither its neighbours nor silence."""
    parsed = slurm_json.parse_nodes_json(
        json.dumps(
            {
                "nodes": [{"name": "a", "state": ["IDLE"], "cpus": "many"}, {"state": ["IDLE"]}, 7],
                "errors": [{"error": "bad day"}],
            }
        )
    )
    assert [(node.name, node.cpus, node.is_usable) for node in parsed.items] == [("a", None, True)]
    text = "\n".join(parsed.problems)
    assert "bad day" in text
    assert "node a: cpus: cannot read 'many'" in text
    assert "a node without a usable 'name'" in text
    assert "nodes[2]: not an object: '7'" in text


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "null", '{"nodes": 1}', "{" * 100_000, "[" * 100_000, "slurm_load_node error"]
)
def test_text_that_is_no_answer_is_a_problem_not_an_empty_cluster(text: str) -> None:
    """Nothing readable is told apart from no nodes."""
    for parsed in (slurm_json.parse_nodes_json(text), slurm_json.parse_jobs_json(text)):
        assert parsed.items == ()
        assert parsed.problems


def test_an_empty_queue_is_no_problem() -> None:
    """No jobs is an answer, in both formats."""
    assert slurm_json.parse_jobs_json('{"jobs": [], "errors": []}').problems == ()
    assert slurm_text.parse_jobs_text("No jobs in the system\n").problems == ()
    assert slurm_text.parse_jobs_text("").problems == ()


def test_a_node_of_unknown_state_is_not_usable() -> None:
    """What could not be read is never taken for healthy."""
    assert not Node(name="a", states=frozenset()).is_usable
    assert not Node(name="a", states=slurm_values.read_node_states(None, 3)).is_usable
    assert not Node(name="a", states=slurm_values.read_node_states("IDLE*")).is_usable


@pytest.mark.parametrize(
    ("text", "gpus"),
    [
        ("gpu:a100:4(S:0-1)", {"a100": 4}),
        ("gpu:a100:2(IDX:0,3),gpu:h100:1(IDX:4)", {"a100": 2, "h100": 1}),
        ("gpu:8", {"": 8}),
        ("gpu", {"": 1}),
        ("gpu:a100:0(IDX:N/A)", {}),
        ("gres:gpu:a100:4", {"a100": 4}),
        ("gres/gpu:a100=4", {"a100": 4}),
        ("shard:8,gpu:nvidia_a100-sxm4-80gb:8", {"nvidia_a100-sxm4-80gb": 8}),
        ("(null)", {}),
        ("nogpu:4", {}),
        (None, {}),
    ],
)
def test_gpus_are_counted_by_type(text: str | None, gpus: dict[str, int]) -> None:
    """Every way of writing GRES that Slurm has gives a count by type."""
    assert slurm_values.read_gpus(text) == gpus


def test_gpus_of_tres_are_not_counted_twice() -> None:
    """`gres/gpu` is the sum of its types, not one more type."""
    assert slurm_values.read_tres_gpus({"gres/gpu": "8", "gres/gpu:a100": "8"}) == {"a100": 8}
    assert slurm_values.read_tres_gpus({"gres/gpu": "8", "gres/gpu:a100": "6"}) == {"a100": 6, "": 2}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("01:00:00", timedelta(hours=1)),
        ("2-00:00:00", timedelta(days=2)),
        ("05:30", timedelta(minutes=5, seconds=30)),
        ("1-12", timedelta(days=1, hours=12)),
        ("UNLIMITED", UNLIMITED),
        ("NONE", None),
        ("60", None),
        ("", None),
        (None, None),
    ],
)
def test_lengths_of_time_are_read_as_slurm_writes_them(text: str | None, expected: timedelta | None) -> None:
    """MM:SS is minutes and seconds; a bare number could be either and is refused."""
    assert slurm_values.read_clock(text) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (19200, (75, None)),
        (9, (0, 9)),
        ("75:0", (75, None)),
        ("0:15", (0, 15)),
        ({"return_code": {"set": True, "number": 75}, "signal": {"id": {"set": False, "number": 0}}}, (75, None)),
        ({"return_code": 0, "signal": {"signal_id": 9}}, (0, 9)),
        ("", (None, None)),
        (None, (None, None)),
        ([], (None, None)),
    ],
)
def test_exit_status_in_every_form(value: object, expected: tuple[int | None, int | None]) -> None:
    """A raw wait status, `code:signal` and both verbose objects agree."""
    assert slurm_values.read_exit_status(value) == expected


@pytest.mark.parametrize(
    "value", [4294967294, -2, {"set": False, "infinite": False, "number": 0}, "N/A", None, "", True, float("nan")]
)
def test_slurms_no_value_is_none(value: object) -> None:
    """NO_VAL and its disguises never become a number."""
    assert slurm_values.read_count(value) is None
    assert slurm_values.read_time(value) is None


JSON_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["gpu:8", "n[1-3", "IDLE+DRAIN", "1:0"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["set", "infinite", "number", "id", "signal", "return_code"]) | st.text(max_size=3),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)
JOB_KEYS = sorted({key for job in json.loads((CAPTURED / "squeue.json").read_text())["jobs"] for key in job})
NODE_KEYS = sorted({key for node in json.loads((CAPTURED / "sinfo.json").read_text())["nodes"] for key in node})


@given(
    st.dictionaries(st.sampled_from(JOB_KEYS), JSON_VALUES), st.dictionaries(st.sampled_from(NODE_KEYS), JSON_VALUES)
)
def test_no_json_makes_a_parser_fail(job: dict[str, Any], node: dict[str, Any]) -> None:
    """Any value in any field is read or named; the record itself stays."""
    jobs = slurm_json.parse_jobs_json(json.dumps({"jobs": [{"job_id": 1, **job}]}))
    nodes = slurm_json.parse_nodes_json(json.dumps({"nodes": [{"name": "a", **node}]}))
    assert len(jobs.items) + len(jobs.problems) >= 1
    assert len(nodes.items) + len(nodes.problems) >= 1
    for record in (*jobs.items, *nodes.items):
        assert repr(record)


LINES = (
    read("scontrol_jobs.txt") + read("scontrol_nodes.txt") + read("scontrol_partitions.txt") + read("sprio.txt")
).splitlines()


@given(st.text() | st.lists(st.sampled_from(LINES) | st.text(max_size=30), max_size=4).map("\n".join), st.data())
def test_no_text_makes_a_parser_fail(text: str, data: st.DataObject) -> None:
    """Any text, also real output cut anywhere, gives records and problems, never an exception."""
    text = text[data.draw(st.integers(0, len(text))) :]
    slurm_text.parse_nodes_text(text)
    slurm_text.parse_jobs_text(text)
    slurm_text.parse_partitions_text(text)
    slurm_text.parse_priorities(text)
    slurm_text.parse_accounting(text)
    slurm_text.parse_accounting(text.replace(" ", slurm_text.SACCT_SEPARATOR))
    slurm_text.parse_configuration(text)
    slurm_text.parse_ping(text)
    slurm_text.parse_version(text)
    slurm_json.parse_jobs_json(text)


@given(st.binary(max_size=200))
def test_cut_accounting_loses_no_whole_record(noise: bytes) -> None:
    """Noise behind good records leaves them as they are."""
    good = read("sacct.txt")
    whole = slurm_text.parse_accounting(good).items
    mixed = slurm_text.parse_accounting(good + noise.decode("utf-8", "replace").replace(slurm_text.SACCT_SEPARATOR, ""))
    assert mixed.items[: len(whole)] == whole
