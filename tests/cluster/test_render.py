"""What Slurm's configuration is made of, compared with files that people have read.

After a wanted change: MUSTER_WRITE_GOLDEN=1 pytest tests/cluster/test_render.py, and read the diff.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import InputError
from cluster.render import SlurmSite, accounting_plan, render_slurm
from cluster.settings import ClusterSpec, load_spec

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "data" / "golden"
SITE = SlurmSite(version=(22, 5), controller_host="head-1")
LOOPBACK_SITE = SlurmSite(
    version=(22, 5),
    controller_host="vm",
    controller_address="127.0.0.1",
    controller_port=10_000,
    node_address="127.0.0.1",
    first_node_port=10_002,
    database_daemon_address="127.0.0.1",
    database_daemon_port=10_001,
    slurm_user="ada",
    slurmd_user="ada",
    state_directory=Path("/s/slurmctld"),
    spool_directory="/s/spool/%n",
    log_directory=Path("/s/logs"),
    run_directory=Path("/s/run"),
    munge_socket=Path("/s/munge/munge.socket"),
    gpu_device="/s/dev/nvidia",
    loopback_only=True,
    several_slurmd_per_machine=True,
    simulated_hardware=True,
    tree_width=65_533,
    process_tracking="proctrack/linuxproc",
    task_plugin="task/none",
    job_accounting="jobacct_gather/linux",
    parameters={"MailProg": "/bin/true"},
)

RICH = {
    "name": "stability",
    "pools": [
        {"name": "gpu", "nodes": 64, "instance_type": "p4d.24xlarge", "cpus_per_node": 96, "memory_gb_per_node": 1152},
        {"name": "cpu", "nodes": 1, "gpus_per_node": 0, "cpus_per_node": 48, "memory_gb_per_node": 96},
        {"name": "trn", "nodes": 2, "gpus_per_node": 1, "gpu_model": "trainium"},
    ],
    "queues": [
        {"name": "high", "pools": ["gpu", "trn"], "tier": 100, "projects": ["vision", "audio"], "default_time": "1h"},
        {"name": "low", "pools": ["gpu", "trn"], "preemption": "requeue", "grace": "90s", "minimum_run": "10m", "time_limit": "7d"},
        {"name": "scavenge", "pools": ["gpu"], "tier": 1, "preemption": "cancel"},
        {"name": "prep", "pools": ["cpu"], "default": True},
    ],
    "projects": [
        {"name": "vision", "users": ["ada", "bob"], "share": 3, "max_gpus": 256, "description": "pictures, moving ones too"},
        {"name": "audio", "users": ["bob"]},
    ],
    "scheduling": {"user_signal_on_preemption": True},
}  # fmt: skip


def spec_of(**changes: Any) -> ClusterSpec:
    return ClusterSpec.model_validate({**RICH, **changes})


def settings_of(text: str) -> dict[str, str]:
    """Return the settings of a slurm.conf that stand alone on their line."""
    lines = [line for line in text.splitlines() if line and not line.startswith(("#", "NodeName", "PartitionName"))]
    pairs = [line.split("=", 1) for line in lines]
    assert len({key for key, _ in pairs}) == len(pairs), "Slurm takes the last of two equal keys without a word"
    return dict(pairs)


def lines_of(text: str, kind: str) -> dict[str, dict[str, str]]:
    """Return the NodeName or PartitionName lines by name."""
    found = [
        dict(word.split("=", 1) for word in line.split()) for line in text.splitlines() if line.startswith(f"{kind}=")
    ]
    return {line[kind]: line for line in found}


@pytest.mark.parametrize(
    ("case", "spec", "site"),
    [
        ("local-demo", load_spec(ROOT / "templates" / "cluster" / "local-demo.yaml"), LOOPBACK_SITE),
        ("rich-22.05", spec_of(), SITE),
        ("rich-25.11", spec_of(), SlurmSite(version=(25, 11), controller_host="head-1", munge_socket=Path("/run/m.sock"))),
        ("no-accounting", spec_of(accounting={"enabled": False}, queues=RICH["queues"][:2]), SlurmSite(version=(23, 11), controller_host="vm", simulated_hardware=True)),
    ],
)  # fmt: skip
def test_every_file_is_as_it_was_last_read_by_a_person(case: str, spec: ClusterSpec, site: SlurmSite) -> None:
    """A change of any generated file shows in a diff of tests/data/golden."""
    files = render_slurm(spec, site)
    directory = GOLDEN / "slurm" / case
    if os.environ.get("MUSTER_WRITE_GOLDEN"):
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (directory / name).write_text(text)
    assert files == {path.name: path.read_text() for path in sorted(directory.iterdir())}


@settings(deadline=None, max_examples=40)  # each example compiles the templates
@given(
    preemption=st.sampled_from(["off", "OFF", False, "requeue", "cancel"]),
    grace=st.timedeltas(min_value=timedelta(0), max_value=timedelta(hours=1)),
    tier=st.integers(min_value=1, max_value=65_533),
)
def test_a_queue_keeps_its_meaning_through_yaml_and_rendering(preemption: object, grace: timedelta, tier: int) -> None:
    """PreemptMode is a word of Slurm's however it was written, a grace above 0 never becomes 0, and REQUEUE is on globally."""
    queue = {"name": "low", "pools": ["gpu"], "preemption": preemption, "grace": grace, "tier": tier}
    text = render_slurm(spec_of(queues=[queue]), SITE)["slurm.conf"]
    line = lines_of(text, "PartitionName")["low"]
    assert line["PreemptMode"] in {"OFF", "REQUEUE", "CANCEL"}
    assert line["PreemptMode"] == ("OFF" if preemption is False else str(preemption).upper())
    assert (int(line["GraceTime"]) > 0) == (grace > timedelta(0))
    assert int(line["GraceTime"]) >= grace.total_seconds()
    assert line["PriorityTier"] == str(tier)
    assert settings_of(text)["PreemptMode"] == ("OFF" if line["PreemptMode"] == "OFF" else "REQUEUE")


def test_no_preemption_anywhere_turns_the_plugin_off() -> None:
    """Queues that never preempt leave Slurm without a preemption plugin."""
    settings = settings_of(render_slurm(spec_of(queues=[{"name": "only", "pools": ["gpu"]}]), SITE)["slurm.conf"])
    assert (settings["PreemptType"], settings["PreemptMode"]) == ("preempt/none", "OFF")


@pytest.mark.parametrize(
    ("version", "key", "value"),
    [
        ((22, 5), "SlurmctldParameters", "preempt_send_user_signal"),
        ((23, 2), "SlurmctldParameters", "preempt_send_user_signal"),
        ((23, 11), "PreemptParameters", "send_user_signal"),
        ((25, 11), "PreemptParameters", "send_user_signal"),
    ],
)
def test_the_user_signal_option_stands_where_the_version_wants_it(
    version: tuple[int, int], key: str, value: str
) -> None:
    """Slurm 22.05 ends with a fatal error on PreemptParameters; newer versions have moved the option there."""
    settings = settings_of(render_slurm(spec_of(), SlurmSite(version=version, controller_host="h"))["slurm.conf"])
    assert settings[key] == value
    other = {"SlurmctldParameters", "PreemptParameters"} - {key}
    assert not other & settings.keys()
    off = settings_of(
        render_slurm(spec_of(scheduling={}), SlurmSite(version=version, controller_host="h"))["slurm.conf"]
    )
    assert not {"SlurmctldParameters", "PreemptParameters"} & off.keys()


def test_priorities_mean_something() -> None:
    """No multifactor weight is left at Slurm's zero, and queues differ in their factor."""
    text = render_slurm(spec_of(), SITE)["slurm.conf"]
    weights = {key: int(value) for key, value in settings_of(text).items() if key.startswith("PriorityWeight")}
    assert len(weights) == 5
    assert all(weights.values())
    partitions = lines_of(text, "PartitionName")
    assert int(partitions["high"]["PriorityJobFactor"]) > int(partitions["low"]["PriorityJobFactor"])


def test_backfill_sees_past_the_longest_limit() -> None:
    """bf_window covers the longest time limit in minutes; without limits it is Slurm's day."""
    parameters = settings_of(render_slurm(spec_of(), SITE)["slurm.conf"])["SchedulerParameters"].split(",")
    assert "bf_window=10080" in parameters
    assert "bf_resolution=420" in parameters
    unlimited = spec_of(queues=[{"name": "only", "pools": ["gpu"]}])
    assert "bf_window=1440" in settings_of(render_slurm(unlimited, SITE)["slurm.conf"])["SchedulerParameters"].split(
        ","
    )


def test_ports_of_nodes_do_not_overlap_between_pools() -> None:
    """Every node has a port of its own, counted through all pools."""
    nodes = lines_of(render_slurm(spec_of(), LOOPBACK_SITE)["slurm.conf"], "NodeName")
    assert {name: line["Port"] for name, line in nodes.items()} == {
        "gpu-[1-64]": "[10002-10065]",
        "cpu-1": "10066",
        "trn-[1-2]": "[10067-10068]",
    }


def test_memory_is_shared_out_by_cpus() -> None:
    """A job that asks for no memory does not take the whole node's: DefMemPerCPU is the smallest pool's part."""
    partitions = lines_of(render_slurm(spec_of(), SITE)["slurm.conf"], "PartitionName")
    assert partitions["prep"]["DefMemPerCPU"] == str(96 * 1024 // 48)
    assert partitions["high"]["DefMemPerCPU"] == str(64 * 1024 // 16)


def test_a_queue_of_some_projects_is_closed_to_the_others() -> None:
    """queue.projects become AllowAccounts; without accounting there are no accounts to allow."""
    partitions = lines_of(render_slurm(spec_of(), SITE)["slurm.conf"], "PartitionName")
    assert partitions["high"]["AllowAccounts"] == "vision,audio"
    assert "AllowAccounts" not in partitions["low"]
    without = render_slurm(spec_of(accounting={"enabled": False}, queues=RICH["queues"][:2]), SITE)["slurm.conf"]
    assert "AllowAccounts" not in without
    assert "QOS=" not in without.replace("PriorityWeightQOS=", "")


def test_without_accounting_one_minimum_run_holds_for_all() -> None:
    """PreemptExemptTime is global then: equal values are taken over, different ones are an error that names them."""
    queues = [
        {"name": "a", "pools": ["gpu"], "preemption": "requeue", "minimum_run": "10m"},
        {"name": "b", "pools": ["gpu"]},
    ]
    off = {"enabled": False}
    settings = settings_of(render_slurm(spec_of(queues=queues, accounting=off), SITE)["slurm.conf"])
    assert settings["PreemptExemptTime"] == "0-00:10:00"
    queues.append({"name": "c", "pools": ["gpu"], "preemption": "cancel"})
    with pytest.raises(InputError, match=r"minimum_run.*0 s, 600 s.*accounting\.enabled"):
        render_slurm(spec_of(queues=queues, accounting=off), SITE)


@pytest.mark.parametrize("character", [" ", "#", "[", ",", "=", "'"])
def test_paths_that_slurm_conf_cannot_carry_are_refused(character: str) -> None:
    """A blank would cut the value off, a # start a comment, a bracket expand: the message shows which character it is."""
    site = SlurmSite(version=(22, 5), controller_host="h", log_directory=Path(f"/var/log{character}x"))
    with pytest.raises(InputError) as caught:
        render_slurm(spec_of(), site)
    assert repr(character) in str(caught.value)


@pytest.mark.parametrize(("hold", "seconds"), [("0", 5), ("4s", 5), ("5s", 5), ("2m", 120)])
def test_the_requeue_hold_is_never_below_what_slurm_takes(hold: str, seconds: int) -> None:
    """A shorter cred_expire is thrown away by Slurm, which then holds requeued jobs for two minutes."""
    text = render_slurm(spec_of(scheduling={"requeue_hold": hold}), SITE)["slurm.conf"]
    assert settings_of(text)["AuthInfo"] == f"cred_expire={seconds}"


def test_no_file_holds_a_password() -> None:
    """Secrets are no part of what is rendered."""
    for site in (SITE, LOOPBACK_SITE):
        for text in render_slurm(spec_of(), site).values():
            assert not [line for line in text.splitlines() if line.startswith("StoragePass=")]


def test_the_accounting_plan_says_everything_of_the_description() -> None:
    """A QOS for each queue, before slurmctld; accounts with share and limit, and members, after it."""
    plan = accounting_plan(spec_of(), ["eve", "bob"])
    before = [call.arguments for call in plan.before_controller]
    assert before[0] == ("add", "cluster", "stability")
    assert [call[2] for call in before[1:]] == ["high", "low", "scavenge", "prep"]
    assert "PreemptExemptTime=0-00:10:00" in before[2]
    assert "PreemptExemptTime=-1" in before[1]
    assert [call.arguments for call in plan.after_controller] == [
        ("add", "account", "vision", "Cluster=stability", "Description=pictures, moving ones too", "Organization=stability", "Fairshare=3", "GrpTRES=gres/gpu=256"),
        ("add", "user", "ada,bob,eve", "Account=vision", "Cluster=stability"),
        ("add", "account", "audio", "Cluster=stability", "Description=audio", "Organization=stability", "Fairshare=1", "GrpTRES=gres/gpu=-1"),
        ("add", "user", "bob,eve", "Account=audio", "Cluster=stability"),
    ]  # fmt: skip


def test_a_removed_limit_is_taken_away_again() -> None:
    """Applied a second time, a project without max_gpus sets the limit to -1, which is none, instead of leaving the old one."""
    audio = accounting_plan(spec_of()).after_controller[2]
    assert audio.if_present[:3] == ("modify", "account", "audio")
    assert audio.if_present[-2:] == ("Fairshare=1", "GrpTRES=gres/gpu=-1")


def test_root_is_led_out_of_its_own_account() -> None:
    """Slurm itself puts root into account root, so root's jobs would count for no project: its default is changed once."""
    calls = [call.arguments for call in accounting_plan(spec_of(), ["root"]).after_controller]
    assert [call for call in calls if call[:3] == ("modify", "user", "root")] == [
        ("modify", "user", "root", "where", "Cluster=stability", "set", "DefaultAccount=vision")
    ]


def test_a_cluster_without_projects_has_an_account_for_everyone() -> None:
    """With limits enforced, nobody could submit otherwise."""
    calls = [
        call.arguments
        for call in accounting_plan(spec_of(projects=[], queues=[RICH["queues"][1]]), ["ada"]).after_controller
    ]
    assert calls[1] == ("add", "user", "ada", "Account=everyone", "Cluster=stability")


def test_without_accounting_there_is_nothing_to_plan() -> None:
    """The plan is empty, so that nobody calls sacctmgr where there is no database."""
    plan = accounting_plan(spec_of(accounting={"enabled": False}), ["ada"])
    assert (plan.before_controller, plan.after_controller) == ((), ())
