"""Which processes are a cluster's own, and that no other one is ever signalled."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.errors import OutsideError
from cluster.local_processes import ClusterProcess, ProcessTable, wait_until

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts processes with any command line, and ends them after the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start_one(
        *argv: str, code: str = "import time; time.sleep(60)", cwd: Path | None = None
    ) -> subprocess.Popen[bytes]:
        # The interpreter takes whatever stands after its code as arguments, so any command line can be shown.
        process = subprocess.Popen([argv[0], "-c", code, *argv[1:]], executable=sys.executable, cwd=cwd)
        started.append(process)
        assert wait_until(lambda: bool(Path(f"/proc/{process.pid}/cmdline").read_bytes()), deadline_s=5)
        return process

    yield start_one
    for process in started:
        process.kill()
        process.wait()


def roles(directory: Path) -> list[tuple[str, str | None]]:
    return [(process.role, process.node) for process in ProcessTable().find(directory)]


def test_our_daemons_are_known_by_program_and_path(start: Start, tmp_path: Path) -> None:
    """Every way in which a state directory stands on a daemon's command line is recognised."""
    state = tmp_path / "demo"
    for argv in (
        ["/usr/sbin/munged", f"--key-file={state}/secrets/munge.key"],
        ["/usr/sbin/slurmctld", "-f", f"{state}/etc/slurm.conf"],
        [f"{state}/run/slurmdbd"],
        ["slurmd", "-f", f"{state}/etc/slurm.conf", "-N", "gpu-7", "-b"],
        ["unshare", "--pid", "sh", f"{state}/node.sh", "init", "gpu-7", str(state)],
        ["sh", f"{state}/node.sh", "init", "gpu-7", str(state)],
    ):
        start(*argv)
    expected = [
        ("munged", None),
        ("slurmctld", None),
        ("slurmdbd", None),
        ("slurmd", "gpu-7"),
        ("helper", "gpu-7"),
        ("init", "gpu-7"),
    ]
    assert sorted(roles(state), key=str) == sorted(expected, key=str)


def test_slurmctlds_helper_is_known_by_its_directory(start: Start, tmp_path: Path) -> None:
    """slurmscriptd overwrites its command line; it works in slurmctld's directory of logs."""
    logs = tmp_path / "demo" / "logs"
    logs.mkdir(parents=True)
    start("slurmctld: slurmscriptd", cwd=logs)
    start(": slurmscriptd", cwd=tmp_path)
    assert roles(tmp_path / "demo") == [("helper", None)]


@pytest.mark.parametrize(
    "argv",
    [
        ["slurmctld", "-f", "{root}/demo2/etc/slurm.conf"],
        ["slurmctld", "-f", "{root}/other/demo/etc/slurm.conf"],
        ["slurmctld", "-f", "/backup{root}/demo/etc/slurm.conf"],
        ["vim", "{root}/demo/etc/slurm.conf"],
        ["tail", "-f", "{root}/demo/logs/slurmctld.log"],
        ["slurmctld"],
    ],
)
def test_other_peoples_processes_are_not_ours(start: Start, tmp_path: Path, argv: list[str]) -> None:
    """A neighbour whose name begins the same, an editor on our files, the machine's own slurmctld: none is ours."""
    process = start(*(word.format(root=tmp_path) for word in argv))
    table = ProcessTable()
    assert table.find(tmp_path / "demo") == []
    table.end(table.find(tmp_path / "demo"), tmp_path / "demo")
    assert process.poll() is None


def test_a_pid_that_was_given_on_is_not_signalled(start: Start, tmp_path: Path) -> None:
    """A process that only shares the pid with one seen before is left alone: it is older or younger, or not ours."""
    process = start("slurmd", "-f", f"{tmp_path}/etc/slurm.conf", "-N", "gpu-1")
    table = ProcessTable()
    (seen,) = table.find(tmp_path)
    earlier = dataclasses.replace(seen, start_ticks=seen.start_ticks - 1)
    stranger = start("python", str(tmp_path))
    assert not table.send(earlier, tmp_path, signal.SIGKILL)
    assert not table.send(dataclasses.replace(seen, pid=stranger.pid), tmp_path, signal.SIGKILL)
    table.end([earlier, dataclasses.replace(seen, pid=stranger.pid)], tmp_path)
    assert process.poll() is None
    assert stranger.poll() is None


def test_what_is_gone_already_is_no_error(tmp_path: Path) -> None:
    """A process may end between being seen and being signalled."""
    gone = ClusterProcess(pid=2**22 - 1, role="slurmd", node="gpu-1", start_ticks=1)
    ProcessTable().end([gone], tmp_path)
    assert not ProcessTable().send(gone, tmp_path, signal.SIGTERM)


def test_ending_waits_until_they_are_gone(start: Start, tmp_path: Path) -> None:
    """When `end` returns, the processes do not run any more."""
    started = [start("munged", f"--socket={tmp_path}/{number}") for number in range(5)]
    table = ProcessTable()
    table.end(table.find(tmp_path), tmp_path)
    assert [process.wait(timeout=1) for process in started] == [-signal.SIGKILL] * 5
    assert table.find(tmp_path) == []


def test_who_ignores_a_polite_signal_is_killed_at_the_deadline(start: Start, tmp_path: Path) -> None:
    """A daemon that hangs on SIGTERM gets SIGKILL, and only after the time it was given."""
    ready = tmp_path / "ready"
    code = f"import signal, time, pathlib; signal.signal(15, signal.SIG_IGN); pathlib.Path({str(ready)!r}).touch(); time.sleep(60)"
    process = start("slurmctld", "-f", f"{tmp_path}/etc/slurm.conf", code=code)
    assert wait_until(ready.exists, deadline_s=10)
    table = ProcessTable()
    began = time.monotonic()
    table.end(table.find(tmp_path), tmp_path, signal_number=signal.SIGTERM, deadline_s=0.5)
    assert time.monotonic() - began >= 0.5
    assert process.wait(timeout=1) == -signal.SIGKILL


def test_who_outlives_sigkill_is_named(start: Start, tmp_path: Path) -> None:
    """A process that hangs in the kernel is reported with its pid instead of being waited for without end."""
    process = start("slurmd", "-f", f"{tmp_path}/etc/slurm.conf", "-N", "gpu-1")
    table = ProcessTable()
    with pytest.raises(OutsideError, match=rf"slurmd \(pid {process.pid}\).*after SIGKILL"):
        table.end(table.find(tmp_path), tmp_path, signal_number=signal.SIGCONT, deadline_s=0.0)


def test_odd_program_names_do_not_confuse_the_reading(tmp_path: Path) -> None:
    """A name in /proc/PID/stat may hold spaces and parentheses; a process may vanish while it is read; zombies are gone."""
    state = tmp_path / "state"

    def fake(pid: int, comm: str, process_state: str) -> None:
        folder = tmp_path / "proc" / str(pid)
        folder.mkdir(parents=True)
        (folder / "cmdline").write_bytes(
            b"\0".join([b"slurmd", b"-f", f"{state}/etc/slurm.conf".encode(), b"-N", b"n1", b""])
        )
        (folder / "stat").write_text(f"{pid} ({comm}) {process_state} " + " ".join(["0"] * 18) + f" {pid * 10} 0 0")

    fake(5, "a) R 1 (b", "S")
    fake(6, "slurmd", "Z")
    (tmp_path / "proc" / "7").mkdir()
    (tmp_path / "proc" / "self").mkdir()
    assert ProcessTable(tmp_path / "proc").find(state) == [
        ClusterProcess(pid=5, role="slurmd", node="n1", start_ticks=50)
    ]


def test_start_ticks_are_the_kernels(start: Start, tmp_path: Path) -> None:
    """Field 22 of /proc/PID/stat it is: in ticks after boot, so about now for a new process."""
    start("munged", f"--socket={tmp_path}/s")
    (found,) = ProcessTable().find(tmp_path)
    uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    assert uptime_s - 60 < found.start_ticks / os.sysconf("SC_CLK_TCK") <= uptime_s
