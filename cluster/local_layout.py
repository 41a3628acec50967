"""Where a cluster on this machine keeps its state: one directory, found by name, locked while it is changed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pwd
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from cluster.errors import InputError, MissingError, StateError
from cluster.settings import ClusterSpec, Name, load_spec

SYSTEM_ROOT = Path("/var/lib/muster/local")
"""Where root's clusters live. Everybody may read there: other users' jobs must reach what root started."""

_SOCKET_PATH_BYTES = 107  # sun_path of unix(7) is 108 bytes with its closing zero
_LONGEST_STEP_SUFFIX = "_67108863.4294967295"  # MaxJobId of slurm.conf(5), and Slurm's highest step number
_SAFE_PATH = re.compile(r"[A-Za-z0-9._/+@-]+")
_LOCK_WAIT_S = 20.0


def state_root(environment: Mapping[str, str] | None = None) -> Path:
    """Return the directory that holds this user's clusters.

    MUSTER_LOCAL_ROOT if set; /var/lib/muster/local for root; $XDG_STATE_HOME/muster/local (~/.local/state/...) for
    anybody else.
    """
    variables = os.environ if environment is None else environment
    if variables.get("MUSTER_LOCAL_ROOT"):
        return Path(variables["MUSTER_LOCAL_ROOT"]).absolute()
    if os.geteuid() == 0:
        return SYSTEM_ROOT
    home = Path(variables.get("HOME") or pwd.getpwuid(os.geteuid()).pw_dir)
    return Path(variables.get("XDG_STATE_HOME") or home / ".local" / "state").absolute() / "muster" / "local"


@dataclass(frozen=True)
class Layout:
    """The files of one cluster, all under `directory`."""

    directory: Path

    @property
    def name(self) -> str:
        """The cluster's name."""
        return self.directory.name

    @property
    def configuration(self) -> Path:
        """Directory of slurm.conf and the files that Slurm looks for beside it."""
        return self.directory / "etc"

    @property
    def slurm_conf(self) -> Path:
        """What SLURM_CONF points to."""
        return self.configuration / "slurm.conf"

    @property
    def description(self) -> Path:
        """The cluster's description as it was when it came up; what MUSTER_CLUSTER points to."""
        return self.directory / "cluster.yaml"

    @property
    def logs(self) -> Path:
        """Directory of all logs."""
        return self.directory / "logs"

    @property
    def run(self) -> Path:
        """Directory of pid files."""
        return self.directory / "run"

    @property
    def controller_state(self) -> Path:
        """Slurmctld's StateSaveLocation."""
        return self.directory / "slurmctld"

    @property
    def spool(self) -> Path:
        """Directory of each node's SlurmdSpoolDir."""
        return self.directory / "spool"

    @property
    def nodes(self) -> Path:
        """Directory of what only one node sees."""
        return self.directory / "nodes"

    @property
    def node_script(self) -> Path:
        """What runs as PID 1 of each node."""
        return self.directory / "node.sh"

    @property
    def munge_key(self) -> Path:
        """This cluster's own key."""
        return self.directory / "secrets" / "munge.key"

    @property
    def munge_socket(self) -> Path:
        """This cluster's own munged."""
        return self.directory / "munge" / "munge.socket"

    @property
    def database(self) -> Path:
        """Directory of MariaDB: data and socket. Being its only way in, it is closed to everybody else."""
        return self.directory / "database"

    @property
    def database_socket(self) -> Path:
        """The only way to reach MariaDB."""
        return self.database / "mariadb.sock"

    @property
    def hosts(self) -> Path:
        """/etc/hosts as the nodes see it."""
        return self.directory / "hosts"

    @property
    def gpu_device(self) -> Path:
        """Path of a simulated GPU's device file, without its number."""
        return self.directory / "dev" / "nvidia"

    @property
    def state_file(self) -> Path:
        """See `LocalState`."""
        return self.directory / "state.json"

    def strangers(self) -> list[str]:
        """Return entries that no cluster makes. Where there are some, the directory is not ours to empty."""
        ours = {
            *(
                path.name
                for path in (self.configuration, self.logs, self.run, self.controller_state, self.spool, self.nodes)
            ),
            *(path.name for path in (self.node_script, self.description, self.hosts, self.state_file, self.database)),
            *(path.parent.name for path in (self.munge_key, self.munge_socket, self.gpu_device)),
        }
        return sorted(
            entry.name
            for entry in self.directory.iterdir()
            if entry.name.removeprefix(".").removesuffix(".new") not in ours
        )

    def check(self, spec: ClusterSpec) -> None:
        """Check that Slurm can work with these paths.

        Raises:
            InputError: A path holds a character that slurm.conf cannot carry, or a socket's path would be too long.
        """
        if not _SAFE_PATH.fullmatch(str(self.directory)):
            raise InputError(
                f"{self.directory}: slurm.conf only carries paths of letters, digits and . _ / + @ -; "
                "set MUSTER_LOCAL_ROOT to another directory"
            )
        longest_node = max((name for name, _ in spec.nodes()), key=len)
        longest = self.spool / longest_node / f"{longest_node}{_LONGEST_STEP_SUFFIX}"
        for path in (longest, self.munge_socket, self.database_socket):
            if len(os.fsencode(path)) > _SOCKET_PATH_BYTES:
                raise InputError(
                    f"{path}: {len(os.fsencode(path))} bytes, but the path of a socket may have {_SOCKET_PATH_BYTES}; "
                    "choose shorter names for the cluster and its pools, "
                    "or set MUSTER_LOCAL_ROOT to a shorter directory such as /tmp/m"
                )


@dataclass(frozen=True, kw_only=True)
class LocalState:
    """What one command leaves for the next. What runs is never read here but in the process table."""

    name: str
    phase: Literal["starting", "up"]
    owner: str
    started_at: float
    """Seconds since the epoch."""
    controller_port: int
    database_daemon_port: int
    first_node_port: int
    num_nodes: int

    def ports(self) -> range:
        """Return every port of this cluster."""
        return range(self.controller_port, self.first_node_port + self.num_nodes)

    def write(self, path: Path) -> None:
        """Replace the file at `path` as a whole."""
        write_file(path, json.dumps(asdict(self), indent=2) + "\n")


def read_state(layout: Layout) -> LocalState | None:
    """Return what is recorded, or None if nothing usable is: an interrupted `up` may leave half of it."""
    try:
        return LocalState(**json.loads(layout.state_file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def read_description(layout: Layout) -> ClusterSpec | None:
    """Return the description that the cluster was started from, or None if there is none to read."""
    try:
        return load_spec(layout.description)
    except InputError:
        return None


def list_layouts(root: Path) -> list[Layout]:
    """Return every cluster that has a directory under `root`, up or not, by name."""
    try:
        layouts = [Layout(entry) for entry in sorted(root.iterdir()) if entry.is_dir() and _is_name(entry.name)]
        return [layout for layout in layouts if not layout.strangers()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except PermissionError as error:
        raise MissingError(f"{root}: may not be read; set MUSTER_LOCAL_ROOT to a directory of your own") from error


def ports_of_others(layout: Layout) -> set[int]:
    """Return the ports of the other clusters under the same root, whose daemons may be down for the moment."""
    states = (read_state(other) for other in list_layouts(layout.directory.parent) if other != layout)
    return {port for state in states if state is not None for port in state.ports()}


def write_file(path: Path, text: str, *, mode: int = 0o644) -> None:
    """Write `path` whole: beside it first, then renamed; never for a moment more open than `mode`."""
    beside = path.with_name(f".{path.name}.new")
    beside.unlink(missing_ok=True)
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        os.fchmod(file.fileno(), mode)
    beside.rename(path)


def make_directory(directory: Path, mode: int) -> None:
    """Make a directory that has `mode` whatever the umask is."""
    directory.mkdir()
    directory.chmod(mode)


@contextlib.contextmanager
def locked(directory: Path, *, wait_s: float = _LOCK_WAIT_S) -> Iterator[None]:
    """Hold `directory`, making it first, so that no two commands change one cluster at a time.

    The directory itself carries the lock, so nothing is left behind, and a killed holder's lock goes with it.

    Raises:
        StateError: Somebody else still held it after `wait_s`.
        MissingError: It may not be created.
    """
    deadline = time.monotonic() + wait_s
    while True:
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o755)
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue  # removed by a `down` between the two calls
        except PermissionError as error:
            raise MissingError(
                f"{directory}: may not be created here ({error.strerror}); set MUSTER_LOCAL_ROOT to a directory of your own"
            ) from error
        except (FileExistsError, NotADirectoryError) as error:
            raise StateError(
                f"{directory}: is in the way and no directory; move it away, or set MUSTER_LOCAL_ROOT"
            ) from error
        try:
            if not _lock_until(descriptor, deadline):
                raise StateError(
                    f"{directory.name}: another muster command has been at work on this cluster for {wait_s:g} s; "
                    "wait for it to end"
                )
            if _is_still(directory, descriptor):
                yield
                return
        finally:
            os.close(descriptor)


def _is_name(text: str) -> bool:
    try:
        TypeAdapter(Name).validate_python(text)
    except ValidationError:
        return False
    return True


def _lock_until(descriptor: int, deadline: float) -> bool:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        else:
            return True


def _is_still(directory: Path, descriptor: int) -> bool:
    try:
        there, ours = directory.stat(), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)
