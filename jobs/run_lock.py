"""One job at a time in a run directory: a lock that survives crashes, on file systems that several machines share.

The lock is a file that names its owner. A file cannot die with its owner, so it is believed only as long as the owner lives,
which is found out from, in this order: Slurm (is that job over? is it an earlier attempt of this very job?), the process table
(same machine), and the heartbeat that the owner renews, its age measured by the file server's own clock.

Limits. Taking over a dead owner's lock is guarded by flock; where a file system has none (Lustre mounted without `-o flock`),
two jobs that find the same dead owner within the same second are told apart by reading back who won, which leaves a window of
about a second. An owner that lives but cannot write for two minutes, and of which Slurm knows nothing, is taken for dead; it
notices at its next heartbeat and stops itself.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cluster.errors import StateError
from jobs.process_group import RankInfo

logger = logging.getLogger(__name__)

_SILENT_S = 120.0  # no sign of life for so long means dead, where nothing better is known
_GUARD_TIMEOUT_S = 20.0
_SETTLE_S = 1.0
_NO_LOCKS_HERE = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Who holds a lock."""

    token: str
    """Random; tells this owner from every other, also from itself in another attempt."""
    label: str = ""
    """Its attempt, as `RankInfo.attempt_label`."""
    job_id: str | None = None
    """As Slurm's commands take it: `12`, `12_3`."""
    restart_count: int = 0
    cluster: str | None = None
    host: str = ""
    machine: str = ""
    """Boot and process namespace: process numbers mean something only within it."""
    pid: int = 0
    pid_started: str = ""
    """Start time from /proc: a process number may be given out again."""


class RunLock:
    """The lock of one run directory; see the module's docstring."""

    def __init__(self, directory: Path, *, clock: Callable[[], float] = time.time, heartbeat_s: float = 10.0) -> None:
        self._directory = directory
        self._clock = clock
        self._heartbeat_s = heartbeat_s
        self._owner: Owner | None = None
        self._lost_to: Owner | None = None
        self._step: int | None = None
        self._earlier_sign: dict[str, Any] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def _path(self) -> Path:
        return self._directory / "lock.json"

    @property
    def earlier_sign(self) -> dict[str, Any]:
        """The last sign of life before this owner's: `attempt`, `step`, `time_s`; empty where there was none."""
        return self._earlier_sign

    @property
    def step(self) -> int | None:
        """The last step given to `note_step` since the lock was taken."""
        return self._step

    @property
    def is_held(self) -> bool:
        """Whether this process has taken the lock and not given it back; it may have been taken over (see `note_step`)."""
        return self._owner is not None

    def take(self, info: RankInfo, *, is_job_alive: Callable[[str], bool | None] | None = None) -> None:
        """Become the owner, and give signs of life from a thread from then on.

        Raises:
            StateError: Somebody else is, and lives or may live; the message says who and what to do.
        """
        owner = _myself(info)
        with self._guarded() as is_guarded:
            present = self._read()
            if present is not None:
                self._refuse_if_alive(present, owner, is_job_alive)
                logger.info("taking the lock of %s over from job %s", self._directory, present.label)
            self._write("lock.json", asdict(owner))
            if not is_guarded:
                time.sleep(_SETTLE_S)
                winner = self._read()
                if winner is None or winner.token != owner.token:
                    raise StateError(f"{self._directory}: another job took this run at the same moment; {_ADVICE}")
        self._earlier_sign = self._read_sign()
        self._owner, self._lost_to, self._step = owner, None, None
        self._beat()
        self._stop.clear()
        self._thread = threading.Thread(target=self._keep_beating, name="run-heartbeat", daemon=True)
        self._thread.start()

    def note_step(self, step: int) -> None:
        """Remember the step for the next heartbeat.

        Raises:
            StateError: The lock has been taken over.
        """
        self._step = step
        if self._lost_to is not None:
            raise StateError(
                f"{self._directory}: job {self._lost_to.label} on {self._lost_to.host} has taken this run over while this "
                "attempt was cut off; it stops here so that only one writes"
            )

    def release(self) -> None:
        """Stop the heartbeat and remove the lock, unless it has been taken over."""
        if self._owner is None:
            return
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5.0)
        self._beat()
        present = self._read()
        if present is not None and present.token == self._owner.token:
            with contextlib.suppress(OSError):
                self._path.unlink()
        self._owner = None

    def _refuse_if_alive(self, present: Owner, me: Owner, is_job_alive: Callable[[str], bool | None] | None) -> None:
        if present.job_id is not None and present.job_id == me.job_id and present.cluster == me.cluster:
            if me.restart_count > present.restart_count:
                return  # an earlier attempt of this job: Slurm has ended it, or cut its node off; see note_step
        elif present.job_id is not None and present.cluster == me.cluster and is_job_alive is not None:
            alive = is_job_alive(present.job_id)
            if alive is False:
                return
            if alive:
                raise StateError(
                    f"{self._directory}: job {present.job_id} on {present.host} works on this run; {_ADVICE} "
                    f"(`muster jobs cancel {present.job_id}` ends it)"
                )
        if present.machine == me.machine:
            if _started(present.pid) != present.pid_started:
                return
            raise StateError(f"{self._directory}: process {present.pid} on this machine works on this run; {_ADVICE}")
        silent_s = self._silence_s()
        if silent_s > _SILENT_S:
            return
        who = f"job {present.job_id}" if present.job_id else f"process {present.pid}"
        raise StateError(
            f"{self._directory}: {who} on {present.host} gave a sign of life here {silent_s:.0f} s ago; {_ADVICE}. If it is "
            f"dead, wait until it has been silent for {_SILENT_S:.0f} s, or remove {self._path}"
        )

    def _silence_s(self) -> float:
        """Return the age of the last sign of life by the file server's clock: machines' own clocks may differ by minutes."""
        probe = self._directory / f".clock.{os.getpid()}"
        try:
            probe.write_text("", encoding="utf-8")
            now_s = probe.stat().st_mtime
            probe.unlink()
            signs = [path.stat().st_mtime for path in (self._path, self._directory / "heartbeat.json") if path.exists()]
        except OSError as error:
            raise StateError(f"{self._directory}: cannot tell whether its owner lives: {error.strerror}") from error
        return now_s - max(signs, default=0.0)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[bool]:
        """Keep others from deciding about the lock at the same time; yields False where the file system has no flock."""
        descriptor = os.open(self._directory / ".lock.guard", os.O_CREAT | os.O_RDWR, 0o644)
        deadline = time.monotonic() + _GUARD_TIMEOUT_S
        is_guarded = True
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if time.monotonic() > deadline:
                        raise StateError(
                            f"{self._directory}: another job is starting on this run; {_ADVICE}"
                        ) from error
                    time.sleep(0.1)
                except OSError as error:
                    if error.errno not in _NO_LOCKS_HERE:
                        raise
                    is_guarded = False
                    break
            yield is_guarded
        finally:
            os.close(descriptor)

    def _keep_beating(self) -> None:
        failed = False
        while not self._stop.wait(self._heartbeat_s):
            try:
                self._beat()
                failed = False
            except (
                OSError
            ) as error:  # a full or absent file system must not kill the thread; training will hit it itself
                if not failed:
                    logger.warning("cannot write the sign of life in %s: %s", self._directory, error)
                failed = True

    def _beat(self) -> None:
        owner = self._owner
        assert owner is not None
        present = self._read()
        if present is not None and present.token != owner.token:
            self._lost_to = present
            self._stop.set()
            return
        with contextlib.suppress(OSError) if self._stop.is_set() else contextlib.nullcontext():
            beat = {"token": owner.token, "attempt": owner.label, "step": self._step, "time_s": self._clock()}
            self._write("heartbeat.json", beat)

    def _read(self) -> Owner | None:
        try:
            value = json.loads(self._path.read_text(encoding="utf-8"))
            known = {field.name for field in fields(Owner)}
            return Owner(**{key: item for key, item in value.items() if key in known})
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, AttributeError):
            # Written by one rename, so never torn by us: a damaged file system, or somebody's editor. The heartbeat decides.
            return Owner(token="unreadable", host="an unknown machine")  # noqa: S106 - no password

    def _read_sign(self) -> dict[str, Any]:
        try:
            value = json.loads((self._directory / "heartbeat.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return value if isinstance(value, dict) else {}

    def _write(self, name: str, value: dict[str, Any]) -> None:
        beside = self._directory / f".{name}.{secrets.token_hex(4)}"
        try:
            beside.write_text(json.dumps(value) + "\n", encoding="utf-8")
            beside.replace(self._directory / name)
        except OSError:
            beside.unlink(missing_ok=True)
            raise


_ADVICE = "only one job may at a time: wait for it, end it, or choose another run directory"


def _myself(info: RankInfo) -> Owner:
    return Owner(
        token=secrets.token_hex(16),
        label=info.attempt_label,
        job_id=info.slurm_id,
        restart_count=info.restart_count,
        cluster=info.cluster,
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        pid_started=_started(os.getpid()) or "",
    )


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"


def _started(pid: int) -> str | None:
    """Return when a process started, in the kernel's ticks; None where there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]  # field 22; the name before it may hold spaces and parentheses
