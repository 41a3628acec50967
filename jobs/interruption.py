"""Being asked to stop: a signal handler sets a flag, all ranks agree on it at a step boundary, and only then is anything done.

Nothing else is safe in a handler: it runs between two byte codes of the main thread, on one rank now and on another rank a step
later, so a save or a collective begun there meets torn state and ranks that never come (facts/jobs.md, finding 3).
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Any

from cluster.errors import InterruptedRunError, OutsideError, StateError

_Handler = Callable[[int, FrameType | None], Any] | int | None

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
"""Either asks a trainer to save and leave: TERM from Slurm itself, USR2 from `--signal=USR2@N` and submitit."""


_PARENT_CHECK_S = 0.5


class StopSignals:
    """Notes TERM and USR2 while its `with` block runs, and does nothing else with them.

    CONT is caught too, for the record only: Slurm sends it just before TERM, so that a stopped job can hear the TERM, and alone
    when a suspended job goes on. By itself it asks for nothing.

    Enter it as the first thing a trainer does, before the heavy imports and inside the callable that submitit runs: submitit
    has set its own handlers by then, and these replace them. Whatever was there before comes back on leaving.
    """

    def __init__(self, signals: Sequence[signal.Signals] = STOP_SIGNALS) -> None:
        self._signals = tuple(signals)
        self._first: str | None = None
        self._first_time_s: float | None = None
        self._received: dict[str, int] = {}
        self._earlier: dict[int, _Handler] = {}

    @property
    def requested(self) -> str | None:
        """Name of the first signal that asked to stop (`SIGTERM`, `SIGUSR2`), or None."""
        return self._first

    @property
    def requested_ago_s(self) -> float | None:
        """Seconds since the first request, or None."""
        return None if self._first_time_s is None else time.monotonic() - self._first_time_s

    @property
    def received(self) -> dict[str, int]:
        """How often each signal came, CONT included."""
        return dict(self._received)

    def raise_if_requested(self, where: str = "") -> None:
        """End a long phase that takes no steps (start-up, waiting for data) when a stop has been asked for.

        Only for phases in which the ranks need not agree: before the process group is open, or with one rank.

        Raises:
            InterruptedRunError: A stop was asked for.
        """
        if self._first is not None:
            raise InterruptedRunError(
                f"{self._first} received {where}".rstrip() + "; the run goes on in the next attempt"
            )

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            raise StateError("signal handlers can only be set in the main thread; enter StopSignals there")
        for number in (*self._signals, signal.SIGCONT):
            self._earlier[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._earlier.items():
            # None stands for a handler that C code had installed; Python cannot put that back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._earlier.clear()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        self._received[name] = self._received.get(name, 0) + 1
        if self._first is None and number in self._signals:
            self._first_time_s = time.monotonic()
            self._first = name


class Agreement:
    """Makes one rank's wish to stop every rank's, at the same step.

    `agree` costs a step nothing: it starts a reduction of this step's wishes and answers with those of the step before, whose
    reduction had a whole step to finish. So a stop takes effect one step after the first rank asked, and all ranks leave
    together whichever of them was signalled first, even if only one was.

    Every rank must call the same methods in the same order.
    """

    def __init__(self, group: Any = None, *, world_size: int = 1) -> None:
        """Take a gloo group of its own (`open` makes one): a shared one would tie its order to that of other collectives."""
        if world_size > 1 and group is None:
            raise StateError("an agreement among several ranks needs a gloo group; use Agreement.open()")
        self._group = group
        self._world_size = world_size
        self._pending: tuple[Any, Any] | None = None
        self._agreed = False

    @classmethod
    def open(cls, world_size: int, *, timeout_s: float = 1800.0) -> Agreement:
        """Make the agreement's own gloo group; a collective call. With one rank there is none.

        Args:
            world_size: Ranks of the job.
            timeout_s: How long a rank may be behind the others before the job counts as stuck.
        """
        if world_size == 1:
            return cls()
        from datetime import timedelta

        import torch.distributed as dist

        return cls(dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)), world_size=world_size)

    @property
    def agreed(self) -> bool:
        """Whether all ranks have agreed to stop. Once so, it stays so."""
        return self._agreed

    def agree(self, requested: bool) -> bool:
        """Say whether this rank wants to stop; returns whether any rank wanted to one call ago.

        Call it once at each step boundary. With one rank the answer is immediate.

        Raises:
            OutsideError: A rank is gone or stuck.
        """
        if self._agreed:
            return True
        if self._world_size == 1:
            self._agreed = requested
            return requested
        self._agreed = self._take_pending()
        if not self._agreed:
            self._pending = self._reduce(requested)
        return self._agreed

    def agree_now(self, requested: bool) -> bool:
        """As `agree`, but for this very moment: waits for all ranks. For loops of long turns: evaluation, sampling, warm-up.

        Raises:
            OutsideError: A rank is gone or stuck.
        """
        if self._agreed:
            return True
        if self._world_size == 1:
            self._agreed = requested
            return requested
        earlier = self._take_pending()
        self._pending = self._reduce(requested)
        self._agreed = self._take_pending() or earlier
        return self._agreed

    def close(self) -> None:
        """Wait for a reduction still under way, so that leaving does not look like a crash to slower ranks."""
        if self._pending is not None:
            self._agreed = self._take_pending() or self._agreed

    def _reduce(self, requested: bool) -> tuple[Any, Any]:
        import torch
        import torch.distributed as dist

        flag = torch.tensor([int(requested)], dtype=torch.int32)
        try:
            return flag, dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        except RuntimeError as error:
            raise _lost_rank(error) from error

    def _take_pending(self) -> bool:
        if self._pending is None:
            return False
        flag, work = self._pending
        self._pending = None
        try:
            work.wait()
        except RuntimeError as error:
            raise _lost_rank(error) from error
        return bool(flag.item())


def reset_signals_in_worker(worker_id: int = 0) -> None:  # noqa: ARG001 - the DataLoader gives it
    """Make a data worker deaf to Slurm's signals; pass it as `worker_init_fn` of a DataLoader.

    Slurm signals every process of a step, workers included. With the inherited handler a worker would only set a flag nobody
    reads; with the default action it would die, and the trainer with it, just while it saves. TERM from the worker's own parent
    still ends it: that is how torch and multiprocessing put away a worker that does not leave by itself. Telling the two apart
    needs the sender's process id, which only `sigwaitinfo` gives; hence the thread.

    Args:
        worker_id: Given by the DataLoader; not used.
    """
    parent = os.getppid()
    watched = set(STOP_SIGNALS)
    for number in (*STOP_SIGNALS, signal.SIGCONT):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)  # threads started from here on inherit this

    def watch() -> None:
        while os.getppid() == parent:  # an orphan has nothing to do, and would keep the job's node from being freed
            heard = signal.sigtimedwait(watched, _PARENT_CHECK_S)
            if heard is not None and heard.si_signo == signal.SIGTERM and heard.si_pid == parent:
                break
        os._exit(0)  # what torch's own handler does in a worker

    threading.Thread(target=watch, name="worker-signals", daemon=True).start()


def _lost_rank(error: RuntimeError) -> OutsideError:
    return OutsideError(
        "the ranks could not agree whether to stop, so one of them is gone or stuck: "
        f"{str(error).splitlines()[0]}. The first rank that failed says more in its log"
    )
