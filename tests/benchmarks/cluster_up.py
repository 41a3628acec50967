"""`LocalCluster.up` and `down`: what a whole cluster on this machine costs, and how that grows with its nodes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

from cluster.local import LocalCluster
from tests.benchmarks.clusters import demo_spec
from tests.benchmarks.results import Result
from tests.benchmarks.scratch import CLUSTERS, scratch

SMALL, LARGE = 4, 64


def measure(*, small: int = SMALL, large: int = LARGE, rounds: int = 2) -> list[Result]:
    """Start and end clusters of both sizes in turns. `up` ends when all nodes are idle, `down` when nothing is left."""
    ups: dict[int, list[float]] = {small: [], large: []}
    downs: dict[int, list[float]] = {small: [], large: []}
    for _ in range(rounds):
        for nodes in (small, large):
            up_s, down_s = _up_and_down(nodes)
            ups[nodes].append(up_s)
            downs[nodes].append(down_s)
    return [
        _result("up", ups[large], ups[small], small=small, large=large),
        _result("down", downs[large], downs[small], small=small, large=large),
    ]


def _up_and_down(nodes: int) -> tuple[float, float]:
    with scratch() as directory:
        cluster = LocalCluster("bench", root=directory / CLUSTERS)
        started = time.monotonic()
        cluster.up(demo_spec(nodes=nodes))
        up_s = time.monotonic() - started
        started = time.monotonic()
        cluster.down()
        return up_s, time.monotonic() - started


def _result(what: str, of_large: Sequence[float], of_small: Sequence[float], *, small: int, large: int) -> Result:
    ours, other = median(of_large), median(of_small)
    return Result(
        name=f"cluster_up: {what}, {large} nodes",
        ours=ours,
        other=other,
        other_is=f"the same with {small} nodes",
        unit="s",
        ratio=ours / other,
        note=f"{large / small:.0f} times the nodes; {(ours - other) / (large - small):.2f} s for each further node",
    )
