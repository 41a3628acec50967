"""What a person sees of a training run: a live bar on a terminal, plain lines now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rich.console import Console

from cluster.output import console as make_console


@dataclass(frozen=True, kw_only=True)
class Tick:
    """Where a run is after a step."""

    step: int
    """Steps done."""
    loss: float
    learning_rate: float
    step_s: float
    """Seconds that the step took."""
    to_checkpoint: int
    """Steps until the next periodic checkpoint."""


class Progress:
    """Shows ticks. Use it as a context; only the first rank should.

    Args:
        total: Steps of the whole run.
        first: Steps that earlier attempts have done.
        batch_size: Samples of a step, over all ranks.
        every_s: Seconds between plain lines.
        console: Where to; standard output by default.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        total: int,
        *,
        first: int,
        batch_size: int,
        every_s: float,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total
        self._first = first
        self._every_s = every_s
        self._console = console if console is not None else make_console()
        self._clock = clock
        self._last_line_s: float | None = None
        self._batch_size = batch_size
        self._step_s: float | None = None
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            from rich import progress

            self._bar = progress.Progress(
                progress.TextColumn("[bold]{task.description}"),
                progress.BarColumn(),
                progress.TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                progress.TextColumn("{task.fields[status]}"),
                progress.TimeElapsedColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("training", total=self._total, completed=self._first, status="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def tick(self, tick: Tick) -> None:
        """Show where the run is."""
        # Smoothed over about ten steps: single ones jump with every save and every neighbour on the machine.
        self._step_s = tick.step_s if self._step_s is None else 0.9 * self._step_s + 0.1 * tick.step_s
        if self._bar is not None:
            self._bar.update(self._task, completed=tick.step, status=self._status(tick))
            return
        now = self._clock()
        edge = tick.step in (self._first + 1, self._total)
        if edge or self._last_line_s is None or now - self._last_line_s >= self._every_s:
            self._last_line_s = now
            self._console.print(f"step {tick.step}/{self._total}  {self._status(tick)}", highlight=False)

    def say(self, text: str) -> None:
        """Print a line of its own, above the bar where there is one."""
        self._console.print(text, highlight=False, markup=False)

    def _status(self, tick: Tick) -> str:
        step_s = self._step_s or tick.step_s
        return (
            f"loss {tick.loss:.4f}  lr {tick.learning_rate:.2e}  {self._batch_size / max(step_s, 1e-9):.1f} samples/s  "
            f"ETA {format_seconds((self._total - tick.step) * step_s)}  checkpoint in {tick.to_checkpoint}"
        )


def format_seconds(seconds: float) -> str:
    """Write a time to wait: `42s`, `3m07s`, `2h05m`, `1d03h`."""
    whole = round(seconds)
    for size, inner, names in ((86400, 3600, "dh"), (3600, 60, "hm"), (60, 1, "ms")):
        if whole >= size:
            return f"{whole // size}{names[0]}{whole % size // inner:02d}{names[1]}"
    return f"{whole}s"
