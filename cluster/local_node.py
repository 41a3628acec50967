"""The nodes of a cluster on this machine: each one a slurmd in namespaces of its own, with a power switch.

A node has its own mount, UTS and PID namespaces: its hostname is the node's name, its `/etc/hosts` resolves every
node of the cluster to the loopback address (torch's rendezvous and gloo look names up), its `/dev/shm` is its own,
and killing its PID 1 kills everything on it at once. `/tmp`, home directories and the network are the machine's. An
ordinary user gets the same through a user namespace in which only that user exists. `templates/local/node.sh` is what
runs as the node's PID 1.
"""

from __future__ import annotations

import importlib.resources
import os
import signal
import time
from pathlib import Path

from cluster.errors import CommandError, MissingError, NotFoundError, OutsideError, StateError
from cluster.local_daemons import tail_of_log
from cluster.local_layout import Layout, make_directory, write_file
from cluster.local_processes import ClusterProcess, ProcessTable
from cluster.settings import ClusterSpec
from cluster.shell import Shell, find_program

_START_S = 60.0
_LOOK_EVERY_S = 0.5


class Nodes:
    """Powers the nodes of one cluster on and off, and starts and stops their slurmd."""

    def __init__(self, layout: Layout, spec: ClusterSpec, shell: Shell, processes: ProcessTable) -> None:
        self._layout = layout
        self._spec = spec
        self._shell = shell
        self._processes = processes
        self._names = [name for name, _ in spec.nodes()]

    def prepare(self) -> None:
        """Write what every node needs: its boot script, the names of all nodes, and the device files of the GPUs."""
        layout = self._layout
        script = importlib.resources.files("templates").joinpath("local/node.sh").read_text(encoding="utf-8")
        write_file(layout.node_script, script)
        write_file(layout.hosts, _hosts(self._names))
        make_directory(layout.spool, 0o755)
        make_directory(layout.nodes, 0o755)
        for name in self._names:
            make_directory(layout.spool / name, 0o755)
            make_directory(layout.nodes / name, 0o755)
            make_directory(layout.nodes / name / "scratch", 0o1777)
        make_directory(layout.gpu_device.parent, 0o755)
        for number in range(max(pool.gpus_per_node for pool in self._spec.pools)):
            # Slurm insists on character devices and follows links; making real ones takes root, and containers forbid
            # even that.
            Path(f"{layout.gpu_device}{number}").symlink_to("/dev/null")

    def check_namespaces(self) -> None:
        """Try the namespaces before anything is started.

        Raises:
            MissingError: This user may not make them here; the message says what forbids it.
        """
        try:
            self._shell.run(
                [
                    find_program("unshare"),
                    *_unshare_options(),
                    "sh",
                    "-c",
                    "hostname muster-try && mount -t tmpfs tmpfs /dev/shm",
                ],
                timeout_s=10,
            )
        except CommandError as error:
            if os.geteuid() == 0:
                why = (
                    "root lacks CAP_SYS_ADMIN, as in a container: start that with --privileged, "
                    "or with --cap-add SYS_ADMIN --security-opt seccomp=unconfined"
                )
            else:
                why = (
                    "unprivileged user namespaces are off (sysctl kernel.unprivileged_userns_clone=1, "
                    "kernel.apparmor_restrict_unprivileged_userns=0, user.max_user_namespaces>0 allow them); "
                    "allow them, or run this as root"
                )
            raise MissingError(
                f"cannot make the namespaces that a node lives in ({error.stderr.strip()}): {why}"
            ) from error

    def power_on(self, node: str, *, rebooted: bool = False) -> None:
        """Boot a node and start its slurmd; it is up, though perhaps not registered yet, when this returns.

        Args:
            node: Its name.
            rebooted: Let slurmd tell the controller that the node has been rebooted (slurmd -b), which ends waiting
                for its jobs.

        Raises:
            StateError: It is on.
            OutsideError: slurmd did not start; the message holds the end of its log.
        """
        self._check_name(node)
        if self._find("init", node):
            raise StateError(f"{node}: is on already; power it off first")
        layout = self._layout
        flag = "-b" if rebooted else ""
        self._shell.run(
            [
                find_program("setsid"), "--fork", "sh", str(layout.node_script), "boot", node, str(layout.directory),
                str(self._spec.storage.scratch), flag, *_unshare_options(),
            ],
            timeout_s=_START_S,
            env=_node_environment(),
            cwd=layout.directory,
        )  # fmt: skip
        self._wait_for_slurmd(node)

    def power_off(self, node: str) -> None:
        """Kill everything on a node at once, as a power cut does. Nothing happens if it is off."""
        self._check_name(node)
        self._processes.end([p for p in self._of(node) if p.role != "helper"], self._layout.directory)
        self._pid_file(node).unlink(missing_ok=True)

    def power_off_all(self) -> None:
        """Kill everything on every node at once."""
        self._processes.end(
            [p for p in self._processes.find(self._layout.directory) if p.node and p.role != "helper"],
            self._layout.directory,
        )

    def start_slurmd(self, node: str) -> None:
        """Start slurmd on a living node that has none; running job steps are taken up again.

        Raises:
            StateError: The node is off, or its slurmd runs.
            OutsideError: slurmd did not start; the message holds the end of its log.
        """
        self._check_name(node)
        init = self._find("init", node)
        if init is None:
            raise StateError(f"{node}: is powered off; power it on instead")
        if self._find("slurmd", node):
            raise StateError(f"{node}: its slurmd is running")
        layout = self._layout
        self._pid_file(node).unlink(missing_ok=True)  # a killed slurmd leaves its own behind
        # The user namespace comes first: only inside it may an ordinary user enter the others.
        namespaces = ["--user", "--preserve-credentials"] if os.geteuid() != 0 else []
        enter = [find_program("nsenter"), f"--target={init.pid}", *namespaces, "--mount", "--uts", "--pid"]
        try:
            self._shell.run(
                [*enter, "sh", str(layout.node_script), "slurmd", node, str(layout.directory)],
                timeout_s=_START_S,
                env=_node_environment(),
            )
        except CommandError as error:
            raise OutsideError(f"{error}{tail_of_log(layout, f'slurmd-{node}')}") from error
        self._wait_for_slurmd(node)

    def stop_slurmd(self, node: str, signal_number: int = signal.SIGTERM) -> None:
        """End a node's slurmd and wait until it is gone. The node and its jobs' processes live on.

        Raises:
            StateError: It is not running.
        """
        self._check_name(node)
        process = self._find("slurmd", node)
        if process is None:
            raise StateError(f"{node}: its slurmd is not running")
        if signal_number == signal.SIGSTOP:
            self._processes.send(process, self._layout.directory, signal_number)
            return
        self._processes.end([process], self._layout.directory, signal_number=signal_number)

    def _check_name(self, node: str) -> None:
        if node not in self._names:
            raise NotFoundError(
                f"{node}: cluster {self._layout.name} has no such node; it has {self._names[0]} to {self._names[-1]}"
            )

    def _of(self, node: str) -> list[ClusterProcess]:
        return [process for process in self._processes.find(self._layout.directory) if process.node == node]

    def _find(self, role: str, node: str) -> ClusterProcess | None:
        # The oldest one: slurmd forks, and a child that is about to become a slurmstepd still carries slurmd's
        # command line.
        return next((process for process in self._of(node) if process.role == role), None)

    def _wait_for_slurmd(self, node: str) -> None:
        """Wait for the pid file that slurmd writes once it listens, or for its death."""
        deadline = time.monotonic() + _START_S
        next_look = time.monotonic() + _LOOK_EVERY_S  # less often: that reads all of /proc
        while not self._pid_file(node).exists():
            now = time.monotonic()
            if now > deadline or (now > next_look and not self._of(node)):
                logs = tail_of_log(self._layout, f"slurmd-{node}") + tail_of_log(self._layout, f"node-{node}")
                raise OutsideError(f"slurmd of {node} did not start{logs}")
            if now > next_look:
                next_look = now + _LOOK_EVERY_S
            time.sleep(0.01)

    def _pid_file(self, node: str) -> Path:
        return self._layout.run / f"slurmd-{node}.pid"


def _unshare_options() -> list[str]:
    ours = [] if os.geteuid() == 0 else ["--user", "--map-current-user", "--keep-caps"]
    return [*ours, "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]


def _node_environment() -> dict[str, str]:
    # Debian keeps daemons in sbin, which an ordinary user's PATH does not have.
    return {"PATH": f"{os.environ.get('PATH', '/usr/bin:/bin')}:/usr/local/sbin:/usr/sbin:/sbin"}


def _hosts(names: list[str]) -> str:
    try:
        machine = Path("/etc/hosts").read_text(encoding="utf-8", errors="replace")
    except OSError:
        machine = "127.0.0.1 localhost\n"
    ours = "".join(f"127.0.0.1 {name}\n" for name in names)
    return f"# nodes of a Muster local cluster\n{ours}# this machine's own\n{machine}"
