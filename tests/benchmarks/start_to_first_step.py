"""Process start -> end of the first step: Muster's trainer against the plain loop, each as a program of its own, in turns.

This is what every preemption, time limit and crash costs again on each rank. Wall time is what one waits for; CPU time is what
does not depend on neighbours.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from jobs.records import read_json_lines
from jobs.settings import Model
from tests.benchmarks.comparison import Case, our_command, plain_command, running, wait_for_step
from tests.benchmarks.pictures import make_pictures
from tests.benchmarks.results import Result, compare
from tests.benchmarks.scratch import scratch
from tests.benchmarks.step_cpu import MILLION

TIMEOUT_S = 180.0


def measure(*, rounds: int = 5, model: Model = MILLION, batch_size: int = 32, pictures: int = 256) -> list[Result]:
    """Start each side `rounds` times, and once more before, so that files are in the page cache for both."""
    walls: dict[str, list[float]] = {"ours": [], "plain": []}
    cpus: dict[str, list[float]] = {"ours": [], "plain": []}
    with scratch() as directory:
        small = make_pictures(directory, count=pictures)
        case = Case(pictures=small, model=model, batch_size=batch_size, steps=1)
        for number in range(rounds + 1):
            turns = {
                "ours": our_command(case.ours(directory / f"ours-{number}"), directory / "train.yaml"),
                "plain": plain_command(case.plain(directory / f"plain-{number}", record=True)),
            }
            for side in list(turns) if number % 2 else reversed(turns):
                wall_s, cpu_s = _start(turns[side], directory / f"{side}-{number}", log=directory / "log")
                if number:
                    walls[side].append(wall_s)
                    cpus[side].append(cpu_s)
    plain = "the plain diffusers loop"
    return [
        compare("start_to_first_step", walls["ours"], walls["plain"], other_is=plain, unit="s"),
        compare("start_to_first_step: CPU time", cpus["ours"], cpus["plain"], other_is=plain, unit="CPU-s"),
    ]


def _start(argv: Sequence[str], output: Path, *, log: Path) -> tuple[float, float]:
    """Run a trainer up to the end of its first step; returns the wall and the CPU time it took."""
    metrics = output / "metrics.jsonl"
    started = time.time()
    with running(argv, log=log) as process:
        wait_for_step(process, metrics, 0, log=log, timeout_s=TIMEOUT_S)
        cpu_s = 0.0
        with contextlib.suppress(psutil.NoSuchProcess):  # it has a file to write yet, so it is there
            times = psutil.Process(process.pid).cpu_times()
            cpu_s = times.user + times.system + times.children_user + times.children_system
    first = next(record for record in read_json_lines(metrics))
    return float(first["time"]) - started, cpu_s
