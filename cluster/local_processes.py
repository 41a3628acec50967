"""The processes of a cluster on this machine: found in the process table, ended without hitting anybody else's.

No list of pids is kept: it would be wrong after a crash or a reboot, when it matters. A process is a cluster's own if
its program is one that Muster starts and its command line names a path in the cluster's state directory. Signals go
through a pidfd that is opened before the command line is read, so a pid that is given to another process in between
cannot be hit.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import MissingError, OutsideError

DAEMONS = ("munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd")
_PROGRAMS = frozenset({*DAEMONS, "unshare", "nsenter", "setsid", "setpriv", "sh"})
_SCRIPT_DAEMON = ": slurmscriptd"  # slurmctld's helper since 21.08; what comes before depends on the build
_NODE_SCRIPT = "node.sh"


@dataclass(frozen=True)
class ClusterProcess:
    """A process that belongs to a cluster."""

    pid: int
    role: str
    """`munged`, `mariadbd`, `slurmdbd`, `slurmctld`, `slurmd`, `init` (PID 1 of a node) or `helper` (around one of
    those)."""
    node: str | None
    """The node that it is, or belongs to."""
    start_ticks: int
    """When it started, in clock ticks after boot: with the pid, a name that is never used again."""


class ProcessTable:
    """The processes of this machine, seen through `/proc`."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc

    def find(self, directory: Path) -> list[ClusterProcess]:
        """Return the processes of the cluster whose state directory is `directory`, oldest first."""
        found = []
        for entry in os.scandir(self._proc):
            if entry.name.isdigit():
                process = self._identify(int(entry.name), directory)
                if process is not None:
                    found.append(process)
        return sorted(found, key=lambda process: (process.start_ticks, process.pid))

    def send(self, process: ClusterProcess, directory: Path, signal_number: int) -> bool:
        """Send a signal; return False if the process is gone, or its pid is somebody else's by now."""
        with contextlib.ExitStack() as stack:
            descriptor = self._open(process, directory, stack)
            return descriptor is not None and _signal(descriptor, process, signal_number)

    def end(
        self,
        processes: Iterable[ClusterProcess],
        directory: Path,
        *,
        signal_number: int = signal.SIGKILL,
        deadline_s: float = 10.0,
    ) -> None:
        """Signal the processes and wait until they are gone; what ignores another signal until the deadline gets
        SIGKILL.

        For a node's `init` this returns when every process of the node is gone: the kernel ends PID 1 of a namespace
        last.

        Raises:
            MissingError: A process is not ours to signal.
            OutsideError: A process outlived SIGKILL, as one does that hangs in the kernel.
        """
        with contextlib.ExitStack() as stack:
            left: dict[int, ClusterProcess] = {}
            for process in processes:
                descriptor = self._open(process, directory, stack)
                if descriptor is not None and _signal(descriptor, process, signal_number):
                    left[descriptor] = process
            _wait_for_exits(left, deadline_s)
            if left and signal_number != signal.SIGKILL:
                for descriptor, process in left.items():
                    _signal(descriptor, process, signal.SIGKILL)
                _wait_for_exits(left, deadline_s)
            if left:
                names = ", ".join(f"{process.role} (pid {process.pid})" for process in left.values())
                raise OutsideError(
                    f"{names}: still there {deadline_s:g} s after SIGKILL; "
                    "it hangs in the kernel, look at /proc/PID/stack and dmesg"
                )

    def _open(self, process: ClusterProcess, directory: Path, stack: contextlib.ExitStack) -> int | None:
        """Open a pidfd and only then check whose the pid is: from there on it means that process alone."""
        try:
            descriptor = os.pidfd_open(process.pid)
        except ProcessLookupError:
            return None
        stack.callback(os.close, descriptor)
        return descriptor if self._identify(process.pid, directory) == process else None

    def _identify(self, pid: int, directory: Path) -> ClusterProcess | None:
        folder = self._proc / str(pid)
        try:
            arguments = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
            if not arguments or not self._is_ours(folder, arguments, directory):
                return None
            stat = (folder / "stat").read_text(errors="replace")
        except OSError:
            return None  # it ended while we looked
        # The second field, the program's name in parentheses, may itself hold spaces and parentheses (proc(5)).
        fields = stat.rpartition(")")[2].split()
        if fields[0] in "ZX":
            return None
        role, node = _role(arguments)
        return ClusterProcess(pid=pid, role=role, node=node, start_ticks=int(fields[19]))

    def _is_ours(self, folder: Path, arguments: list[str], directory: Path) -> bool:
        if arguments[0].endswith(_SCRIPT_DAEMON):
            # It overwrites its command line, but works, like slurmctld itself, in the directory of its log.
            return str((folder / "cwd").readlink()).startswith(f"{directory}/")
        pattern = re.compile(rf"(?:^|=){re.escape(str(directory))}(?:/|$)")
        return Path(arguments[0]).name in _PROGRAMS and any(pattern.search(argument) for argument in arguments)


def wait_until(condition: Callable[[], bool], *, deadline_s: float, interval_s: float = 0.02) -> bool:
    """Poll `condition` until it is true; return False if the deadline passes first."""
    deadline = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(interval_s)
    return True


def _signal(descriptor: int, process: ClusterProcess, signal_number: int) -> bool:
    try:
        signal.pidfd_send_signal(descriptor, signal_number)
    except ProcessLookupError:
        return False
    except PermissionError as error:
        raise MissingError(
            f"{process.role} (pid {process.pid}) belongs to another user; ask them, or run this as root"
        ) from error
    return True


def _role(arguments: list[str]) -> tuple[str, str | None]:
    program = Path(arguments[0]).name
    scripts = [number for number, argument in enumerate(arguments) if argument.endswith(f"/{_NODE_SCRIPT}")]
    if scripts:
        action, node = [*arguments[scripts[0] + 1 :], "", ""][:2]
        return ("init" if program == "sh" and action == "init" else "helper"), node or None
    return (program if program in DAEMONS else "helper"), (
        arguments[arguments.index("-N") + 1] if "-N" in arguments[:-1] else None
    )


def _wait_for_exits(left: dict[int, ClusterProcess], deadline_s: float) -> None:
    """Take out of `left` every process that ends before the deadline."""
    deadline = time.monotonic() + deadline_s
    while left and time.monotonic() < deadline:
        poll = select.poll()  # unlike select(), takes descriptors above 1023
        for descriptor in left:
            poll.register(descriptor, select.POLLIN)
        for descriptor, _ in poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            del left[descriptor]
