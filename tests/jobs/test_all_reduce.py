"""The all-reduce check: the right figure, the right answer, and a message where the answer is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cluster.errors import JobError
from jobs.all_reduce import bus_bandwidth_gb_per_s, main

ROOT = Path(__file__).parents[2]


def test_bus_bandwidth_is_that_of_nccl_tests() -> None:
    """1 GB in 0.1 s over 8 ranks is 17.5 GB/s (2 * 7 / 8 of 10 GB/s); one rank sends nothing."""
    assert bus_bandwidth_gb_per_s(1e9, 0.1, 8) == pytest.approx(17.5)
    assert bus_bandwidth_gb_per_s(1e9, 0.1, 1) == 0


def test_a_wrong_setting_is_named() -> None:
    """Unknown keys are refused before torch is loaded."""
    with pytest.raises(JobError, match="did you mean megabytes"):
        main({"megabyte": 3})


@pytest.mark.training
def test_two_ranks_agree_on_every_sum() -> None:
    """Two real processes sum over gloo; rank 0 reports, and both end well."""
    code = "from jobs.all_reduce import main; main({'megabytes': 0.1, 'repeats': 3})"
    shared = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "12345",
    }
    shared |= {"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code], env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert "every sum right in 3 rounds" in said[0][0]
    assert said[1][0] == ""
