"""Offline findings: each rule fires on what it is for, and on nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.checks import check_file, check_spec
from cluster.commands import cluster_app
from cluster.findings import Level
from cluster.settings import ClusterSpec
from cluster.yamlfile import parse_yaml, validate

GOOD = """\
name: one
pools:
  - {name: gpu, nodes: 4}
queues:
  - name: high
    pools: [gpu]
    tier: 100
  - name: low
    pools: [gpu]
    tier: 10
    preemption: requeue
    grace: 30s
projects:
  - name: research
scheduling:
  requeue_hold: 30s
"""


def findings_of(text: str) -> list[tuple[str, str, int | None]]:
    """Return (id, field, line) of every finding."""
    document = parse_yaml(text, source="c.yaml")
    return [(f.id, f.field, f.line) for f in check_spec(validate(ClusterSpec, document), document)]


def test_a_good_description_has_no_finding() -> None:
    """The rules are silent where nothing is wrong."""
    assert findings_of(GOOD) == []


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("tier: 100", "tier: 5", ("nothing-preempts", "queues[1].preemption", 11)),
        ("preemption: requeue", "preemption: off", ("tier-without-preemption", "queues[1].preemption", 11)),
        ("tier: 100", "tier: 10", ("equal-tiers", "queues[0].tier", 7)),
        ("grace: 30s\n", "grace: 0s\n", None),
        ("preemption: requeue", "preemption: cancel", ("cancel-loses-jobs", "queues[1].preemption", 11)),
        ("requeue_hold: 30s", "requeue_hold: 120s", ("hold-long", "scheduling.requeue_hold", 16)),
        ("requeue_hold: 30s", "requeue_hold: 0", ("hold-too-small", "scheduling.requeue_hold", 16)),
        ("nodes: 4", "nodes: 256", ("hold-too-short", "scheduling.requeue_hold", 16)),
        ("requeue_hold: 30s", "kill_wait: 5s", None),
        (
            "grace: 30s",
            "minimum_run: 1h\n    default_time: 3h\n    time_limit: 2h",
            ("default-over-limit", "queues[1].default_time", 13),
        ),
        (
            "requeue_hold: 30s",
            "prioritise: {age: 0, fair_share: 0, job_size: 0, queue: 0, quality_of_service: 0}",
            ("weights-all-zero", "scheduling.prioritise", 16),
        ),
        ("projects:\n  - name: research\n", "", ("no-projects", "projects", 1)),
        (
            "scheduling:\n",
            "accounting: {enabled: false}\nscheduling:\n",
            ("needs-accounting", "projects", 13),
        ),
        (
            "tier: 100",
            "tier: 100\n    minimum_run: 1h",
            ("minimum-run-without-preemption", "queues[0].minimum_run", 8),
        ),
        (
            "- name: research",
            "- name: research\n    budget_gpu_hours: 100",
            ("not-enforced-yet", "projects[0].budget_gpu_hours", 15),
        ),
        (
            "{name: gpu, nodes: 4}",
            "{name: gpu, nodes: 4}\n  - {name: spare, nodes: 1}",
            ("pool-without-queue", "pools[1].name", 4),
        ),
    ],
)
def test_each_rule_fires_where_it_should(old: str, new: str, expected: tuple[str, str, int] | None) -> None:
    """One change to a good description gives that one finding, at the line of the change; None: it is still good."""
    assert old in GOOD
    found = findings_of(GOOD.replace(old, new, 1))
    assert expected in found if expected else found == []


def test_no_time_to_save_counts_grace_and_kill_wait_together() -> None:
    """A job has the grace and KillWait to save; only when both are short is it a finding."""
    short = GOOD.replace("requeue_hold: 30s", "kill_wait: 5s")
    assert findings_of(short) == []
    assert ("no-time-to-save", "queues[1].grace", 12) in findings_of(short.replace("grace: 30s", "grace: 2s"))


def test_a_project_that_no_queue_admits() -> None:
    """A project is reported when every queue names other projects."""
    text = GOOD.replace("- name: research", "- name: research\n  - name: other")
    text = text.replace("tier: 100", "tier: 100\n    projects: [other]").replace(
        "tier: 10\n", "tier: 10\n    projects: [other]\n"
    )
    assert "project-without-queue" in [finding[0] for finding in findings_of(text)]


def test_the_worst_come_first() -> None:
    """Errors stand before warnings and notes."""
    document = parse_yaml(
        GOOD.replace("requeue_hold: 30s", "requeue_hold: 0").replace("preemption: requeue", "preemption: cancel"),
        source="c",
    )
    levels = [finding.level for finding in check_spec(validate(ClusterSpec, document), document)]
    assert levels == sorted(levels, key=list(Level).index)
    assert levels[0] is Level.ERROR


def test_every_finding_tells_what_to_do() -> None:
    """Rule and remedy are sentences for every finding of a file full of mistakes."""
    text = (
        GOOD.replace("tier: 100", "tier: 10").replace("preemption: requeue", "preemption: cancel").replace("30s", "0")
    )
    document = parse_yaml(text, source="c.yaml")
    found = check_spec(validate(ClusterSpec, document), document)
    assert len(found) >= 3
    assert all(finding.rule and finding.remedy and finding.line for finding in found)


@pytest.mark.parametrize(
    ("text", "exit_code", "words"),
    [
        (GOOD, 0, "0 errors"),
        (GOOD.replace("tier: 100", "tier: 5"), 0, "nothing-preempts"),
        (GOOD.replace("requeue_hold: 30s", "requeue_hold: 0"), 4, "hold-too-small"),
        (GOOD.replace("nodes: 4", "noodes: 4"), 4, "did you mean nodes?"),
    ],
)
def test_the_command_prints_findings_and_ends_by_the_worst(
    tmp_path: Path, text: str, exit_code: int, words: str
) -> None:
    """`muster cluster check` ends with 0 without errors and with 4 with them, and prints the rule's id."""
    file = tmp_path / "c.yaml"
    file.write_text(text)
    result = CliRunner().invoke(cluster_app, ["check", str(file)])
    code = getattr(result.exception, "exit_code", result.exit_code)
    assert (code, words in result.output) == (exit_code, True)


def test_check_file_returns_the_description_and_its_findings(tmp_path: Path) -> None:
    """A readable description comes back with its findings; an unreadable one as None."""
    file = tmp_path / "c.yaml"
    file.write_text(GOOD)
    assert check_file(file)[0] is not None
    file.write_text(GOOD.replace("nodes", "noodes"))
    spec, findings = check_file(file)
    assert spec is None
    assert findings


@pytest.mark.parametrize("name", ["local-demo"])
def test_init_writes_a_template_that_checks_clean(tmp_path: Path, name: str) -> None:
    """What `muster cluster init` writes has no finding at all, and an existing file is never overwritten."""
    target = tmp_path / "cluster.yaml"
    assert CliRunner().invoke(cluster_app, ["init", "--template", name, "-o", str(target)]).exit_code == 0
    assert check_file(target)[1] == []
    target.write_text("mine")
    refused = CliRunner().invoke(cluster_app, ["init", "--template", name, "-o", str(target)])
    assert "not overwritten" in str(refused.exception)
    assert target.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["cluster.yaml"]
