"""A real Slurm cluster on this machine: up, status, down, and faults to order.

Everything is rendered by the code that renders production (`cluster.render`), listens on loopback only, and lives in
one state directory a cluster. What runs is never taken from a record but from the process table, so a cluster whose
`up` was killed, or whose machine was rebooted, is seen as what it is.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pwd
import shutil
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from cluster.errors import InputError, MissingError, NotFoundError, StateError
from cluster.local_layout import (
    SYSTEM_ROOT,
    Layout,
    LocalState,
    list_layouts,
    locked,
    read_description,
    read_state,
    state_root,
)
from cluster.local_node import Nodes
from cluster.local_processes import ProcessTable
from cluster.local_start import Progress, Start, node_states
from cluster.settings import ClusterSpec, Name
from cluster.shell import LocalShell, Shell

logger = logging.getLogger(__name__)


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
    port: int
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
        try:
            self.name = TypeAdapter(Name).validate_python(name)
        except ValidationError as error:
            reason = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
            raise InputError(f"cluster name {name!r}: {reason}") from error
        self.layout = Layout((root or state_root()) / name)
        self._shell = shell or LocalShell()
        self._processes = processes or ProcessTable()

    # ---- life

    def up(self, spec: ClusterSpec, progress: Progress | None = None) -> None:
        """Start every daemon and wait until all nodes are idle.

        What an interrupted earlier run left behind is removed first. Whatever goes wrong, Ctrl-C included, everything
        that has been started is ended again; the logs stay.

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
        self.layout.check(spec)
        start = Start(self.layout, spec, self._shell, self._processes, progress or (lambda _step: None))
        start.check()
        if self.layout.directory.exists():
            self._check_owner()
        with locked(self.layout.directory):
            self._refuse_if_alive()
            if self._processes.find(self.layout.directory) or self.layout.state_file.exists():
                logger.warning("cluster %s: an earlier run was cut off; removing what it left", self.name)
            self._end_processes()
            self._clear()
            try:
                start.run()
            except BaseException:
                self._end_processes()
                self._clear(keep_logs=True)
                with contextlib.suppress(OSError):  # there are logs in it, to be read
                    self.layout.directory.rmdir()
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
            if not self.layout.strangers():
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
        states = node_states(self._shell, self.environment()) if pids.get(("slurmctld", None)) else {}
        nodes = tuple(
            NodeStatus(
                name=name,
                port=recorded.first_node_port + number,
                powered=("init", name) in pids,
                slurmd_pid=pids.get(("slurmd", name)),
                slurm_state=states.get(name, "unknown"),
            )
            for number, (name, _) in enumerate(spec.nodes())
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

    def is_mine(self) -> bool:
        """Whether this user started it, and so may end it."""
        return self.layout.directory.stat().st_uid == os.geteuid()

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
        """Boot a node that is off.

        It registers as rebooted: Slurm requeues what it believed to run there and, as in production
        (ReturnToService=1), leaves the node down until somebody resumes it: `scontrol update NodeName=...
        State=RESUME`.
        """
        self._nodes().power_on(node, rebooted=True)

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
                f"cluster {self.name} is up already; see it with muster local status --name {self.name}, "
                f"end it with muster local down --name {self.name}"
            )
        raise StateError(
            f"cluster {self.name} is half up: slurmctld is gone, {', '.join(sorted(running))} run; "
            f"end it with muster local down --name {self.name}"
        )

    def _end_processes(self) -> None:
        """Kill what runs, until nothing new appears: a process may have been on its way to start another."""
        while running := self._processes.find(self.layout.directory):
            # Nothing is asked to end in good order: all that they could save is about to be removed.
            self._processes.end(running, self.layout.directory)

    def _clear(self, *, keep_logs: bool = False) -> None:
        """Remove the cluster's files.

        Raises:
            StateError: The directory holds what no cluster has: a MUSTER_LOCAL_ROOT that points at somebody's data.
        """
        strangers = self.layout.strangers()
        if strangers:
            raise StateError(
                f"{self.layout.directory}: holds {', '.join(strangers[:5])}, which is no cluster's; nothing has been removed. "
                "Choose another --name, or another MUSTER_LOCAL_ROOT"
            )
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

    def _not_found(self) -> NotFoundError:
        names = [layout.name for layout in list_layouts(self.layout.directory.parent)]
        there = f"the clusters here are: {', '.join(names)}" if names else "there are none; muster local up starts one"
        return NotFoundError(f"{self.name}: no cluster of this name under {self.layout.directory.parent}; {there}")


def find_cluster(name: str | None, environment: Mapping[str, str] | None = None) -> LocalCluster:
    """Return the cluster that a command means.

    The one of that name; without a name the one that MUSTER_CLUSTER points to (`muster local env` sets it), or else
    the only one. A cluster that root started is found too.

    Raises:
        NotFoundError: There is none, or none of that name.
        StateError: There are several and none was named.
    """
    variables = os.environ if environment is None else environment
    chosen = variables.get("MUSTER_CLUSTER")
    if name is None and chosen and Layout(Path(chosen).parent).state_file.is_file():
        return LocalCluster(Path(chosen).parent.name, root=Path(chosen).parent.parent)
    clusters = list_clusters(variables)
    if name is not None:
        found = [cluster for cluster in clusters if cluster.name == name]
        if not found:
            LocalCluster(name, root=state_root(variables)).status()  # raises, with the names that there are
        return found[0]
    if not clusters:
        raise NotFoundError(
            f"no cluster on this machine (looked in {state_root(variables)}); muster local up starts one"
        )
    if len(clusters) > 1:
        names = ", ".join(cluster.name for cluster in clusters)
        raise StateError(f"several clusters are here: {names}; say which one with --name")
    return clusters[0]


def list_clusters(environment: Mapping[str, str] | None = None) -> list[LocalCluster]:
    """Return the clusters of this user and those that root started for everybody, this user's first."""
    variables = os.environ if environment is None else environment
    roots = [state_root(variables)]
    if not variables.get("MUSTER_LOCAL_ROOT") and SYSTEM_ROOT not in roots:
        roots.append(SYSTEM_ROOT)
    return [LocalCluster(layout.name, root=root) for root in roots for layout in list_layouts(root)]


def _expected_daemons(spec: ClusterSpec, state: LocalState) -> Iterator[tuple[str, int | None]]:
    yield "munged", None
    if spec.accounting.enabled:
        yield "mariadbd", None
        yield "slurmdbd", state.database_daemon_port
    yield "slurmctld", state.controller_port
