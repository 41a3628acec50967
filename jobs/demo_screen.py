"""What the demo shows: one line an event, with the time since the start, and below it on a terminal what is going on now."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from jobs.demo_report import Bar, draw_bar

_PLAIN_EVERY_S = 10.0


class Screen:
    """Prints events, and keeps them for the report.

    Args:
        console: Where to print.
        clock: Seconds; `time.monotonic` unless a test gives another.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._started = clock()
        self._live: Live | None = None
        self._last_plain = float("-inf")
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Screen:
        if self._console.is_terminal:
            self._live = Live(console=self._console, transient=True, refresh_per_second=8)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the demo began."""
        return self._clock() - self._started

    def event(self, name: str, detail: str = "", *, style: str = "") -> None:
        """Note that something happened, now."""
        self.events.append({"t_s": round(self.elapsed_s, 2), "event": name, "detail": detail})
        self._last_plain = self._clock()
        line = f"[dim]{self.elapsed_s:6.1f} s[/]  [{style or 'bold'}]{escape(name):<22}[/] {escape(detail)}"
        self._console.print(line, highlight=False)

    def now(self, what: str, *, done: int = 0, total: int = 0) -> None:
        """Show what is going on: a bar on a terminal, a line every ten seconds elsewhere."""
        if self._live is not None:
            row = Table.grid(padding=(0, 1))
            cells: list[Any] = [Text(f"{self.elapsed_s:6.1f} s ", style="dim"), Text(what)]
            if total:
                cells.insert(1, ProgressBar(total=total, completed=done, width=30))
            row.add_row(*cells)
            self._live.update(row)
        elif self._clock() - self._last_plain >= _PLAIN_EVERY_S:
            self._last_plain = self._clock()
            self._console.print(f"{self.elapsed_s:6.1f} s  {what}", highlight=False, markup=False)

    def timeline(self, bars: Sequence[Bar]) -> None:
        """Draw when each job waited (dots) and ran (blocks)."""
        total_s = max((end for bar in bars for _, end in bar.runs), default=0.0)
        if total_s <= 0:
            return
        width = max(20, min(60, self._console.width - 40))
        table = Table.grid(padding=(0, 2))
        for bar in bars:
            table.add_row(Text(bar.label), Text(draw_bar(bar, width=width, total_s=total_s), style="cyan"))
        table.add_row("", Text(f"0 s{f'{total_s:.0f} s':>{width - 3}}", style="dim"))
        self._console.print(table)

    def table(self, rows: list[tuple[str, str]]) -> None:
        """Print a two-column summary."""
        table = Table.grid(padding=(0, 2))
        for label, value in rows:
            table.add_row(Text(label, style="bold"), value)
        self._console.print(table)
