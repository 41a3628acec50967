"""The way up of a cluster on this machine: files, daemons, accounts and nodes, in the order of their needs."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pwd
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cluster.errors import OutsideError
from cluster.local_daemons import Daemons, slurm_version, tail_of_log
from cluster.local_layout import Layout, LocalState, locked, make_directory, ports_of_others, write_file
from cluster.local_node import Nodes
from cluster.local_ports import LOOPBACK, held_ports
from cluster.local_processes import ProcessTable, wait_until
from cluster.render import AccountingCall, AccountingPlan, SlurmSite, accounting_plan, render_slurm
from cluster.settings import ClusterSpec
from cluster.shell import Shell, find_program
from cluster.slurm import SlurmCliClient
from cluster.yamlfile import dump_yaml

_COMMAND_S = 60.0
_REGISTER_S = 120.0
_AT_ONCE = 8
_PROGRAMS = ("munged", "slurmctld", "slurmd", "unshare", "nsenter", "setsid", "setpriv", "hostname", "mount", "sinfo")
_ACCOUNTING_PROGRAMS = ("mariadbd", "slurmdbd", "sacctmgr")
_BASE_STATES = ("IDLE", "ALLOCATED", "MIXED", "DOWN", "UNKNOWN", "ERROR", "FUTURE")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One finished step of the way up."""

    name: str
    seconds: float
    done: int = 1
    total: int = 1
    """Several for steps that are done once a node."""


Progress = Callable[[Step], None]


class Start:
    """Starts one cluster in an empty directory. It cleans nothing up when it fails: its caller does."""

    def __init__(
        self, layout: Layout, spec: ClusterSpec, shell: Shell, processes: ProcessTable, report: Progress
    ) -> None:
        self._layout = layout
        self._spec = spec
        self._shell = shell
        self._report = report
        self._nodes = Nodes(layout, spec, shell, processes)
        self._daemons = Daemons(layout, shell, processes)
        self._environment = {"SLURM_CONF": str(layout.slurm_conf)}

    def check(self) -> None:
        """Look, before anything is made, whether this machine has what it takes.

        Raises:
            MissingError: A program or a permission is absent.
        """
        for program in (*_PROGRAMS, *(_ACCOUNTING_PROGRAMS if self._spec.accounting.enabled else ())):
            find_program(program)
        self._nodes.check_namespaces()

    def run(self) -> None:
        """Start everything and wait until all nodes are idle."""
        version = slurm_version(self._shell)
        num_nodes = sum(pool.nodes for pool in self._spec.pools)
        with contextlib.ExitStack() as ports:
            # One search at a time under this root, so that two clusters on their way up see each other's choice.
            with locked(self._layout.directory.parent):
                first = ports.enter_context(held_ports(2 + num_nodes, avoid=ports_of_others(self._layout)))
                state = LocalState(
                    name=self._layout.name,
                    phase="starting",
                    owner=pwd.getpwuid(os.geteuid()).pw_name,
                    started_at=time.time(),
                    controller_port=first,
                    database_daemon_port=first + 1,
                    first_node_port=first + 2,
                    num_nodes=num_nodes,
                )
                state.write(self._layout.state_file)
            with self._timed("files"):
                self._write_files(version, state)
            with self._timed("munged"):
                self._daemons.start_munged()
            with _workers() as workers:
                self._start_daemons(state, workers)
        with self._timed("nodes idle"):
            self._wait_for_nodes(num_nodes)
        dataclasses.replace(state, phase="up").write(self._layout.state_file)

    def _write_files(self, version: tuple[int, int], state: LocalState) -> None:
        layout = self._layout
        layout.directory.chmod(0o755)  # other users' jobs pass through it, whatever our umask is
        for directory in (layout.configuration, layout.logs, layout.run, layout.munge_socket.parent):
            make_directory(directory, 0o755)
        for directory in (layout.munge_key.parent, layout.controller_state, layout.database, layout.database / "data"):
            make_directory(directory, 0o700)
        write_file(layout.description, dump_yaml(self._spec.model_dump(mode="json", exclude_defaults=True)))
        for name, text in render_slurm(self._spec, local_site(layout, state, version)).items():
            write_file(layout.configuration / name, text, mode=0o600 if name == "slurmdbd.conf" else 0o644)
        self._nodes.prepare()

    def _start_daemons(self, state: LocalState, workers: ThreadPoolExecutor) -> None:
        plan = accounting_plan(self._spec, [state.owner, *filter(None, [os.environ.get("SUDO_USER")])])
        if self._spec.accounting.enabled:
            with self._timed("mariadbd"):
                self._daemons.start_mariadbd()
            with self._timed("slurmdbd"):
                self._daemons.start_slurmdbd(state)
            with self._timed("queues"):
                # At once: a call takes half a second, nearly all of it waiting for delayed TCP acknowledgements.
                list(workers.map(self._account, plan.before_controller))
        with self._timed("slurmctld"):
            self._daemons.start_slurmctld(state)
        projects = workers.submit(self._add_projects, plan)
        started = time.monotonic()
        names = [name for name, _ in self._spec.nodes()]
        for done, _ in enumerate(workers.map(self._nodes.power_on, names), start=1):
            self._report(Step(name="slurmd", seconds=time.monotonic() - started, done=done, total=len(names)))
        projects.result()

    def _add_projects(self, plan: AccountingPlan) -> None:
        if plan.after_controller:
            with self._timed("projects"):
                for call in plan.after_controller:
                    self._account(call)

    def _account(self, call: AccountingCall) -> None:
        # The database is new: everything is added, with all its values, and `call.if_present` has nothing to change.
        argv = [find_program("sacctmgr"), "-i", *call.arguments]
        result = self._shell.run(argv, timeout_s=_COMMAND_S, env=self._environment, check=False)
        if result.returncode != 0:
            printed = (result.stderr + result.stdout).strip()
            raise OutsideError(f"sacctmgr {' '.join(call.arguments)}: {printed}{tail_of_log(self._layout, 'slurmdbd')}")

    def _wait_for_nodes(self, num_nodes: int) -> None:
        states: dict[str, str] = {}

        def all_idle() -> bool:
            states.update(node_states(self._shell, self._environment))
            return len(states) == num_nodes and set(states.values()) == {"idle"}

        if not wait_until(all_idle, deadline_s=_REGISTER_S, interval_s=0.1):
            late = [f"{node} is {state}" for node, state in states.items() if state != "idle"]
            raise OutsideError(
                f"not every node was idle after {_REGISTER_S:g} s: {', '.join(late[:8]) or 'slurmctld does not answer'}"
                f"{tail_of_log(self._layout, 'slurmctld')}"
            )

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._report(Step(name=name, seconds=time.monotonic() - started))


def local_site(layout: Layout, state: LocalState, version: tuple[int, int]) -> SlurmSite:
    """Return where a cluster on this machine has its Slurm: on loopback, in its own directories, with no real GPU."""
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
        state_directory=layout.controller_state,
        spool_directory=f"{layout.spool}/%n",
        log_directory=layout.logs,
        run_directory=layout.run,
        munge_socket=layout.munge_socket,
        gpu_device=str(layout.gpu_device),
        loopback_only=True,
        several_slurmd_per_machine=True,
        simulated_hardware=True,
        # Each node is spoken to directly: a powered-off one would otherwise hold up those behind it.
        tree_width=65_533,
        process_tracking="proctrack/linuxproc",
        task_plugin="task/none",
        job_accounting="jobacct_gather/linux",
        parameters={
            "MailProg": "/bin/true",  # no job of a simulated cluster writes mail
            "MessageTimeout": "30",  # a loaded machine of two cores answers late
        },
    )


def node_states(shell: Shell, environment: dict[str, str]) -> dict[str, str]:
    """Return each node's state in Slurm's words, such as `idle` or `down+not_responding`; empty if nobody answers."""
    try:
        nodes = SlurmCliClient(shell, environment=environment, timeout_s=_COMMAND_S).nodes()
    except OutsideError:
        return {}
    return {node.name: "+".join(sorted(node.states, key=_base_state_first)).lower() for node in nodes}


def _base_state_first(state: str) -> tuple[bool, str]:
    return state not in _BASE_STATES, state


@contextlib.contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """Give threads that, when something goes wrong, finish what they have begun and begin nothing more."""
    with ThreadPoolExecutor(max_workers=_AT_ONCE) as workers:
        try:
            yield workers
        except BaseException:
            workers.shutdown(cancel_futures=True)
            raise
