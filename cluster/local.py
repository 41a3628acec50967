"""A real Slurm cluster on this machine: up, status, down, and faults to order.

Everything is rendered by the code that renders production (`cluster.render`), listens on loopback only, and lives in one state
directory a cluster. What runs is never taken from a record but from the process table, so a cluster whose `up` was killed, or whose
machine was rebooted, is seen as what it is.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster.errors import CommandError, MissingError, MusterError, NotFoundError, OutsideError, StateError
from cluster.local_daemons import Daemons, slurm_version, tail_of_log
from cluster.local_layout import (
    Layout,
    LocalState,
    list_layouts,
    locked,
    read_description,
    read_state,
    state_root,
    write_file,
)
from cluster.local_node import Nodes
from cluster.local_ports import LOOPBACK, held_ports
from cluster.local_processes import ProcessTable, wait_until
from cluster.render import SlurmSite, accounting_plan, render_slurm
from cluster.settings import ClusterSpec
from cluster.shell import LocalShell, Shell, find_program
from cluster.yamlfile import dump_yaml

_COMMAND_S = 60.0
_REGISTER_S = 120.0
_NODES_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class Step:
    """One finished step of `up`."""

    name: str
    seconds: float
    done: int = 1
    total: int = 1
    """Several for steps that are done once a node."""


Progress = Callable[[Step], None]


@dataclass(frozen=True, kw_only=True)
class DaemonStatus:
    """One daemon of a cluster."""

    name: str
    pid: int | None
    """None: it should run and does not."""
    port: int | None = None


@dataclass(frozen=True, kw_only=True)
class NodeStatus:
    """One node of a cluster."""

    name: str
    powered: bool
    slurmd_pid: int | None
    slurm_state: str
    """In Slurm's words, such as `idle`; `unknown` if slurmctld does not answer."""


@dataclass(frozen=True, kw_only=True)
class LocalStatus:
    """A cluster on this machine as it is now."""

    name: str
    state: Literal["up", "degraded", "starting", "stopped"]
    """`degraded`: a daemon is missing; `stopped`: nothing runs, only files are left."""
    directory: Path
    owner: str
    started_at: float | None
    daemons: tuple[DaemonStatus, ...] = ()
    nodes: tuple[NodeStatus, ...] = ()


class LocalCluster:
    """One cluster on this machine, known by its name. Constructing it touches nothing."""

    def __init__(
        self, name: str, *, root: Path | None = None, shell: Shell | None = None, processes: ProcessTable | None = None
    ) -> None:
        self.name = name
        self.layout = Layout((root or state_root()) / name)
        self._shell = shell or LocalShell()
        self._processes = processes or ProcessTable()

    # ---- life

    def up(self, spec: ClusterSpec, progress: Progress | None = None) -> None:
        """Start every daemon and wait until all nodes are idle.

        What an interrupted earlier run left behind is removed first. Whatever goes wrong, Ctrl-C included, everything that has been
        started is ended again; the logs stay.

        Args:
            spec: The cluster. It takes this cluster's name.
            progress: Called after each step, from whichever thread did it.

        Raises:
            StateError: It is up already, or half of it is.
            MissingError: A program or a permission is absent.
            InputError: A path does not suit Slurm.
            OutsideError: A daemon did not start; the message holds the end of its log.
        """
        spec = spec.model_copy(update={"name": self.name})
        report = progress or (lambda _step: None)
        self.layout.check(spec)
        version = slurm_version(self._shell)
        nodes = Nodes(self.layout, spec, self._shell, self._processes)
        nodes.check_namespaces()
        with locked(self.layout.directory):
            self._refuse_if_alive()
            self._clear()
            try:
                self._start(spec, version, nodes, report)
            except BaseException:
                self._end_processes()
                self._clear(keep_logs=True)
                raise

    def down(self, *, keep_logs: bool = False) -> None:
        """End every process and remove every file of the cluster, running jobs included.

        Args:
            keep_logs: Leave the directory of logs.

        Raises:
            NotFoundError: There is no such cluster.
            MissingError: It is somebody else's.
        """
        if not self.layout.directory.is_dir():
            raise self._not_found()
        self._check_owner()
        with locked(self.layout.directory):
            self._end_processes()
            self._clear(keep_logs=keep_logs)
            if not keep_logs:
                self.layout.directory.rmdir()
        for parent in (self.layout.directory.parent, *self.layout.directory.parent.parents[:1]):
            with contextlib.suppress(OSError):  # another cluster lives there, or it was never ours
                if parent.name in ("local", "muster"):
                    parent.rmdir()

    def status(self) -> LocalStatus:
        """Return what runs now.

        Raises:
            NotFoundError: There is no such cluster.
        """
        if not self.layout.directory.is_dir():
            raise self._not_found()
        recorded, spec = read_state(self.layout), read_description(self.layout)
        running = self._processes.find(self.layout.directory)
        owner = pwd.getpwuid(self.layout.directory.stat().st_uid).pw_name
        if recorded is None or spec is None:
            state: Literal["starting", "stopped"] = "starting" if running else "stopped"
            return LocalStatus(
                name=self.name, state=state, directory=self.layout.directory, owner=owner, started_at=None
            )
        pids = {(process.role, process.node): process.pid for process in reversed(running)}
        daemons = tuple(
            DaemonStatus(name=name, pid=pids.get((name, None)), port=port)
            for name, port in _expected_daemons(spec, recorded)
        )
        states = self._node_states() if pids.get(("slurmctld", None)) else {}
        nodes = tuple(
            NodeStatus(
                name=name,
                powered=("init", name) in pids,
                slurmd_pid=pids.get(("slurmd", name)),
                slurm_state=states.get(name, "unknown"),
            )
            for name, _ in spec.nodes()
        )
        whole = all(daemon.pid for daemon in daemons) and all(node.slurmd_pid for node in nodes)
        return LocalStatus(
            name=self.name,
            state="stopped"
            if not running
            else "starting"
            if recorded.phase == "starting"
            else "up"
            if whole
            else "degraded",
            directory=self.layout.directory,
            owner=owner,
            started_at=recorded.started_at,
            daemons=daemons,
            nodes=nodes,
        )

    def environment(self) -> dict[str, str]:
        """Return the variables with which Slurm's and Muster's commands talk to this cluster.

        Raises:
            NotFoundError: There is no such cluster, or it is not up.
        """
        if not self.layout.slurm_conf.is_file():
            raise self._not_found()
        return {"SLURM_CONF": str(self.layout.slurm_conf), "MUSTER_CLUSTER": str(self.layout.description)}

    # ---- faults

    def stop_slurmd(self, node: str, signal_number: int = signal.SIGTERM) -> None:
        """End a node's slurmd with a signal; the node and its jobs' processes live on. See `Nodes.stop_slurmd`."""
        self._nodes().stop_slurmd(node, signal_number)

    def start_slurmd(self, node: str) -> None:
        """Start slurmd on a living node that has none. See `Nodes.start_slurmd`."""
        self._nodes().start_slurmd(node)

    def power_off(self, node: str) -> None:
        """Kill everything on a node at once, as a power cut does."""
        self._nodes().power_off(node)

    def power_on(self, node: str) -> None:
        """Boot a node that is off. It registers with the controller as rebooted."""
        self._nodes().power_on(node, rebooted=True)

    # ---- the way up

    def _start(self, spec: ClusterSpec, version: tuple[int, int], nodes: Nodes, report: Progress) -> None:
        layout = self.layout
        num_nodes = sum(pool.nodes for pool in spec.pools)
        with contextlib.ExitStack() as ports:
            # One search at a time under this root, so that two clusters on their way up see each other's choice.
            with locked(layout.directory.parent):
                first = ports.enter_context(held_ports(2 + num_nodes, avoid=self._ports_of_others()))
                state = LocalState(
                    name=self.name, phase="starting", owner=pwd.getpwuid(os.geteuid()).pw_name, started_at=time.time(),
                    controller_port=first, database_daemon_port=first + 1, first_node_port=first + 2, num_nodes=num_nodes,
                )  # fmt: skip
                state.write(layout.state_file)
            with _timed("files", report):
                self._write_files(spec, version, state)
                nodes.prepare()
            self._start_daemons(spec, state, nodes, report)
        with _timed("nodes idle", report):
            self._wait_for_nodes(num_nodes)
        LocalState(**{**state.__dict__, "phase": "up"}).write(layout.state_file)

    def _write_files(self, spec: ClusterSpec, version: tuple[int, int], state: LocalState) -> None:
        layout = self.layout
        for directory, mode in (
            (layout.configuration, 0o755), (layout.logs, 0o755), (layout.run, 0o755), (layout.munge_socket.parent, 0o755),
            (layout.munge_key.parent, 0o700), (layout.directory / "slurmctld", 0o700), (layout.database, 0o700), (layout.database / "data", 0o700),
        ):  # fmt: skip
            directory.mkdir(exist_ok=True)
            directory.chmod(mode)
        write_file(layout.description, dump_yaml(spec.model_dump(mode="json", exclude_defaults=True)))
        for name, text in render_slurm(spec, self._site(version, state)).items():
            write_file(layout.configuration / name, text, mode=0o600 if name == "slurmdbd.conf" else 0o644)

    def _site(self, version: tuple[int, int], state: LocalState) -> SlurmSite:
        layout = self.layout
        return SlurmSite(
            version=version,
            controller_host=socket.gethostname().partition(".")[0],
            controller_address=LOOPBACK,
            controller_port=state.controller_port,
            node_address=LOOPBACK,
            first_node_port=state.first_node_port,
            database_daemon_host="localhost",
            database_daemon_address=LOOPBACK,
            database_daemon_port=state.database_daemon_port,
            slurm_user=state.owner,
            slurmd_user=state.owner,
            state_directory=layout.directory / "slurmctld",
            spool_directory=f"{layout.directory}/spool/%n",
            log_directory=layout.logs,
            run_directory=layout.run,
            munge_socket=layout.munge_socket,
            gpu_device=str(layout.gpu_device),
            loopback_only=True,
            several_slurmd_per_machine=True,
            simulated_hardware=True,
            # Each node is spoken to directly: a powered-off node would otherwise hold up the ones behind it.
            tree_width=65_533,
            process_tracking="proctrack/linuxproc",
            task_plugin="task/none",
            job_accounting="jobacct_gather/linux",
            return_to_service=2,
            parameters={
                "MailProg": "/bin/true",  # no job of a simulated cluster writes mail
                "MessageTimeout": "30",  # a loaded machine of two cores answers late
            },
        )

    def _start_daemons(self, spec: ClusterSpec, state: LocalState, nodes: Nodes, report: Progress) -> None:
        daemons = Daemons(self.layout, self._shell, self._processes)
        plan = accounting_plan(spec, [state.owner, *filter(None, [os.environ.get("SUDO_USER")])])
        with _timed("munged", report):
            daemons.start_munged()
        with ThreadPoolExecutor(max_workers=_NODES_AT_ONCE) as pool:
            if spec.accounting.enabled:
                with _timed("mariadbd", report):
                    daemons.start_mariadbd()
                with _timed("slurmdbd", report):
                    daemons.start_slurmdbd(state)
                with _timed("accounts", report):
                    self._sacctmgr(plan.before_controller)
            with _timed("slurmctld", report):
                daemons.start_slurmctld(state)
            names = [name for name, _ in spec.nodes()]
            started = time.monotonic()
            for done, _ in enumerate(pool.map(nodes.power_on, names), start=1):
                report(Step(name="slurmd", seconds=time.monotonic() - started, done=done, total=len(names)))
            if spec.accounting.enabled:
                with _timed("limits", report):
                    self._sacctmgr(plan.after_controller)

    def _sacctmgr(self, calls: Sequence[Sequence[str]]) -> None:
        for arguments in calls:
            result = self._shell.run(
                [find_program("sacctmgr"), "-i", *arguments], timeout_s=_COMMAND_S, env=self.environment(), check=False
            )
            printed = (result.stderr + result.stdout).strip()
            if result.returncode != 0 and "Nothing new added" not in printed and "already exist" not in printed:
                raise OutsideError(f"sacctmgr {' '.join(arguments)}: {printed}{tail_of_log(self.layout, 'slurmdbd')}")

    def _wait_for_nodes(self, num_nodes: int) -> None:
        def all_idle() -> bool:
            states = self._node_states()
            return len(states) == num_nodes and all(state == "idle" for state in states.values())

        if not wait_until(all_idle, deadline_s=_REGISTER_S, interval_s=0.1):
            states = self._node_states()
            late = [f"{node} is {state}" for node, state in states.items() if state != "idle"] or [
                "slurmctld does not answer"
            ]
            raise OutsideError(
                f"not every node was idle after {_REGISTER_S:g} s: {', '.join(late[:8])}{tail_of_log(self.layout, 'slurmctld')}"
            )

    def _node_states(self) -> dict[str, str]:
        try:
            printed = self._shell.run(
                [find_program("sinfo"), "--noheader", "--Node", "--format=%N %T"],
                timeout_s=_COMMAND_S,
                env=self.environment(),
            ).stdout
        except (CommandError, MusterError):
            return {}
        return dict(line.split(maxsplit=1) for line in printed.splitlines() if " " in line)

    # ---- helpers

    def _nodes(self) -> Nodes:
        spec = read_description(self.layout)
        if spec is None:
            raise self._not_found()
        return Nodes(self.layout, spec, self._shell, self._processes)

    def _refuse_if_alive(self) -> None:
        running = {process.role for process in self._processes.find(self.layout.directory)}
        recorded = read_state(self.layout)
        if not running or recorded is None or recorded.phase == "starting":
            return
        if "slurmctld" in running:
            raise StateError(
                f"cluster {self.name} is up; muster local status --name {self.name} shows it, muster local down --name {self.name} ends it"
            )
        raise StateError(
            f"cluster {self.name} is half up (slurmctld is gone, {', '.join(sorted(running))} run); end it with muster local down --name {self.name}"
        )

    def _end_processes(self) -> None:
        """End what runs: the nodes first, since their slurmd would log the others' end; then the daemons that may close their files."""
        directory = self.layout.directory
        while running := self._processes.find(directory):
            nodes = [process for process in running if process.node is not None]
            if nodes:
                self._processes.end(nodes, directory)
                continue
            for role in ("slurmctld", "slurmdbd"):
                self._processes.end(
                    [p for p in running if p.role == role], directory, signal_number=signal.SIGTERM, deadline_s=3.0
                )
            self._processes.end([p for p in running if p.role not in ("slurmctld", "slurmdbd")], directory)

    def _clear(self, *, keep_logs: bool = False) -> None:
        for entry in list(self.layout.directory.iterdir()):
            if keep_logs and entry == self.layout.logs:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)

    def _check_owner(self) -> None:
        uid = self.layout.directory.stat().st_uid
        if os.geteuid() not in (0, uid):
            raise MissingError(
                f"cluster {self.name} belongs to {pwd.getpwuid(uid).pw_name}; ask them, or run this as root"
            )

    def _ports_of_others(self) -> set[int]:
        states = (read_state(layout) for layout in list_layouts(self.layout.directory.parent) if layout != self.layout)
        return {port for state in states if state is not None for port in state.ports()}

    def _not_found(self) -> NotFoundError:
        names = [layout.name for layout in list_layouts(self.layout.directory.parent)]
        there = f"the clusters here are: {', '.join(names)}" if names else "there are none; muster local up starts one"
        return NotFoundError(f"{self.name}: no cluster of this name under {self.layout.directory.parent}; {there}")


def _expected_daemons(spec: ClusterSpec, state: LocalState) -> Iterator[tuple[str, int | None]]:
    yield "munged", None
    if spec.accounting.enabled:
        yield "mariadbd", None
        yield "slurmdbd", state.database_daemon_port
    yield "slurmctld", state.controller_port


@contextlib.contextmanager
def _timed(name: str, report: Progress) -> Iterator[None]:
    started = time.monotonic()
    yield
    report(Step(name=name, seconds=time.monotonic() - started))
