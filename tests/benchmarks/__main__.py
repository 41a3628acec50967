"""`python -m tests.benchmarks`: measure what docs/performance.md reports, each thing next to what it is compared with."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import InputError, MusterError
from cluster.output import error_console, print_table
from tests.benchmarks.results import Result, as_plain, machine, markdown, row

FAILED = 1


@dataclass(frozen=True)
class Entry:
    """One benchmark: a module beside this one, with a function `measure()` that returns results."""

    name: str
    about_s: int
    """Seconds it takes on two cores."""
    measures: str


ENTRIES = (
    Entry("cluster_up", 60, "a cluster on this machine, up and down: 64 nodes against 4"),
    Entry("high_wait", 150, "high job submitted -> running, while low trains: Muster against scripts that do nothing"),
    Entry("requeue_to_first_step", 230, "preempted -> first step of the next attempt: Muster against Slurm's own hold"),
    Entry("step_cpu", 110, "CPU time of a training step: Muster against a plain diffusers loop"),
    Entry("start_to_first_step", 110, "process start -> end of the first step: Muster against a plain diffusers loop"),
    Entry("resume_exactness", 50, "samples repeated and missed after a SIGKILL: Muster against accelerate's resume"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks that were asked for, print the table; returns the exit code."""
    options = _parse(argv)
    if options.list:
        print_table(
            ("benchmark", "takes", "what"), [(entry.name, f"{entry.about_s} s", entry.measures) for entry in ENTRIES]
        )
        return 0
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    chosen = [entry for entry in ENTRIES if not options.names or entry.name in options.names]
    conditions = machine()
    results: list[Result] = []
    failed: list[str] = []
    for entry in chosen:
        found = _run(entry)
        results += found or []
        failed += [] if found is not None else [entry.name]
    print_table(("measured", "ours", "other", "ratio", "the other is", "note"), [row(result) for result in results])
    if options.json is not None:
        report = {"machine": conditions, "results": as_plain(results), "failed": failed}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.markdown is not None:
        options.markdown.write_text(markdown(conditions, results), encoding="utf-8")
    if failed:
        error_console().print(f"[red]failed: {', '.join(failed)}[/]")
    return FAILED if failed else 0


def _run(entry: Entry) -> list[Result] | None:
    """Run one benchmark; None if it failed, which must not keep the others from running."""
    console = error_console()
    console.print(f"{entry.name}: about {entry.about_s} s", style="dim")
    started = time.monotonic()
    try:
        module: Any = importlib.import_module(f"tests.benchmarks.{entry.name}")
        results: list[Result] = module.measure()
    except MusterError as error:
        console.print(f"{entry.name}: {error}", style="red", markup=False)
        return None
    except Exception:  # a fault in one benchmark: say all of it, and go on with the next
        console.print(traceback.format_exc(), style="red", markup=False)
        return None
    console.print(f"{entry.name}: done in {time.monotonic() - started:.0f} s", style="dim")
    return results


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run; all of them by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table for docs/performance.md there")
    parser.add_argument("--list", action="store_true", help="list the benchmarks, and how long each takes")
    options = parser.parse_args(argv)
    known = [entry.name for entry in ENTRIES]
    unknown = [name for name in options.names if name not in known]
    if unknown:
        parser.error(f"{unknown[0]}: no such benchmark; there are: {', '.join(known)}")
    for file in filter(None, (options.json, options.markdown)):  # before ten minutes are spent
        if not file.absolute().parent.is_dir():
            raise InputError(f"{file}: the directory does not exist; make it, or name another file")
    return options


def _leave(number: int, _frame: object) -> None:
    """Unwind on SIGTERM too, so that no cluster and no trainer is left running."""
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _leave)
    try:
        sys.exit(main())
    except MusterError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
