"""The life of a cluster on this machine: up, faults, down, and what can go wrong in between."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import CommandError, MissingError, NotFoundError, OutsideError, StateError
from cluster.local import LocalCluster, find_cluster, list_clusters
from cluster.local_layout import read_state
from cluster.local_processes import ProcessTable, wait_until
from cluster.local_start import Step
from cluster.settings import ClusterSpec, load_spec
from cluster.shell import CommandResult, LocalShell
from cluster.slurm import SlurmCliClient

pytestmark = pytest.mark.daemons

ROOT = Path(__file__).parents[2]
MakeCluster = Callable[..., LocalCluster]


def one_node(*, accounting: bool = False) -> ClusterSpec:
    """Return the quickest cluster there is: one node, no database."""
    spec = load_spec(ROOT / "templates" / "cluster" / "local-demo.yaml")
    plain = spec.model_dump()
    plain["pools"][0]["nodes"] = 1
    plain["accounting"] = {"enabled": accounting}
    return ClusterSpec.model_validate(plain)


def run(cluster: LocalCluster, *argv: str) -> str:
    result = subprocess.run(
        argv, env={**os.environ, **cluster.environment()}, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, f"{argv}: {result.stdout}{result.stderr}"
    return result.stdout


def eventually(condition: Callable[[], bool], *, deadline_s: float = 60) -> None:
    assert wait_until(condition, deadline_s=deadline_s, interval_s=0.2), "it never became true"


def processes_with(text: str) -> list[str]:
    """Return the command lines of living processes that contain `text`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if text in line:
                    found.append(line)
    return found


class BreakingShell(LocalShell):
    """Spoils slurm.conf just before slurmctld reads it."""

    def __init__(self, line: str) -> None:
        self.line = line

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
        if Path(argv[0]).name == "slurmctld" and "-f" in argv:
            with Path(argv[argv.index("-f") + 1]).open("a") as file:
                file.write(f"{self.line}\n")
        return super().run(argv, timeout_s=timeout_s, input_text=input_text, env=env, cwd=cwd, check=check)


def test_down_leaves_nothing_behind_also_with_jobs_running(cluster_root: Path) -> None:
    """No process, no mount, no file, no listening port: jobs and what they have put in the background included."""
    mounts = Path("/proc/self/mounts").read_text()
    cluster = LocalCluster("busy", root=cluster_root)
    cluster.up(one_node())
    ports = (read_state(cluster.layout) or pytest.fail("no state")).ports()
    marker = f"sleep 98{os.getpid()}"
    run(cluster, "sbatch", "--output=/dev/null", "--wrap", f"(setsid {marker} &); srun --overlap {marker}")
    eventually(lambda: len(processes_with(marker)) >= 3)
    cluster.down()
    assert not cluster.layout.directory.exists()
    eventually(lambda: not processes_with(marker) and not processes_with(str(cluster.layout.directory)), deadline_s=5)
    assert Path("/proc/self/mounts").read_text() == mounts
    for port in ports:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0
    with pytest.raises(NotFoundError, match="no cluster of this name"):
        cluster.down()


def test_down_keeps_logs_when_asked(cluster_root: Path) -> None:
    """--keep-logs leaves the logs and nothing else; a later up of the same name starts with fresh ones."""
    cluster = LocalCluster("logs", root=cluster_root)
    cluster.up(one_node())
    cluster.down(keep_logs=True)
    assert [path.name for path in cluster.layout.directory.iterdir()] == ["logs"]
    assert "slurmctld version" in (cluster.layout.logs / "slurmctld.log").read_text()
    assert cluster.status().state == "stopped"
    cluster.up(one_node())
    assert (cluster.layout.logs / "slurmctld.log").read_text().count("slurmctld version") == 1
    cluster.down()


def test_clusters_live_side_by_side(make_cluster: MakeCluster) -> None:
    """Two clusters with nodes of the same names share no port, and each answers for itself."""
    first, second = (
        make_cluster(nodes=1, accounting={"enabled": False}),
        make_cluster(nodes=2, accounting={"enabled": False}),
    )
    states = [read_state(cluster.layout) for cluster in (first, second)]
    assert states[0] is not None
    assert states[1] is not None
    assert not set(states[0].ports()) & set(states[1].ports())
    assert [len(SlurmCliClient(environment=cluster.environment()).nodes()) for cluster in (first, second)] == [1, 2]
    first.down()
    assert second.status().state == "up"


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes root")
def test_queues_and_projects_are_what_the_description_says(make_cluster: MakeCluster, tmp_path: Path) -> None:
    """A project's GPU limit holds, a queue of some projects is closed to others, and nobody is preempted before minimum_run."""
    nobody = {"user": "nobody", "group": "nogroup", "extra_groups": [], "cwd": "/"}
    low = {"name": "low", "pools": ["gpu"], "preemption": "requeue", "minimum_run": "12s", "default": True}
    cluster = make_cluster(
        nodes=1,
        queues=[{"name": "high", "pools": ["gpu"], "tier": 100, "projects": ["research"]}, low],
        projects=[{"name": "research", "max_gpus": 4}, {"name": "other", "users": ["nobody"]}],
    )
    environment = {**os.environ, **cluster.environment()}
    client = SlurmCliClient(environment=cluster.environment())

    def submit(*options: str, **as_user: Any) -> subprocess.CompletedProcess[str]:
        argv = ["sbatch", "--parsable", "--output=/dev/null", *options]
        return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60, check=False, **as_user)

    too_many = submit("--gpus=8", "--wrap", "true").stdout.strip()
    eventually(lambda: client.job(too_many).reason == "AssocGrpGRES")
    client.cancel(too_many)
    for forbidden in (["--partition=high"], ["--account=research"]):
        refused = submit(*forbidden, "--wrap", "true", **nobody)
        assert "Invalid account or account/partition combination" in refused.stderr
    victim = submit("--cpus-per-task=32", "--wrap", "sleep 100", **nobody).stdout.strip()
    eventually(lambda: client.job(victim).state == "RUNNING")
    began = time.monotonic()
    preemptor = submit("--partition=high", "--cpus-per-task=32", "--wrap", "true").stdout.strip()
    eventually(lambda: client.job(victim).restarts == 1)
    assert time.monotonic() - began > 8
    eventually(lambda: client.job(preemptor).state == "COMPLETED")


def test_which_cluster_is_meant(make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The named one, the one of MUSTER_CLUSTER, or the only one; several without a name are an error that lists them."""
    first = make_cluster(nodes=1, accounting={"enabled": False})
    root = first.layout.directory.parent
    monkeypatch.setenv("MUSTER_LOCAL_ROOT", str(root))
    monkeypatch.delenv("MUSTER_CLUSTER", raising=False)
    second = make_cluster(nodes=1, accounting={"enabled": False})
    assert {first.name, second.name} <= {cluster.name for cluster in list_clusters()}
    assert find_cluster(second.name).layout == second.layout
    with pytest.raises(StateError, match=rf"{first.name}, {second.name}.*--name"):
        find_cluster(None)
    monkeypatch.setenv("MUSTER_CLUSTER", first.environment()["MUSTER_CLUSTER"])
    assert find_cluster(None).layout == first.layout
    with pytest.raises(NotFoundError, match=rf"nosuch: .*{first.name}"):
        find_cluster("nosuch")


def test_jobs_outlive_their_slurmd(make_cluster: MakeCluster, tmp_path: Path) -> None:
    """slurmd is killed under a running job and started again: the job goes on and ends well."""
    cluster = make_cluster(nodes=2, accounting={"enabled": False})
    out = tmp_path / "out"
    job = run(
        cluster,
        "sbatch",
        "--parsable",
        "--nodes=2",
        f"--output={out}",
        "--wrap",
        "srun sh -c 'echo on; sleep 6; echo ok'",
    ).strip()
    eventually(lambda: out.exists() and out.read_text().count("on\n") == 2)
    cluster.stop_slurmd("gpu-1", signal.SIGKILL)
    assert cluster.status().state == "degraded"
    with pytest.raises(StateError, match="not running"):
        cluster.stop_slurmd("gpu-1")
    cluster.start_slurmd("gpu-1")
    with pytest.raises(StateError, match="is running"):
        cluster.start_slurmd("gpu-1")
    eventually(lambda: SlurmCliClient(environment=cluster.environment()).job(job).state == "COMPLETED")
    assert out.read_text().count("ok\n") == 2


def test_a_power_cut_ends_everything_on_a_node_and_nothing_else(make_cluster: MakeCluster) -> None:
    """All processes of the node are gone when it returns; the other node's live on; the job is requeued; the node waits."""
    cluster = make_cluster(nodes=2, accounting={"enabled": False})
    marker = f"sleep 97{os.getpid()}"
    job = run(cluster, "sbatch", "--parsable", "--nodes=2", "--output=/dev/null", "--wrap", f"srun {marker}").strip()
    client = SlurmCliClient(environment=cluster.environment())

    def steps_of(node: str) -> int:
        init = next(
            process
            for process in ProcessTable().find(cluster.layout.directory)
            if (process.role, process.node) == ("init", node)
        )
        namespace = Path(f"/proc/{init.pid}/ns/pid").readlink()
        count = 0
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and (entry / "ns" / "pid").readlink() == namespace:
                    count += (entry / "cmdline").read_bytes().replace(
                        b"\0", b" "
                    ).decode().strip() == f"/usr/bin/{marker}"
        return count

    eventually(lambda: (steps_of("gpu-1"), steps_of("gpu-2")) == (1, 1))
    cluster.power_off("gpu-2")
    assert [node.powered for node in cluster.status().nodes] == [True, False]
    assert not [process for process in ProcessTable().find(cluster.layout.directory) if process.node == "gpu-2"]
    assert steps_of("gpu-1") == 1
    cluster.power_off("gpu-2")  # off is off
    with pytest.raises(StateError, match="powered off"):
        cluster.start_slurmd("gpu-2")
    cluster.power_on("gpu-2")
    with pytest.raises(StateError, match="is on already"):
        cluster.power_on("gpu-2")
    eventually(lambda: client.job(job).restarts == 1)
    eventually(lambda: "DOWN" in client.node("gpu-2").states)
    assert "rebooted" in (client.node("gpu-2").reason or "")
    run(cluster, "scancel", job)
    time.sleep(2.0)  # Slurm compares boot times by the second: resumed in the same one, the node goes down once more
    client.resume(["gpu-2"])
    eventually(lambda: client.node("gpu-2").states == {"IDLE"})
    with pytest.raises(NotFoundError, match="no such node"):
        cluster.power_off("gpu-9")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("NoSuchParameter=1", "NoSuchParameter"),
        ("PartitionName=bad Nodes=nosuch[1-2]", "slurmctld ended right after its start.*nosuch"),
    ],
)
def test_a_daemon_that_fails_shows_its_log_and_cleans_up(cluster_root: Path, line: str, expected: str) -> None:
    """The message holds what the daemon said, whether it refused to start or died later; only the logs stay."""
    cluster = LocalCluster("broken", root=cluster_root, shell=BreakingShell(line))
    with pytest.raises(OutsideError) as caught:
        cluster.up(one_node())
    assert re.search(expected, str(caught.value), re.DOTALL), str(caught.value)
    assert [path.name for path in cluster.layout.directory.iterdir()] == ["logs"]
    assert ProcessTable().find(cluster.layout.directory) == []
    cluster.down()


@pytest.mark.parametrize("after", ["munged", "mariadbd", "slurmctld", "slurmd"])
def test_ctrl_c_on_the_way_up_cleans_up(cluster_root: Path, after: str) -> None:
    """Interrupted after any step, nothing that has been started stays, and the interrupt goes on to the caller."""

    def interrupt(step: Step) -> None:
        if step.name == after:
            raise KeyboardInterrupt

    cluster = LocalCluster("stopped", root=cluster_root)
    with pytest.raises(KeyboardInterrupt):
        cluster.up(one_node(accounting=True), interrupt)
    assert ProcessTable().find(cluster.layout.directory) == []
    cluster.down()


def test_a_killed_up_is_cleaned_away_by_the_next(cluster_root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`up` is killed outright when its daemons are half started: the next one says so, ends them and comes up."""
    code = (
        "import os, signal, sys; from pathlib import Path; from cluster.local import LocalCluster; from cluster.settings import load_spec\n"
        "stop = lambda step: os.kill(os.getpid(), signal.SIGKILL) if step.name == 'slurmctld' else None\n"
        "LocalCluster('crashed', root=Path(sys.argv[1])).up(load_spec(Path(sys.argv[2])), stop)\n"
    )
    demo = ROOT / "templates" / "cluster" / "local-demo.yaml"
    killed = subprocess.run(
        [sys.executable, "-c", code, str(cluster_root), str(demo)], timeout=120, check=False, cwd=ROOT
    )
    assert killed.returncode == -signal.SIGKILL
    cluster = LocalCluster("crashed", root=cluster_root)
    assert cluster.status().state == "starting"
    left = ProcessTable().find(cluster.layout.directory)
    assert {process.role for process in left} >= {"munged", "mariadbd", "slurmdbd", "slurmctld"}
    with caplog.at_level(logging.WARNING):
        cluster.up(one_node())
    assert "cut off" in caplog.text
    assert not {process.pid for process in left} & {
        process.pid for process in ProcessTable().find(cluster.layout.directory)
    }
    assert cluster.status().state == "up"
    cluster.down()


def test_a_rebooted_machine_leaves_a_stopped_cluster(cluster_root: Path) -> None:
    """With every process gone and every file there, status says stopped, and up starts anew."""
    cluster = LocalCluster("rebooted", root=cluster_root)
    cluster.up(one_node())
    table = ProcessTable()
    table.end(table.find(cluster.layout.directory), cluster.layout.directory)
    assert cluster.status().state == "stopped"
    cluster.up(one_node())
    assert cluster.status().state == "up"
    cluster.down()


def test_a_half_dead_cluster_is_not_replaced_unasked(cluster_root: Path) -> None:
    """slurmctld is gone but jobs may run: up refuses and says what to do, down ends the rest."""
    cluster = LocalCluster("half", root=cluster_root)
    cluster.up(one_node())
    table = ProcessTable()
    table.end([p for p in table.find(cluster.layout.directory) if p.role == "slurmctld"], cluster.layout.directory)
    status = cluster.status()
    assert status.state == "degraded"
    assert [node.slurm_state for node in status.nodes] == ["unknown"]
    with pytest.raises(StateError, match=r"half up.*slurmctld is gone.*muster local down"):
        cluster.up(one_node())
    cluster.down()


def test_somebody_elses_directory_is_never_emptied(short_path: Path) -> None:
    """A root that points at a person's own folders: neither up nor down touches a folder that is no cluster's."""
    (short_path / "data").mkdir()
    (short_path / "data" / "thesis.tex").write_text("years of work")
    cluster = LocalCluster("data", root=short_path)
    with pytest.raises(StateError, match=r"thesis\.tex.*nothing has been removed"):
        cluster.up(one_node())
    with pytest.raises(StateError, match=r"thesis\.tex"):
        cluster.down()
    assert (short_path / "data" / "thesis.tex").read_text() == "years of work"


def test_two_muster_commands_do_not_work_on_one_cluster(cluster_root: Path) -> None:
    """The second one waits for the first: two ups at once end with one cluster and one clear refusal."""
    code = (
        "import sys; from pathlib import Path; from cluster.local import LocalCluster; from cluster.settings import load_spec\n"
        "LocalCluster('twice', root=Path(sys.argv[1])).up(load_spec(Path(sys.argv[2])))\n"
    )
    demo = ROOT / "templates" / "cluster" / "local-demo.yaml"
    argv = [sys.executable, "-c", code, str(cluster_root), str(demo)]
    both = [subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)]
    said = [process.communicate(timeout=120)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1]
    assert "is up already" in "".join(said)
    LocalCluster("twice", root=cluster_root).down()


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes root")
def test_an_ordinary_user_gets_a_whole_cluster_too(local_cluster: LocalCluster) -> None:
    """Without any right of root's: daemons, jobs, GPUs, node names, power switch; and jobs gain no capability."""
    assert local_cluster.status().state == "up"  # has loaded every module: the interpreter may be out of nobody's reach
    home = Path(tempfile.mkdtemp(prefix="m-", dir="/tmp"))
    nobody = pwd.getpwnam("nobody")
    os.chown(home, nobody.pw_uid, nobody.pw_gid)
    result = home / "result.json"
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgroups([])
            os.setgid(nobody.pw_gid)
            os.setuid(nobody.pw_uid)
            os.chdir(home)
            os.environ.update(HOME=str(home), USER="nobody", LOGNAME="nobody")
            result.write_text(json.dumps(_life_of_an_ordinary_user(home)))
            status = 0
        except BaseException as error:  # the child must end here, whatever happens, and say why
            (home / "error").write_text(f"{type(error).__name__}: {error}")
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert status == 0, (home / "error").read_text() if (home / "error").exists() else status
    seen = json.loads(result.read_text())
    shutil.rmtree(home)
    if "not allowed" in seen:
        pytest.skip(seen["not allowed"])
    assert seen["job"].split() == [
        str(nobody.pw_uid),
        "gpu-2",
        "0,1",
        "127.0.0.1",
        "gpu-1",
        "CapEff:",
        "0000000000000000",
    ]
    assert seen["powered"] == [True, False]
    assert seen["left"] == []


def _life_of_an_ordinary_user(home: Path) -> dict[str, object]:
    cluster = LocalCluster("own", root=home / "c")
    spec = one_node(accounting=True)
    spec = spec.model_copy(update={"pools": (spec.pools[0].model_copy(update={"nodes": 2}),)})
    try:
        cluster.up(spec)
    except MissingError as error:
        return {"not allowed": str(error)}
    try:
        script = "id -u; hostname; echo $CUDA_VISIBLE_DEVICES; getent hosts gpu-1; grep CapEff /proc/self/status"
        job = run(cluster, "srun", "--nodelist=gpu-2", "--nodes=1", "--gpus=2", "sh", "-c", script)
        cluster.power_off("gpu-2")
        powered = [node.powered for node in cluster.status().nodes]
    finally:
        cluster.down()
    return {
        "job": job,
        "powered": powered,
        "left": [path.name for path in (home / "c").iterdir()] if (home / "c").exists() else [],
    }


def test_up_says_why_when_namespaces_are_forbidden(short_path: Path) -> None:
    """In a container without the right to make namespaces, nothing is started, and the message says what to change."""

    class Forbidding(LocalShell):
        def run(self, argv: Sequence[str], **options: object) -> CommandResult:  # type: ignore[override]
            if Path(argv[0]).name == "unshare":
                raise CommandError(
                    "no", argv=argv, returncode=1, stderr="unshare: unshare failed: Operation not permitted"
                )
            return super().run(argv, **options)  # type: ignore[arg-type]

    with pytest.raises(MissingError, match=r"Operation not permitted.*(CAP_SYS_ADMIN|user namespaces)"):
        LocalCluster("jailed", root=short_path, shell=Forbidding()).up(one_node())
    assert list(short_path.iterdir()) == []
