"""One training, described for both sides: Muster's trainer and the plain loop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import OutsideError
from jobs.records import read_json_lines
from jobs.settings import Model
from tests.benchmarks.pictures import SmallSet

REPOSITORY = Path(__file__).resolve().parents[2]
FORGOTTEN = 10**6
"""A number of steps that no benchmark reaches."""
_POLL_S = 0.002


@dataclass(frozen=True, kw_only=True)
class Case:
    """The same network, batch and objective for both sides."""

    pictures: SmallSet
    model: Model
    batch_size: int
    steps: int
    checkpoint_every: int = FORGOTTEN
    threads: int = 0
    """Threads of a rank; 0 leaves it to each side."""

    def ours(self, run_directory: Path, **changes: Any) -> dict[str, Any]:
        """Return what Muster's trainer is configured with, as JSON can hold it."""
        return {
            "run_directory": str(run_directory),
            "data": {"directory": str(self.pictures.shards)},
            "steps": self.steps,
            "batch_size": self.batch_size,
            "model": self.model.model_dump(mode="json"),
            "objective": {
                "prediction": "epsilon",
                "beta_schedule": "linear",
                "min_snr_gamma": None,
                "timestep_sampling": "uniform",
            },
            "checkpoint": {"every_steps": self.checkpoint_every},
            "threads": self.threads,
            **changes,
        }

    def plain(self, output: Path, **changes: Any) -> dict[str, Any]:
        """Return what the plain loop is run with, as JSON can hold it."""
        model = self.model
        return {
            "pictures": str(self.pictures.folder),
            "output": str(output),
            "steps": self.steps,
            "batch_size": self.batch_size,
            "channels": list(model.channels),
            "layers_per_block": model.layers_per_block,
            "attention": list(model.attention_levels()),
            "attention_head_channels": model.attention_head_channels,
            "norm_groups": model.norm_groups,
            "checkpoint_every": self.checkpoint_every,
            "threads": self.threads,
            **changes,
        }


def our_command(config: Mapping[str, Any], file: Path) -> list[str]:
    """Write the configuration to `file`; returns the command that trains with it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(config), encoding="utf-8")
    return [sys.executable, "-m", "jobs.train", "--config", str(file)]


def plain_command(settings: Mapping[str, Any]) -> list[str]:
    """Return the command that runs the plain loop."""
    return [sys.executable, "-m", "tests.benchmarks.plain_loop", json.dumps(settings)]


@contextmanager
def running(argv: Sequence[str], *, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a trainer as a program of its own for as long as the block lasts; what then still runs of it is killed."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            argv,
            cwd=REPOSITORY,
            env=_outside_slurm(),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL the process with everything it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def wait_for_step(process: subprocess.Popen[bytes], metrics: Path, step: int, *, log: Path, timeout_s: float) -> None:
    """Wait until a line about `step` (the first is 0) stands in the metrics of a running trainer.

    Raises:
        OutsideError: It ended before, or the time is over.
    """
    deadline = time.monotonic() + timeout_s
    while not any(record["step"] >= step for record in read_json_lines(metrics)):
        if process.poll() is not None:
            raise OutsideError(
                f"a trainer ended with exit status {process.returncode} before step {step}: {_end_of(log)}"
            )
        if time.monotonic() > deadline:
            raise OutsideError(f"a trainer did not come to step {step} within {timeout_s:.0f} s: {_end_of(log)}")
        time.sleep(_POLL_S)


def wait_for_end(process: subprocess.Popen[bytes], *, log: Path, timeout_s: float) -> None:
    """Wait until a trainer has ended well.

    Raises:
        OutsideError: It ended with an error, or the time is over.
    """
    try:
        code = process.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        raise OutsideError(f"a trainer was not done within {timeout_s:.0f} s: {_end_of(log)}") from error
    if code:
        raise OutsideError(f"a trainer ended with exit status {code}: {_end_of(log)}")


def _outside_slurm() -> dict[str, str]:
    """Return this environment without what would make a trainer believe that it is a task of a job."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RANK", "WORLD_SIZE"))}


def _end_of(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-1500:].strip()
