"""A cluster on this machine, with real daemons: what users and jobs see of it."""

from __future__ import annotations

import json
import os
import pwd
import socket
import stat
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from cluster.errors import InputError, StateError
from cluster.local import LocalCluster
from cluster.local_processes import ProcessTable, wait_until
from cluster.settings import load_spec
from cluster.slurm import SlurmCliClient

pytestmark = pytest.mark.daemons

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can start jobs of other users")


def run(cluster: LocalCluster, *argv: str, timeout_s: float = 60) -> str:
    """Run a command against the cluster and return what it printed."""
    result = subprocess.run(
        argv,
        env={**os.environ, **cluster.environment()},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert result.returncode == 0, f"{argv}: {result.stdout}{result.stderr}"
    return result.stdout


def job_is(cluster: LocalCluster, job_id: str, states: Sequence[str]) -> bool:
    return run(cluster, "squeue", "--noheader", "--states=all", f"--jobs={job_id}", "--format=%T").strip() in states


def eventually(condition: Callable[[], bool], *, deadline_s: float = 60) -> None:
    assert wait_until(condition, deadline_s=deadline_s, interval_s=0.2), "it never became true"


def test_a_node_is_a_machine_of_its_own(local_cluster: LocalCluster) -> None:
    """Inside a job the hostname is the node's, every node's name resolves, and nothing of it shows on the machine."""
    hosts = Path("/etc/hosts").read_text()
    script = "hostname; for n in 1 2 3 4; do getent hosts gpu-$n; done; touch /dev/shm/muster-private; ps -e | wc -l"
    printed = run(local_cluster, "srun", "--nodes=1", "--nodelist=gpu-3", "sh", "-c", script).split("\n")
    assert printed[0] == "gpu-3"
    assert [line.split() for line in printed[1:5]] == [["127.0.0.1", f"gpu-{number}"] for number in (1, 2, 3, 4)]
    assert int(printed[5]) < 15, "a job sees the processes of its own node only"
    assert Path("/etc/hosts").read_text() == hosts
    assert socket.gethostname() != "gpu-3"
    assert not Path("/dev/shm/muster-private").exists()


def test_commands_in_a_job_find_the_cluster_without_its_variables(local_cluster: LocalCluster) -> None:
    """A job submitted with --export=NONE can still call srun and squeue: slurm.conf is at its usual place on a node."""
    if not Path("/etc/slurm").is_dir():
        pytest.skip("this Slurm was not packaged with /etc/slurm as its place")
    printed = run(
        local_cluster, "srun", "--nodes=1", "sh", "-c", "unset SLURM_CONF; scontrol show config | grep ClusterName"
    )
    assert printed.split() == ["ClusterName", "=", local_cluster.name]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--gpus-per-node=2"], ["0,1"]),
        (["--gres=gpu:a100:3"], ["0,1,2"]),
        (["--gpus=8"], ["0,1,2,3,4,5,6,7"]),
        (["--ntasks=4", "--nodes=1", "--gpus-per-task=1"], ["0", "1", "2", "3"]),
        ([], [""]),
    ],
)
def test_jobs_see_the_gpus_they_asked_for(local_cluster: LocalCluster, options: list[str], expected: list[str]) -> None:
    """CUDA_VISIBLE_DEVICES is as on a GPU node for every way of asking, and unset for jobs that asked for none."""
    printed = run(local_cluster, "srun", *options, "sh", "-c", "echo ${CUDA_VISIBLE_DEVICES-}")
    assert sorted(printed.rstrip("\n").split("\n")) == expected


def test_two_jobs_on_a_node_get_different_gpus(local_cluster: LocalCluster) -> None:
    """GPUs are handed out, not just counted."""
    argv = ["srun", "--nodes=1", "--nodelist=gpu-1", "--gpus=4", "sh", "-c", "sleep 2; echo $CUDA_VISIBLE_DEVICES"]
    environment = {**os.environ, **local_cluster.environment()}
    both = [subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = sorted(process.communicate(timeout=60)[0].strip() for process in both)
    assert printed == ["0,1,2,3", "4,5,6,7"]


def test_more_gpus_than_there_are_is_refused_at_once(local_cluster: LocalCluster) -> None:
    """A job that could never start does not wait for ever (EnforcePartLimits and GRES that slurmctld knows)."""
    result = subprocess.run(
        ["sbatch", "--gpus-per-node=9", "--wrap", "true"],
        env={**os.environ, **local_cluster.environment()}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode != 0


def test_every_daemon_listens_on_loopback_only(local_cluster: LocalCluster) -> None:
    """No daemon of ours can be reached from outside, and the database has no port at all."""
    directory = local_cluster.layout.directory
    addresses: dict[str, set[str]] = {}
    for process in ProcessTable().find(directory):
        sockets = {str(link.readlink()) for link in Path(f"/proc/{process.pid}/fd").iterdir()}
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                    addresses.setdefault(process.role, set()).add(fields[1].split(":")[0])
    assert addresses == {role: {"0100007F"} for role in ("slurmdbd", "slurmctld", "slurmd")}


def test_secrets_are_closed_and_the_rest_is_open(local_cluster: LocalCluster) -> None:
    """Key, database and slurmdbd.conf belong to the owner; slurm.conf and the MUNGE socket are everybody's."""
    layout = local_cluster.layout

    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    assert [
        mode(path) & 0o077
        for path in (layout.munge_key, layout.munge_key.parent, layout.database, layout.controller_state)
    ] == [0] * 4
    assert mode(layout.configuration / "slurmdbd.conf") == 0o600
    assert mode(layout.slurm_conf) == 0o644
    for directory in (
        layout.directory,
        layout.munge_socket.parent,
        layout.configuration,
        layout.spool,
        layout.spool / "gpu-1",
    ):
        assert mode(directory) == 0o755, directory


def test_slurm_took_every_setting(local_cluster: LocalCluster) -> None:
    """What is rendered is what runs: no setting was ignored, and no daemon calls one invalid."""
    settings = SlurmCliClient(environment=local_cluster.environment()).configuration()
    assert settings["RequeueExit"] == "75"
    assert settings["PreemptMode"] == "REQUEUE"
    assert settings["KillWait"].startswith("15 ")
    assert settings["AccountingStorageEnforce"] == "associations,limits,qos"
    assert settings["PriorityWeightPartition"] == "20000"
    assert "cred_expire=5" in settings["AuthInfo"]
    for log in local_cluster.layout.logs.glob("slurm*.log"):
        assert "invalid" not in log.read_text(), log


def test_jobs_are_accounted_to_the_project(local_cluster: LocalCluster, tmp_path: Path) -> None:
    """A job's account, queue and GPUs are in the database: root's too, whom Slurm keeps in an account of its own."""
    job = run(
        local_cluster, "sbatch", "--parsable", "--gpus-per-node=2", f"--output={tmp_path}/out", "--wrap", "true"
    ).strip()
    eventually(lambda: job_is(local_cluster, job, ["COMPLETED"]))

    def row() -> list[str]:
        format_ = "--format=Account,Partition,QOS,AllocTRES%60"
        return run(local_cluster, "sacct", "-X", "-n", "-P", f"--jobs={job}", format_).strip().split("|")

    # slurmctld sends its records a moment later, and they arrive one after another.
    eventually(lambda: row()[:2] == ["research", "low"] and "gres/gpu=2" in row()[3])


def test_a_low_job_makes_room_and_comes_back(local_cluster: LocalCluster, tmp_path: Path) -> None:
    """A high job preempts a low one, which saves within its grace, exits 75, is requeued and runs again to its end."""
    step = tmp_path / "step.sh"
    step.write_text(
        'trap "echo saved; exit 75" TERM\n'
        '[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && echo resumed && exit 0\n'
        "echo started; sleep 300 & wait $!\n"
    )
    submit = ["sbatch", "--parsable", "--nodes=4", "--gpus-per-node=8", "--time=10", "--open-mode=append"]
    low_log = tmp_path / "low"
    low = run(
        local_cluster,
        *submit,
        "--partition=low",
        f"--output={low_log}",
        "--wrap",
        f"srun --ntasks-per-node=1 sh {step}",
    ).strip()
    # Preempted before its trap stands, a step dies of SIGTERM, and with a grace the job then counts as failed.
    eventually(lambda: low_log.exists() and low_log.read_text().count("started") == 4)
    high = run(local_cluster, *submit, "--partition=high", f"--output={tmp_path}/high", "--wrap", "sleep 1").strip()
    eventually(lambda: job_is(local_cluster, high, ["COMPLETED"]))
    eventually(lambda: job_is(local_cluster, low, ["COMPLETED"]))
    printed = low_log.read_text()
    assert printed.count("saved") == 4
    assert printed.count("resumed") == 4
    assert SlurmCliClient(environment=local_cluster.environment()).job(low).restarts == 1


@as_root
def test_other_users_may_run_jobs_on_a_cluster_of_root(local_cluster: LocalCluster) -> None:
    """They need only an association; their jobs run as they, with no right of root's."""
    run(local_cluster, "sacctmgr", "-i", "add", "user", "nobody", "Account=research")
    uid = pwd.getpwnam("nobody").pw_uid
    argv = ["srun", "--nodes=1", "sh", "-c", "id -u; grep CapEff /proc/self/status; touch /etc/muster-was-here"]
    result = subprocess.run(
        argv, env={**os.environ, **local_cluster.environment()}, cwd="/", user=uid, group="nogroup", extra_groups=[],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert result.stdout.split() == [str(uid), "CapEff:", "0000000000000000"], result.stderr
    assert not Path("/etc/muster-was-here").exists()


def test_status_says_what_runs(local_cluster: LocalCluster) -> None:
    """Every daemon with its pid and port, every node with its state in Slurm's words."""
    status = local_cluster.status()
    assert status.state == "up"
    assert [daemon.name for daemon in status.daemons] == ["munged", "mariadbd", "slurmdbd", "slurmctld"]
    assert all(daemon.pid and Path(f"/proc/{daemon.pid}").exists() for daemon in status.daemons)
    assert [node.name for node in status.nodes] == ["gpu-1", "gpu-2", "gpu-3", "gpu-4"]
    eventually(lambda: {node.slurm_state for node in local_cluster.status().nodes} == {"idle"})


def test_the_description_is_kept_for_other_commands(local_cluster: LocalCluster) -> None:
    """MUSTER_CLUSTER points to the description that the cluster was made from, under its own name."""
    spec = load_spec(Path(local_cluster.environment()["MUSTER_CLUSTER"]))
    assert spec.name == local_cluster.name
    assert [queue.name for queue in spec.queues] == ["high", "low"]


def test_a_cluster_that_is_up_cannot_be_brought_up_again(local_cluster: LocalCluster) -> None:
    """It is said, and nothing happens to the running one."""
    before = {(process.pid, process.start_ticks) for process in ProcessTable().find(local_cluster.layout.directory)}
    with pytest.raises(StateError, match=r"is up already.*muster local down"):
        local_cluster.up(load_spec(local_cluster.layout.description))
    assert {
        (process.pid, process.start_ticks) for process in ProcessTable().find(local_cluster.layout.directory)
    } == before


def test_a_name_cannot_lead_out_of_the_root(tmp_path: Path) -> None:
    """A name is a directory's name: it is held to the rules of names before any path is made of it."""
    for name in ("../x", "a/b", "", ".", "A"):
        with pytest.raises(InputError, match="cluster name"):
            LocalCluster(name, root=tmp_path)


def test_status_is_plain_enough_for_json(local_cluster: LocalCluster) -> None:
    """What --json prints can be read back."""
    from cluster.output import as_plain

    assert json.loads(json.dumps(as_plain(local_cluster.status()), default=str))["name"] == local_cluster.name
