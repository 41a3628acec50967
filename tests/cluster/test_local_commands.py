"""`muster local` as it is typed."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.local import LocalCluster
from cluster.local_commands import local_app

ROOT = Path(__file__).parents[2]


def muster(*arguments: str, root: Path) -> subprocess.CompletedProcess[str]:
    code = "import sys; from cluster.cli import main; main(sys.argv[1:])"
    environment = {"PATH": "/usr/bin:/bin", "MUSTER_LOCAL_ROOT": str(root), "HOME": str(root), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code, "local", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.daemons
def test_a_whole_afternoon(cluster_root: Path) -> None:
    """up, status, env, logs, down, as a person types them, and each says what a person needs."""
    root = cluster_root / "afternoon"
    up = muster("up", "--nodes", "2", "--gpus", "4", "--name", "lab", root=root)
    assert up.returncode == 0, up.stderr
    assert "slurmctld" in up.stderr, "progress goes to standard error"
    assert "slurmd 2/2" in up.stderr
    assert "cluster lab is up after" in up.stdout
    assert up.stdout.rstrip().endswith('eval "$(muster local env)"')

    lines = muster("env", root=root).stdout.splitlines()
    variables = dict(shlex.split(line)[1].split("=", 1) for line in lines)
    assert set(variables) == {"SLURM_CONF", "MUSTER_CLUSTER"}
    shown = subprocess.run(
        ["scontrol", "show", "node", "gpu-2"], env={"PATH": "/usr/bin:/bin", **variables}, capture_output=True, text=True, timeout=30, check=True
    ).stdout  # fmt: skip
    assert "Gres=gpu:a100:4" in shown

    (status,) = json.loads(muster("status", "--json", root=root).stdout)
    assert (status["name"], status["state"], len(status["nodes"])) == ("lab", "up", 2)
    assert "gpu-1" in muster("status", root=root).stdout
    assert "slurmd started" in muster("logs", "gpu-1", "-n", "30", root=root).stdout
    assert len(muster("logs", "slurmctld", "-n", "3", root=root).stdout.splitlines()) == 3
    assert "slurmctld" in muster("logs", root=root).stdout
    missing = muster("logs", "nosuch", root=root)
    assert missing.returncode == 7
    assert "slurmctld" in missing.stderr

    again = muster("up", "--name", "lab", root=root)
    assert (again.returncode, again.stdout) == (9, "")
    assert "is up already" in again.stderr

    down = muster("down", "--keep-logs", root=root)
    assert down.returncode == 0, down.stderr
    assert "logs" in down.stdout
    assert muster("down", "--all", root=root).returncode == 0
    assert not root.exists() or list(root.iterdir()) == []


@pytest.mark.daemons
def test_following_a_log_ends_with_the_cluster_or_with_ctrl_c(cluster_root: Path, local_cluster: LocalCluster) -> None:
    """-f prints what is added, and Ctrl-C ends it with the customary 130."""
    code = "import sys; from cluster.cli import main; main(sys.argv[1:])"
    log = local_cluster.layout.logs / "slurmctld.log"
    follower = subprocess.Popen(
        [sys.executable, "-c", code, "local", "logs", "slurmctld", "-f", "-n", "1", "--name", local_cluster.name],
        env={"PATH": "/usr/bin:/bin", "MUSTER_LOCAL_ROOT": str(cluster_root), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with follower:
        assert follower.stdout is not None
        follower.stdout.readline()  # it has shown the last line there was, so it follows now
        with log.open("a") as file:
            file.write("a line that came later\n")
        assert "a line that came later\n" in iter(follower.stdout.readline, "")
        follower.send_signal(signal.SIGINT)
        follower.communicate(timeout=10)
    assert follower.returncode == 130


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["status"], 7, "muster local up"),
        (["down"], 7, "muster local up"),
        (["env"], 7, "muster local up"),
        (["env", "--name", "nosuch"], 7, "nosuch"),
        (["up", "--name", "../x"], 3, "cluster name"),
        (["up", "--nodes", "0"], 2, "nodes"),
        (["up", "--spec", "/nosuch.yaml"], 3, "/nosuch.yaml"),
        (["down", "--all", "--name", "x"], 2, "contradict"),
    ],
)
def test_mistakes_are_answered_in_words(tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    """Each wrong call ends with the documented exit code and a message that helps, and leaves nothing behind."""
    result = muster(*arguments, root=tmp_path)
    assert result.returncode == code, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_description_for_aws_is_not_started_here(tmp_path: Path) -> None:
    """`target: aws` is refused with the reason."""
    spec = tmp_path / "aws.yaml"
    spec.write_text(
        (ROOT / "templates" / "cluster" / "local-demo.yaml").read_text().replace("target: local", "target: aws")
    )
    result = muster("up", "--spec", str(spec), root=tmp_path / "r")
    assert result.returncode == 9
    assert "target" in result.stderr


def test_help_lists_every_verb() -> None:
    """What the issue promises is there."""
    printed = CliRunner().invoke(local_app, ["--help"]).stdout
    assert all(verb in printed for verb in ("up", "status", "down", "logs", "env"))
