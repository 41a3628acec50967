"""Job descriptions: what may be written, and what each mistake is answered with."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InputError, JobError
from cluster.settings import ClusterSpec
from cluster.yamlfile import dump_yaml
from jobs.jobspec import JobSpec, make_job, read_job, set_value
from jobs.queues import check_job, choose_account, find_cluster, place

CLUSTER = ClusterSpec.model_validate(
    {
        "name": "demo",
        "target": "aws",
        "pools": [
            {"name": "gpu", "nodes": 4, "gpus_per_node": 8, "cpus_per_node": 32, "memory_gb_per_node": 64},
            {"name": "cpu", "nodes": 2, "gpus_per_node": 0, "cpus_per_node": 8, "memory_gb_per_node": 16},
        ],
        "queues": [
            {"name": "high", "pools": ["gpu"], "tier": 100, "default_time": "1h", "projects": ["vision"]},
            {"name": "low", "pools": ["gpu"], "tier": 10, "time_limit": "48h", "default": True},
            {"name": "prepare", "pools": ["cpu"]},
        ],
        "projects": [
            {"name": "vision", "users": ["alice"], "max_gpus": 16},
            {"name": "audio", "users": ["alice", "bob"]},
        ],
    }
)


def job(**values: Any) -> JobSpec:
    return make_job({"name": "job", "command": ["true"], **values})


def write(folder: Path, text: str, name: str = "job.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def refusal(**values: Any) -> str:
    with pytest.raises(JobError) as caught:
        job(**values)
    return str(caught.value)


def test_the_shortest_job_has_sensible_defaults() -> None:
    """A command gets no GPU and one task; an entry point one GPU and a task for each."""
    assert (job().gpus, job().tasks) == (0, 1)
    training = make_job({"name": "t", "entry": "jobs.train"})
    assert (training.gpus, training.tasks, training.kind) == (1, 1, "training")
    assert make_job({"name": "t", "entry": "jobs.train", "gpus_per_node": 8}).tasks == 8


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"nodes": 0}, ["nodes (0)", "greater than or equal to 1"]),
        ({"name": "my job"}, ["name (my job)", "letters, digits", "rename it"]),
        ({"name": "../x"}, ["name (../x)", "rename it"]),
        ({"time": 90}, ["time (90)", "write it like 90s"]),
        ({"time": "30s"}, ["time is 30s", "write 1m or more"]),
        ({"time": "5m", "warning": "10m"}, ["warning (10m)", "shorter than time (5m)"]),
        ({"command": "python x.py"}, ["command (python x.py)", "must be a list", "[python, script.py]"]),
        ({"command": []}, ["either entry or command"]),
        ({"entry": "jobs.train"}, ["has both entry and command", "leave one of them out"]),
        ({"entry": "jobs/train.py", "command": []}, ["entry (jobs/train.py)", "module:function"]),
        ({"config": {"a": 1}}, ["config goes to an entry point", "in arguments"]),
        ({"environment": {"RANK": "0"}}, ["RANK is set by Muster", "leave it out"]),
        ({"environment": {"SLURM_NTASKS": "0"}}, ["SLURM_NTASKS is set by Slurm"]),
        ({"environment": {"CUDA_VISIBLE_DEVICES": "0"}}, ["CUDA_VISIBLE_DEVICES is set by Slurm"]),
        ({"environment": {"HF_TOKEN": "abc"}}, ["HF_TOKEN looks like a secret", "export HF_TOKEN in the shell"]),
        ({"environment": {"1A": "x"}}, ["'1A' is no name of a variable"]),
        ({"dependency": "after:job1"}, ["dependency (after:job1)", "afterok:1234"]),
        ({"array": 0}, ["array.tasks (0)"]),
        ({"array": {"at_once": 2}}, ["either tasks or each"]),
        ({"slurm": {"partition": "x"}}, ["partition has a field of its own", "write queue"]),
        ({"slurm": {"open-mode": "truncate"}}, ["open-mode is what makes a job survive preemption"]),
        ({"gpu_per_node": 8}, ["gpu_per_node", "did you mean gpus_per_node"]),
        ({"exclude": 3}, ["exclude (3)"]),
        ({"retries": -1}, ["retries (-1)"]),
    ],
)  # fmt: skip
def test_each_wrong_value_is_named_with_rule_and_next_step(values: dict[str, Any], said: list[str]) -> None:
    """The message holds the value, the rule and what to write instead."""
    text = refusal(**values)
    assert all(part in text for part in said), text


def test_a_secret_value_is_not_repeated_in_the_message() -> None:
    """The message about a secret names the variable and never its value."""
    assert "hunter2" not in refusal(environment={"DB_PASSWORD": "hunter2"})


def test_every_mistake_has_its_line(tmp_path: Path) -> None:
    """All mistakes of a file come in one message, each with its line."""
    path = write(tmp_path, "name: a b\ncommand: [true]\nnodes: many\ntimes: 1h\n")
    with pytest.raises(JobError) as caught:
        read_job(path)
    text = str(caught.value)
    assert "3 mistakes" in text
    assert "line 1: name" in text
    assert "line 3: nodes" in text
    assert "line 4: times" in text


def test_numbers_in_a_command_become_words() -> None:
    """`[python, x.py, --steps, 3]` means the text 3; a YAML true becomes `true`."""
    assert job(command=["x", 3, 0.5, True]).command == ("x", "3", "0.5", "true")
    assert job(environment={"A": 1, "B": True}).environment == {"A": "1", "B": "true"}


def test_set_reaches_mappings_lists_and_new_keys(tmp_path: Path) -> None:
    """--set makes mappings on the way, counts in lists, and reads values as YAML 1.2."""
    path = write(tmp_path, "name: t\nentry: jobs.train\nconfig: {data: {directory: /d}, betas: [0.9, 0.99]}\n")
    spec = read_job(
        path,
        overrides=[
            "config.steps=500",
            "config.betas.1=0.95",
            "exclude=[n1, n2]",
            "config.model.channels=[8]",
            "environment.MODE=NO",
        ],
    )
    assert spec.config == {"data": {"directory": "/d"}, "betas": [0.9, 0.95], "steps": 500, "model": {"channels": [8]}}
    assert spec.exclude == ("n1", "n2")
    assert spec.environment == {"MODE": "NO"}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("nodes", "is not key=value"),
        ("=3", "is not key=value"),
        ("name.x=1", "has no 'x' in it"),
        ("command.7=x", "list of 1; write a number from 0 to 0"),
        ("command.a=x", "list of 1"),
        ("config=[", "is not YAML"),
        ("nodes=zero", "  --set nodes (zero)"),
        ("container.images=x", "  --set container.images: no such key here; did you mean image?"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, override: str, said: str) -> None:
    """A mistake in --set is answered with the override itself."""
    path = write(tmp_path, "name: t\ncommand: [true]\n")
    with pytest.raises(JobError) as caught:
        read_job(path, overrides=[override])
    assert said in str(caught.value)


def test_config_may_be_a_file_of_its_own(tmp_path: Path) -> None:
    """A name under `config` is read from beside the job's file, and --set goes into what it holds."""
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub", "steps: 10\nseed: 1\n", "train.yaml")
    path = write(tmp_path, "name: t\nentry: jobs.train\nconfig: sub/train.yaml\n")
    assert read_job(path, overrides=["config.steps=20"]).config == {"steps": 20, "seed": 1}


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    """A job file, or a config file, that is not there is named."""
    with pytest.raises(InputError, match=r"nothing\.yaml"):
        read_job(tmp_path / "nothing.yaml")
    path = write(tmp_path, "name: t\nentry: jobs.train\nconfig: nothing.yaml\n")
    with pytest.raises(InputError, match=r"nothing\.yaml"):
        read_job(path)


def test_elements_of_an_array_differ_as_told() -> None:
    """`each` sets dotted keys, `{index}` counts, and no element is an array itself."""
    sweep = make_job(
        {"name": "s", "entry": "jobs.train", "config": {"seed": 0, "steps": 5}, "array": [{"config.seed": 7}, {}]}
    )
    assert sweep.array is not None
    assert sweep.array.count == 2
    assert [sweep.task(i).config["seed"] for i in range(2)] == [7, 0]
    assert sweep.task(0).array is None
    assert sweep.config == {"seed": 0, "steps": 5}
    numbered = job(command=["echo", "{index}"], array=3)
    assert [numbered.task(i).command[1] for i in range(3)] == ["0", "1", "2"]


def test_a_wrong_element_is_refused() -> None:
    """A key that no job has is found when the element is made."""
    with pytest.raises(JobError, match="nodez"):
        job(array=[{"nodez": 2}]).task(0)


@given(st.dictionaries(st.text("abc", min_size=1, max_size=2), st.integers(), min_size=1, max_size=4), st.integers())
def test_set_value_changes_only_its_key(data: dict[str, Any], value: int) -> None:
    """Setting a new nested key leaves every other value as it was."""
    before = dict(data)
    assert set_value(data, "new.inner", value) == ("new", "inner")
    assert data == {**before, "new": {"inner": value}}


def test_a_job_survives_being_written_and_read(tmp_path: Path) -> None:
    """What is kept in the run directory reads back as the same job."""
    spec = job(
        time="1h30m",
        environment={"A": "NO"},
        array={"tasks": 4, "at_once": 2},
        container={"image": "i"},
        exclude="gpu-[1-2]",
    )
    path = write(tmp_path, dump_yaml(spec.model_dump(mode="json", exclude_unset=True)))
    assert read_job(path) == spec


# --- against a cluster -------------------------------------------------------------------------------------------------------


def complaints(user: str = "alice", **values: Any) -> str:
    return "\n".join(str(finding) for finding in check_job(job(**values), CLUSTER, user=user))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"queue": "hihg"}, ["queue (hihg)", "did you mean high?"]),
        ({"queue": "zzz"}, ["the queues are: high, low, prepare"]),
        ({"nodes": 5}, ["nodes (5)", "4 nodes of pool gpu", "at most 4"]),
        ({"gpus_per_node": 9}, ["gpus_per_node (9)", "at most 8"]),
        ({"queue": "prepare", "gpus_per_node": 1}, ["gpus_per_node (1)", "2 nodes of pool cpu (0 GPUs"]),
        ({"cpus_per_task": 33}, ["33 * 1", "at most 32"]),
        ({"memory_gb": 65}, ["memory_gb (65)", "at most 64"]),
        ({"time": "49h"}, ["time (2d1h)", "at most 2d", "saves and is requeued"]),
        (
            {"queue": "high", "project": "audio"},
            ["project (audio)", "queue high is for vision", "use queue low or prepare"],
        ),
        ({"project": "vison"}, ["did you mean vision?"]),
        ({"project": "vision", "nodes": 3, "gpus_per_node": 8}, ["3 * 8", "may use 16 GPUs", "wait for ever"]),
        ({"exclude": "gpu-[1-3]", "nodes": 2}, ["nodes (2)", "only 1 left"]),
        ({"exclude": "gpu-9"}, ["exclude (gpu-9)", "no such node"]),
    ],
)
def test_what_the_cluster_cannot_do_is_said_before_slurm_is_asked(values: dict[str, Any], said: list[str]) -> None:
    """Each impossible wish is answered from the description, with value, rule and next step."""
    text = complaints(**values)
    assert all(part in text for part in said), text


def test_a_possible_job_has_no_findings() -> None:
    """What fits exactly is not complained about."""
    assert complaints(nodes=4, gpus_per_node=8, time="48h", cpus_per_task=4, tasks_per_node=8, memory_gb=64) == ""


def test_several_mistakes_come_together() -> None:
    """A wrong project does not hide a wrong size."""
    text = complaints(project="x", nodes=9)
    assert "project (x)" in text
    assert "nodes (9)" in text


def test_a_job_gets_its_share_of_the_node() -> None:
    """One GPU of eight brings an eighth of the CPUs and memory; all of them bring the whole node."""
    one = place(job(gpus_per_node=1), CLUSTER, user="alice")
    assert (one.cpus_per_task, one.memory_gb) == (4, 7.5)
    whole = place(job(gpus_per_node=8), CLUSTER, user="alice")
    assert (whole.cpus_per_task, whole.memory_gb) == (4, 0)
    half = place(job(gpus_per_node=4, tasks_per_node=1), CLUSTER, user="alice")
    assert half.cpus_per_task == 16


def test_eight_single_gpu_jobs_fit_one_node() -> None:
    """The shares of all GPUs together never exceed what Slurm may give out of a node's memory."""
    for gpus in range(1, 8):
        memory_gb = place(job(gpus_per_node=gpus), CLUSTER, user="alice").memory_gb
        assert memory_gb is not None
        assert memory_gb * (8 / gpus) <= 64


def test_the_account_is_the_users_own_where_only_one_fits() -> None:
    """One project that fits is chosen; with several Slurm's default stands; the queue's restriction counts."""
    assert choose_account(CLUSTER, "low", user="bob") == "audio"
    assert choose_account(CLUSTER, "low", user="alice") is None
    assert choose_account(CLUSTER, "high", user="alice") == "vision"
    assert choose_account(CLUSTER, "low", user="alice", project="audio") == "audio"
    assert choose_account(CLUSTER, "low", user="mallory") is None


def test_a_warning_is_shorter_than_a_short_job() -> None:
    """Trainers are told 2 minutes before the end, but never so early that nothing is left of a short job."""
    training = make_job({"name": "t", "entry": "jobs.train", "time": "5m"})
    assert place(training, CLUSTER, user="alice").warning == timedelta(minutes=1)
    long = make_job({"name": "t", "entry": "jobs.train", "time": "5h"})
    assert place(long, CLUSTER, user="alice").warning == timedelta(minutes=2)


def test_a_command_is_not_sent_a_signal_that_would_end_it() -> None:
    """USR2 ends a program that does not expect it, so commands get it only when they ask."""
    assert place(job(time="1h"), CLUSTER, user="alice").warning is None
    assert place(job(time="1h", warning="90s"), CLUSTER, user="alice").warning == timedelta(seconds=90)


def test_avoided_nodes_join_the_exclusions() -> None:
    """Nodes to avoid come on top of the job's own, each once."""
    placement = place(job(exclude=["gpu-[1-2]"]), CLUSTER, user="alice", avoided_nodes=["gpu-2", "gpu-4"])
    assert placement.exclude == ("gpu-1", "gpu-2", "gpu-4")


def test_the_cluster_is_found_by_its_variable(tmp_path: Path) -> None:
    """MUSTER_CLUSTER names the file; a wrong name is an error that says which variable is to blame."""
    path = write(tmp_path, dump_yaml(CLUSTER.model_dump(mode="json")), "cluster.yaml")
    found, where = find_cluster({"MUSTER_CLUSTER": str(path)})
    assert found == CLUSTER
    assert where == str(path)
    with pytest.raises(InputError, match="MUSTER_CLUSTER"):
        find_cluster({"MUSTER_CLUSTER": str(tmp_path / "nothing.yaml")})
