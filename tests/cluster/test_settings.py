"""The cluster description: what it refuses, and what it derives."""

from __future__ import annotations

from datetime import timedelta

import pytest

from cluster.errors import SpecError
from cluster.settings import ClusterSpec
from cluster.yamlfile import parse_yaml, validate

BASE = """
name: one
pools:
  - {name: gpu, nodes: 3}
  - {name: cpu, nodes: 2, gpus_per_node: 0}
queues:
  - {name: high, pools: [gpu], tier: 100}
  - {name: low, pools: [gpu, cpu], tier: 10, preemption: requeue, grace: 30s, time_limit: 48h}
"""


def spec_of(text: str) -> ClusterSpec:
    """Read a description from text."""
    return validate(ClusterSpec, parse_yaml(text, source="c.yaml"))


def test_nodes_are_named_after_their_pool() -> None:
    """Node names count from one within each pool, in the order of the file."""
    assert [name for name, _ in spec_of(BASE).nodes()] == ["gpu-1", "gpu-2", "gpu-3", "cpu-1", "cpu-2"]


def test_times_are_durations() -> None:
    """Times are read as lengths of time, not as numbers."""
    low = spec_of(BASE).queue("low")
    assert (low.grace, low.time_limit) == (timedelta(seconds=30), timedelta(hours=48))


def test_the_first_queue_is_the_default_unless_one_says_so() -> None:
    """Without a marked default the first queue takes jobs that name none."""
    assert spec_of(BASE).default_queue().name == "high"
    assert spec_of(BASE.replace("48h}", "48h, default: true}")).default_queue().name == "low"


def test_a_description_cannot_be_changed() -> None:
    """Settings are frozen once they are checked."""
    spec = spec_of(BASE)
    with pytest.raises(ValueError, match="frozen"):
        spec.name = "two"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("OFF", "off"),
        ("off", "off"),
        ("false", "off"),
        ('"off"', "off"),
        ("REQUEUE", "requeue"),
        ("cancel", "cancel"),
    ],
)
def test_preemption_off_in_every_spelling(written: str, meant: str) -> None:
    """`off` is understood also where another YAML tool has made a boolean of it."""
    assert spec_of(BASE.replace("preemption: requeue", f"preemption: {written}")).queue("low").preemption == meant


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("name: one", "name: One", "lower-case letters"),
        ("name: one", "name: a-st-b", "belong to ParallelCluster"),
        ("name: one", "name: " + "x" * 31, "at most 30"),
        ("name: cpu", "name: gpu", "pool gpu is described twice"),
        ("pools: [gpu]", "pools: [gpus]", "queue high names pool gpus; the pools are: cpu, gpu"),
        ("pools: [gpu]", "pools: []", "at least 1 item"),
        ("nodes: 3", "nodes: 0", "greater than or equal to 1"),
        ("nodes: 3", "nodes: three", "valid integer"),
        ("tier: 100", "tier: 70000", "less than or equal to 65533"),
        ("tier: 100", "tier: 100, default: true", "both the default"),
        ("tier: 100", "tier: 100, projects: [nobody]", "the projects are: none"),
        ("preemption: requeue", "preemption: suspend", "'off', 'requeue' or 'cancel'"),
        ("grace: 30s", "grace: 30", "write it like"),
    ],
)
def test_wrong_values_are_refused_with_the_rule(old: str, new: str, words: str) -> None:
    """Each wrong value ends in one message that names the rule it breaks."""
    text = BASE.replace(old, new, 1)
    if "default: true" in new:
        text = text.replace("48h}", "48h, default: true}")
    with pytest.raises(SpecError) as caught:
        spec_of(text)
    assert words in str(caught.value)


def test_the_defaults_make_priority_mean_something() -> None:
    """No weight is zero by default: Slurm's own defaults are all zero, and then multifactor does nothing."""
    assert all(spec_of(BASE).scheduling.prioritise.model_dump().values())
