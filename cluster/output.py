"""What Muster prints: consoles that obey pipes and NO_COLOR, tables for people, JSON for scripts."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from rich.console import Console
from rich.table import Table

_PIPE_WIDTH = 160  # columns when nobody watches: wide enough that no table cell is cut or folded in a log


def console() -> Console:
    """Return a console on standard output: colours only on a terminal, and never when NO_COLOR is set."""
    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, soft_wrap=not sys.stdout.isatty())


def error_console() -> Console:
    """Return a console on standard error, where messages, progress and warnings go."""
    return Console(stderr=True, width=None if sys.stderr.isatty() else _PIPE_WIDTH)


def print_json(value: object) -> None:
    """Print `value` as indented JSON on standard output: times in ISO 8601, lengths of time in seconds, paths as text."""
    sys.stdout.write(json.dumps(value, indent=2, default=_jsonable) + "\n")


def _jsonable(value: object) -> object:
    if isinstance(value, timedelta):
        return None if value == timedelta.max else value.total_seconds()
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, Mapping):
        return dict(value)
    return str(value)


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    title: str | None = None,
    styles: Mapping[str, str] | None = None,
) -> None:
    """Print rows under bold headings, without a frame, so that the lines can be grepped and cut."""
    table = Table(*columns, title=title, box=None, pad_edge=False, title_justify="left", header_style="bold")
    for column in table.columns:
        column.overflow = "fold"
        column.style = (styles or {}).get(str(column.header), "")
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    console().print(table)


def set_up_logging(verbose: int) -> None:
    """Send log records to standard error: warnings by default, what is being done with -v, every command with -vv."""
    from rich.logging import RichHandler

    level = {0: logging.WARNING, 1: logging.INFO}.get(verbose, logging.DEBUG)
    handler: logging.Handler
    if sys.stderr.isatty():
        handler = RichHandler(console=error_console(), show_path=False, show_time=verbose > 0, rich_tracebacks=False)
        handler.setFormatter(logging.Formatter("%(message)s", "%H:%M:%S"))
    else:  # a log: one line a record, neither folded nor padded
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    if level == logging.DEBUG:
        for chatty in ("asyncio", "matplotlib", "PIL", "urllib3", "botocore"):
            logging.getLogger(chatty).setLevel(logging.INFO)


def as_plain(value: Any) -> Any:
    """Turn a pydantic model or a dataclass, or lists of them, into what `print_json` prints."""
    import dataclasses

    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in value]
    return value
