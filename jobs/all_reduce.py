"""A check that all ranks of a job reach each other: all-reduce with a known answer, and its bus bandwidth.

The figure is comparable to nccl-tests' busbw: for each rank 2 (n - 1) / n bytes cross its link for every byte reduced
(https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md), whatever the number of ranks n.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from cluster.errors import JobError, OutsideError
from cluster.yamlfile import YamlDocument, validate


class AllReduceConfig(BaseModel):
    """What to sum, and how often."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    megabytes: float = Field(default=16.0, gt=0, le=65_536)
    """Size of the tensor, in 10^6 bytes."""
    repeats: int = Field(default=10, ge=1, le=100_000)
    """Timed rounds, after one that warms up."""
    seconds: float = Field(default=0.0, ge=0)
    """Go on for at least so long."""


def main(values: Mapping[str, Any]) -> int:
    """Run the check on this rank; rank 0 prints the result.

    Raises:
        JobError: A value is wrong.
        OutsideError: A sum is wrong, or a rank cannot be reached.
    """
    config = validate(AllReduceConfig, YamlDocument(dict(values), {}, "config"), error_type=JobError)

    from jobs.interruption import StopSignals
    from jobs.process_group import close_process_group, open_process_group, read_rank_info

    with StopSignals() as stop:
        info = read_rank_info(os.environ)
        os.environ.update(info.export())
        open_process_group(info, stop=stop)
        seconds = _rounds(config, info.rank, info.world_size)
        close_process_group()
    if info.is_first:
        _report(config, info.world_size, info.nodes, seconds)
    return 0


def bus_bandwidth_gb_per_s(num_bytes: float, seconds: float, world_size: int) -> float:
    """Return nccl-tests' busbw of one all-reduce, in 10^9 bytes a second; 0 for a single rank, which sends nothing."""
    return num_bytes / seconds * 2 * (world_size - 1) / world_size / 1e9


def _rounds(config: AllReduceConfig, rank: int, world_size: int) -> list[float]:
    """Time the rounds; every rank checks every sum."""
    import torch
    import torch.distributed as dist

    device = "cuda" if torch.cuda.is_available() else "cpu"
    count = max(1, round(config.megabytes * 1e6 / 4))
    expected = world_size * (world_size + 1) / 2
    durations_s: list[float] = []
    started_s = time.monotonic()
    enough = torch.zeros(1, device=device)
    while True:
        tensor = torch.full((count,), float(rank + 1), device=device)
        before_s = time.perf_counter()
        if world_size > 1:
            dist.all_reduce(tensor)
        if device == "cuda":
            torch.cuda.synchronize()
        durations_s.append(time.perf_counter() - before_s)
        wrong = int((tensor != expected).sum())
        if wrong:
            raise OutsideError(
                f"rank {rank}: {wrong} of {count} sums are not {expected:g}; this node's links or memory are bad"
            )
        # Rank 0's clock decides for all, or one rank would leave the others waiting in the next round.
        enough.fill_(len(durations_s) > config.repeats and time.monotonic() - started_s >= config.seconds)
        if world_size > 1:
            dist.broadcast(enough, src=0)
        if bool(enough):
            return durations_s[1:]


def _report(config: AllReduceConfig, world_size: int, nodes: tuple[str, ...], durations_s: list[float]) -> None:
    median_s = statistics.median(durations_s)
    speed = bus_bandwidth_gb_per_s(config.megabytes * 1e6, median_s, world_size)
    sys.stdout.write(
        f"all-reduce of {config.megabytes:g} MB over {world_size} ranks on {', '.join(nodes)}: every sum right in "
        f"{len(durations_s)} rounds, median {median_s * 1e3:.1f} ms, bus bandwidth {speed:.2f} GB/s\n"
    )


if __name__ == "__main__":
    sys.exit(main({}))
