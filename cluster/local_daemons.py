"""The daemons of a cluster on this machine that are not nodes: MUNGE, MariaDB, slurmdbd and slurmctld."""

from __future__ import annotations

import os
import pwd
import re
import secrets
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cluster.errors import CommandError, MissingError, OutsideError
from cluster.local_layout import Layout, LocalState
from cluster.local_processes import ProcessTable
from cluster.shell import Shell, find_program

_START_S = 60.0  # generous: on a loaded machine a daemon that takes 0.2 s has been seen to take 10 s
_LOOK_EVERY_S = 0.25
_OLDEST_SLURM = (22, 5)
_MUNGE_KEY_BYTES = 128
_SYSTEM_TABLES = tuple(
    Path("/usr/share") / directory / name
    for directory in ("mysql", "mariadb")
    for name in ("mysql_system_tables.sql", "mariadb_system_tables.sql")
)
"""Where MariaDB's packages keep the statements that create its own tables (the second name is that of 11.x)."""


class Daemons:
    """Starts and watches the daemons of one cluster."""

    def __init__(self, layout: Layout, shell: Shell, processes: ProcessTable) -> None:
        self._layout = layout
        self._shell = shell
        self._processes = processes

    def start_munged(self) -> None:
        """Start this cluster's own munged with a key of its own; it is ready when this returns."""
        layout = self._layout
        descriptor = os.open(layout.munge_key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(_MUNGE_KEY_BYTES))
        self._run(
            "munged",
            [
                f"--key-file={layout.munge_key}",
                f"--socket={layout.munge_socket}",
                f"--pid-file={layout.run / 'munged.pid'}",
                f"--log-file={layout.logs / 'munged.log'}",
                f"--seed-file={layout.munge_key.parent / 'munge.seed'}",
                "--num-threads=4",
                # Without this munged refuses a socket that not everybody can reach, such as one in a closed home directory;
                # there, only its owner uses the cluster. Key and seed are ours, with modes of ours, so it hides nothing else.
                "--force",
            ],
        )
        self._wait_for("munged", layout.munge_socket.exists)

    def start_mariadbd(self) -> None:
        """Start MariaDB, reachable by one socket in a directory that only its owner can enter, and nothing else.

        It is set to start quickly and to forget quickly: a power cut may lose its last second, which a cluster that
        lives on one machine for an afternoon does not mind.
        """
        layout = self._layout
        first_statements = layout.database / "first.sql"
        first_statements.write_text(_stored_procedures_table(), encoding="utf-8")
        self._run(
            "setsid",
            [
                "--fork",
                find_program("mariadbd"),
                "--no-defaults",
                f"--datadir={layout.database / 'data'}",
                f"--socket={layout.database_socket}",
                f"--pid-file={layout.run / 'mariadbd.pid'}",
                f"--log-error={layout.logs / 'mariadbd.log'}",
                f"--init-file={first_statements}",
                f"--user={pwd.getpwuid(os.geteuid()).pw_name}",
                "--skip-networking",
                # No users and passwords: whoever can open the socket is the owner, and the directory sees to that.
                "--skip-grant-tables",
                "--skip-log-bin",
                "--innodb-flush-method=nosync",
                "--innodb-flush-log-at-trx-commit=0",
                "--skip-innodb-doublewrite",
                "--innodb-buffer-pool-size=64M",
                "--innodb-log-file-size=4M",
                "--innodb-data-file-path=ibdata1:1M:autoextend",
                "--innodb-temp-data-file-path=ibtmp1:1M:autoextend",
                "--innodb-lock-wait-timeout=900",
                "--performance-schema=OFF",
                "--key-buffer-size=1M",
                "--aria-pagecache-buffer-size=1M",
            ],
        )
        self._wait_for("mariadbd", lambda: _answers(layout.database_socket))

    def start_slurmdbd(self, state: LocalState) -> None:
        """Start slurmdbd, which makes its tables, and wait until it listens."""
        # slurmdbd takes no path on its command line, by which its process could be known as ours: a link in our
        # directory gives one.
        link = self._layout.run / "slurmdbd"
        link.unlink(missing_ok=True)
        link.symlink_to(find_program("slurmdbd"))
        # Nor has it a setting for the database's socket; the client library takes that from this variable.
        self._run(str(link), [], env={"MYSQL_UNIX_PORT": str(self._layout.database_socket)})
        self._wait_for("slurmdbd", lambda: _listens(state.database_daemon_port))

    def start_slurmctld(self, state: LocalState) -> None:
        """Start slurmctld and wait until it listens."""
        self._run("slurmctld", ["-f", str(self._layout.slurm_conf)])
        self._wait_for("slurmctld", lambda: _listens(state.controller_port))

    def _run(self, program: str, arguments: Sequence[str], *, env: Mapping[str, str] | None = None) -> None:
        environment = {"SLURM_CONF": str(self._layout.slurm_conf), **(env or {})}
        try:
            self._shell.run(
                [find_program(program), *arguments], timeout_s=_START_S, env=environment, cwd=self._layout.directory
            )
        except CommandError as error:
            raise OutsideError(f"{error}{tail_of_log(self._layout, Path(program).name)}") from error

    def _wait_for(self, role: str, is_ready: Callable[[], bool]) -> None:
        """Wait until a daemon is ready, or until it has died: then say at once what its log says."""
        deadline = time.monotonic() + _START_S
        next_look = time.monotonic() + _LOOK_EVERY_S
        while not is_ready():
            now = time.monotonic()
            if now > next_look:
                next_look = now + _LOOK_EVERY_S
                if (
                    not any(
                        process.role in (role, "helper") for process in self._processes.find(self._layout.directory)
                    )
                    and not is_ready()
                ):
                    raise OutsideError(f"{role} ended right after its start{tail_of_log(self._layout, role)}")
            if now > deadline:
                raise OutsideError(
                    f"{role} runs but was not ready after {_START_S:g} s{tail_of_log(self._layout, role)}"
                )
            time.sleep(0.01)


def tail_of_log(layout: Layout, stem: str, *, num_lines: int = 12) -> str:
    """Return the end of a daemon's log with a heading, to be put behind a message; empty if there is no log."""
    path = layout.logs / f"{stem}.log"
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            lines = [line.rstrip() for line in deque(file, maxlen=num_lines)]
    except OSError:
        return ""
    return "\n".join([f"\nthe end of {path}:", *(f"  {line}" for line in lines)]) if lines else ""


def slurm_version(shell: Shell) -> tuple[int, int]:
    """Return the installed Slurm's version as (year, month).

    Raises:
        MissingError: It is not installed, or older than what Muster renders for.
    """
    printed = shell.run(
        [find_program("slurmctld"), "-V"], timeout_s=10
    ).stdout  # "slurm-wlm 22.05.8" on Debian, "slurm 25.11.4" elsewhere
    found = re.search(r"\b(\d\d)\.(\d\d)\b", printed)
    if found is None:
        raise MissingError(
            f"slurmctld -V printed {printed.strip()!r}, in which there is no version; is this SchedMD's slurmctld?"
        )
    version = (int(found.group(1)), int(found.group(2)))
    if version < _OLDEST_SLURM:
        raise MissingError(
            f"Slurm {version[0]}.{version[1]:02d} is installed; Muster needs {_OLDEST_SLURM[0]}.{_OLDEST_SLURM[1]:02d} or newer"
        )
    return version


def _stored_procedures_table() -> str:
    """Return the statements that MariaDB needs before slurmdbd can store its procedures.

    A whole mariadb-install-db takes five times as long as the server's start, for tables of users and rights that
    --skip-grant-tables does not read. slurmdbd needs one table, in the form that belongs to the installed server: it
    is taken from the server package's own script.
    """
    for path in _SYSTEM_TABLES:
        if path.is_file():
            found = re.search(
                r"^CREATE TABLE IF NOT EXISTS proc \(.*?;$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
            )
            if found:
                table = found.group().replace("IF NOT EXISTS proc (", "IF NOT EXISTS mysql.proc (", 1)
                return f"CREATE DATABASE IF NOT EXISTS mysql;\n{table}\n"
    places = ", ".join(map(str, _SYSTEM_TABLES))
    raise MissingError(
        f"MariaDB's script of system tables is not where its packages put it ({places}); apt-get install mariadb-server-core"
    )


def _listens(port: int, table: Path = Path("/proc/net/tcp")) -> bool:
    """Whether a daemon listens on a loopback port. Not tried out: Slurm logs an error for each empty connection."""
    wanted = f"0100007F:{port:04X}"  # 127.0.0.1 as the kernel prints it on little-endian machines (proc(5))
    lines = (line.split() for line in table.read_text(encoding="ascii").splitlines()[1:])
    return any(fields[1] == wanted and fields[3] == "0A" for fields in lines)


def _answers(path: Path) -> bool:
    """Whether the server behind a UNIX socket greets: MariaDB listens before its first statements, greets after."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(0.05)
        try:
            client.connect(str(path))
            return bool(client.recv(1))
        except OSError:
            return False
