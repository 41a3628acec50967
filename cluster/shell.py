"""The only place that starts commands: argument lists, a deadline for each, and the whole process group killed at it."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cluster.errors import CommandError, CommandTimeout, MissingError

logger = logging.getLogger(__name__)

_TAIL_CHARS = 2_000


@dataclass(frozen=True)
class CommandResult:
    """What a command left behind."""

    argv: tuple[str, ...]
    returncode: int
    stdout: str
    stderr: str
    seconds: float


class Shell(Protocol):
    """Runs commands. `LocalShell` is the real one; tests give one that answers from captured output."""

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
        """Run `argv` to its end and return what it printed.

        Args:
            argv: The program and its arguments. Never passed through a shell.
            timeout_s: Deadline in seconds. At the deadline the command's process group is killed.
            input_text: What it reads on standard input; nothing by default.
            env: Variables to add to, or replace in, the environment.
            cwd: Where it runs; the current directory by default.
            check: Raise `CommandError` on a non-zero exit status.

        Raises:
            MissingError: The program is not installed.
            CommandTimeout: The deadline passed.
            CommandError: It ended with an error and `check` is set.
        """


class LocalShell:
    """Runs commands on this machine."""

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
        """Run `argv` to its end; see `Shell.run`."""
        started = time.monotonic()
        try:
            process = subprocess.Popen(
                list(argv),
                stdin=subprocess.DEVNULL if input_text is None else subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env=None if env is None else {**os.environ, **env},
                cwd=cwd,
                start_new_session=True,  # so that the deadline reaches grandchildren too
            )
        except FileNotFoundError as error:
            if cwd is not None and not Path(cwd).is_dir():
                raise MissingError(f"{argv[0]}: the directory to run it in does not exist: {cwd}") from error
            raise MissingError(missing_program_message(argv[0])) from error
        except PermissionError as error:
            raise MissingError(
                f"{argv[0]}: not allowed to run it ({error.strerror}); check its mode and owner"
            ) from error
        try:
            stdout, stderr = process.communicate(input_text, timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            _kill_group(process)
            raise CommandTimeout(
                f"{shlex.join(argv)}: no answer within {timeout_s:g} s, killed; is the service it talks to up?",
                argv=argv,
                timeout_s=timeout_s,
            ) from error
        except BaseException:
            _kill_group(process)
            raise
        result = CommandResult(tuple(argv), process.returncode, stdout, stderr, time.monotonic() - started)
        logger.debug("ran %s -> %d in %.2f s", shlex.join(argv), result.returncode, result.seconds)
        if check and result.returncode != 0:
            raise command_error(result)
        return result


def command_error(result: CommandResult) -> CommandError:
    """Make the error for a command that ended badly; the message holds the end of what it printed."""
    said = (result.stderr.strip() or result.stdout.strip() or "it printed nothing")[-_TAIL_CHARS:]
    return CommandError(
        f"{shlex.join(result.argv)}: exit status {result.returncode}: {said}",
        argv=result.argv,
        returncode=result.returncode,
        stdout=result.stdout,
        stderr=result.stderr,
    )


def missing_program_message(program: str) -> str:
    """Say that `program` is absent and which Debian package brings it, where that is known."""
    package = DEBIAN_PACKAGES.get(Path(program).name)
    hint = f"apt-get install {package}" if package else "install it, or put it on PATH"
    return f"{program}: not found on PATH; {hint}"


def find_program(program: str) -> str:
    """Return the path of `program`, looking in the sbin directories too, where Debian keeps daemons.

    Raises:
        MissingError: It is not installed; the message names the Debian package.
    """
    path = shutil.which(
        program, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"])
    )
    if path is None:
        raise MissingError(missing_program_message(program))
    return path


DEBIAN_PACKAGES = {
    "mariadb": "mariadb-client-core",
    "mariadb-admin": "mariadb-client-core",
    "mariadb-install-db": "mariadb-server-core",
    "mariadbd": "mariadb-server-core",
    "mungekey": "munge",
    "munged": "munge",
    "sacct": "slurm-client",
    "sacctmgr": "slurm-client",
    "sbatch": "slurm-client",
    "scancel": "slurm-client",
    "scontrol": "slurm-client",
    "sinfo": "slurm-client",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "slurmdbd": "slurmdbd",
    "sprio": "slurm-client",
    "squeue": "slurm-client",
    "srun": "slurm-client",
    "unshare": "util-linux",
}


def _kill_group(process: subprocess.Popen[str]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.communicate()
