"""Commands have deadlines, and their failures are told apart."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from cluster.errors import CommandError, CommandTimeout, MissingError
from cluster.shell import LocalShell, find_program

shell = LocalShell()


def test_output_and_status_come_back() -> None:
    """Standard output, standard error and the exit status are returned apart."""
    result = shell.run(
        [sys.executable, "-c", "import sys; print('a'); print('b', file=sys.stderr); sys.exit(3)"],
        timeout_s=20,
        check=False,
    )
    assert (result.stdout, result.stderr, result.returncode) == ("a\n", "b\n", 3)


def test_a_failure_quotes_the_command_and_what_it_said() -> None:
    """A non-zero status raises with the command, the status and its standard error."""
    with pytest.raises(CommandError, match=r"exit status 3: no such thing") as caught:
        shell.run(
            [sys.executable, "-c", "import sys; sys.exit(print('no such thing', file=sys.stderr) or 3)"],
            timeout_s=20,
        )
    assert caught.value.returncode == 3


def test_the_deadline_kills_grandchildren_too(tmp_path: Path) -> None:
    """A command that has started another one leaves neither behind when its deadline passes."""
    pid_file = tmp_path / "pid"
    program = (
        "import subprocess, sys, time; p = subprocess.Popen(['sleep', '60']);"
        f"open({str(pid_file)!r}, 'w').write(str(p.pid)); time.sleep(60)"
    )
    started = time.monotonic()
    with pytest.raises(CommandTimeout, match="no answer within"):
        shell.run([sys.executable, "-c", program], timeout_s=3)
    assert time.monotonic() - started < 20
    grandchild = int(pid_file.read_text())
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and _is_running(grandchild):
        time.sleep(0.05)
    assert not _is_running(grandchild)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_missing_program_names_its_debian_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message for an absent Slurm program says which package brings it."""
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(MissingError, match="apt-get install slurm-client"):
        shell.run(["sbatch"], timeout_s=5)


def test_a_program_of_no_known_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """find_program names the program it did not find."""
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(MissingError, match="no-such-program-1: not found"):
        find_program("no-such-program-1")


def test_a_missing_working_directory_is_not_taken_for_a_missing_program(tmp_path: Path) -> None:
    """The two reasons for ENOENT are told apart."""
    with pytest.raises(MissingError, match="directory to run it in does not exist"):
        shell.run(["true"], timeout_s=5, cwd=tmp_path / "absent")


def test_a_file_that_is_not_executable_is_said_so(tmp_path: Path) -> None:
    """A program without its x bit is reported as not allowed."""
    script = tmp_path / "script"
    script.write_text("#!/bin/true\n")
    with pytest.raises(MissingError, match="not allowed to run it"):
        shell.run([str(script)], timeout_s=5)


def test_env_adds_to_the_environment() -> None:
    """Variables given are added; the others stay."""
    code = "import os; print(os.environ['ADDED'], 'PATH' in os.environ)"
    assert shell.run([sys.executable, "-c", code], timeout_s=20, env={"ADDED": "yes"}).stdout == "yes True\n"
    assert "ADDED" not in os.environ


def test_bytes_that_are_not_utf8_do_not_break_reading() -> None:
    """Output in another encoding is returned with replacement characters instead of an exception."""
    assert (
        "�"
        in shell.run([sys.executable, "-c", "import sys; sys.stdout.buffer.write(bytes([255]))"], timeout_s=20).stdout
    )
