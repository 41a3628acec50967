"""Offline findings about a cluster description: rules that weigh its sections against each other. Pure.

Rules of a single field are in `cluster.settings`; there a wrong value makes the file unreadable. Here the file can be read, and
each rule yields findings with level, field, value, rule and remedy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

from cluster.durations import format_duration
from cluster.findings import Finding, Level
from cluster.settings import ClusterSpec, Queue
from cluster.yamlfile import KeyPath, YamlDocument, field_name, read_yaml, try_validate

Rule = Callable[[ClusterSpec], Iterator[tuple[KeyPath, Finding]]]

_SLURM_DEFAULT_HOLD = timedelta(seconds=120)  # cred_expire of Slurm's munge plugin
_LARGE_CLUSTER_NODES = 256
_SAFE_HOLD_FOR_LARGE = timedelta(seconds=60)
_SHORTEST_HOLD = timedelta(seconds=5)  # tried on Slurm 22.05: below this it takes 120 s instead
_SHORTEST_SAVE = timedelta(seconds=10)


def check_file(path: Path) -> tuple[ClusterSpec | None, list[Finding]]:
    """Read a description and return it with all findings; None instead of it if it cannot be read as one.

    Raises:
        InputError: The file cannot be opened or is not YAML.
    """
    document = read_yaml(path)
    spec, findings = try_validate(ClusterSpec, document)
    if spec is not None:
        findings = check_spec(spec, document)
    return spec, findings


def check_spec(spec: ClusterSpec, document: YamlDocument | None = None) -> list[Finding]:
    """Return every finding about `spec`, the worst first; with lines where the document it came from is given."""
    found = [_placed(finding, path, document) for rule in RULES for path, finding in rule(spec)]
    order = list(Level)
    return sorted(found, key=lambda finding: (order.index(finding.level), finding.line or 0))


def _placed(finding: Finding, path: KeyPath, document: YamlDocument | None) -> Finding:
    from dataclasses import replace

    if document is None:
        return replace(finding, field=field_name(path))
    return replace(
        finding, field=field_name(path), line=document.line_of(path), source=finding.source or document.source
    )


def _find(path: KeyPath, id: str, level: Level, value: object, rule: str, remedy: str) -> tuple[KeyPath, Finding]:  # noqa: A002 - the field is called id
    return path, Finding(id=id, level=level, field="", value=str(value), rule=rule, remedy=remedy)


def _preemptible_tiers(spec: ClusterSpec) -> Iterator[tuple[KeyPath, Finding]]:
    """Yield queues that are said to be preempted that never are, and queues over the same nodes that cannot take them."""
    for number, queue in enumerate(spec.queues):
        sharing = [other for other in spec.queues if other is not queue and set(other.pools) & set(queue.pools)]
        above = [other for other in sharing if other.tier > queue.tier]
        if queue.preemption != "off" and not above:
            yield _find(
                ("queues", number, "preemption"), "nothing-preempts", Level.WARNING, queue.preemption,
                "no queue of a higher tier shares this queue's nodes, so its jobs are never preempted",
                "raise the tier of another queue over the same pools, or set preemption: off",
            )  # fmt: skip
        if queue.preemption == "off" and above:
            names = ", ".join(other.name for other in above)
            yield _find(
                ("queues", number, "preemption"), "tier-without-preemption", Level.WARNING, "off",
                f"queue {names} stands above this one on the same nodes but may not take them: its jobs wait until these end",
                "set preemption: requeue here, or accept the wait by giving both the same tier",
            )  # fmt: skip
        same = [other.name for other in sharing if other.tier == queue.tier and other.name > queue.name]
        if same:
            yield _find(
                ("queues", number, "tier"), "equal-tiers", Level.NOTE, queue.tier,
                f"queue {', '.join(same)} has the same tier on the same nodes: neither takes nodes from the other",
                "give them different tiers if one should come first",
            )  # fmt: skip


def _time_to_save(spec: ClusterSpec) -> Iterator[tuple[KeyPath, Finding]]:
    """Yield queues whose preempted jobs have next to no time to write a checkpoint."""
    kill_wait = spec.scheduling.kill_wait
    for number, queue in enumerate(spec.queues):
        if queue.preemption == "off":
            continue
        time_to_save = queue.grace + kill_wait
        if time_to_save < _SHORTEST_SAVE:
            yield _find(
                ("queues", number, "grace"), "no-time-to-save", Level.WARNING, format_duration(queue.grace),
                f"a preempted job has {format_duration(time_to_save)} (grace and scheduling.kill_wait together) to save",
                f"raise either until together they are at least {format_duration(_SHORTEST_SAVE)}",
            )  # fmt: skip
        if queue.preemption == "cancel":
            yield _find(
                ("queues", number, "preemption"), "cancel-loses-jobs", Level.WARNING, "cancel",
                "a preempted job that does not requeue itself is gone for good; Muster's own trainer does, others may not",
                "set preemption: requeue",
            )  # fmt: skip


def _requeue_hold(spec: ClusterSpec) -> Iterator[tuple[KeyPath, Finding]]:
    """Yield a hold that is too short for the size of the cluster, or as long as Slurm's own default."""
    hold = spec.scheduling.requeue_hold
    nodes = sum(pool.nodes for pool in spec.pools)
    path: KeyPath = ("scheduling", "requeue_hold")
    if nodes >= _LARGE_CLUSTER_NODES and hold < _SAFE_HOLD_FOR_LARGE:
        yield _find(
            path, "hold-too-short", Level.WARNING, format_duration(hold),
            f"it is also the life of a launch credential; reaching {nodes} nodes can take longer, and they refuse the job",
            f"use at least {format_duration(_SAFE_HOLD_FOR_LARGE)} from {_LARGE_CLUSTER_NODES} nodes on",
        )  # fmt: skip
    if hold >= _SLURM_DEFAULT_HOLD:
        yield _find(
            path, "hold-long", Level.NOTE, format_duration(hold),
            "every preempted job waits this long before it can start again",
            "30s is enough for most clusters",
        )  # fmt: skip
    if hold < _SHORTEST_HOLD:
        yield _find(
            path,
            "hold-too-small",
            Level.ERROR,
            format_duration(hold),
            "Slurm throws away a credential life (cred_expire) below 5s and takes its default of 120s instead",
            "use at least 5s",
        )


def _priorities(spec: ClusterSpec) -> Iterator[tuple[KeyPath, Finding]]:
    """Yield weights that make every job equal."""
    weights = spec.scheduling.prioritise
    if not any(weights.model_dump().values()):
        yield _find(
            ("scheduling", "prioritise"), "weights-all-zero", Level.ERROR, "all 0",
            "with every weight zero all jobs have the same priority and fair-share does nothing",
            "remove the section to get Muster's weights",
        )  # fmt: skip


def _accounting(spec: ClusterSpec) -> Iterator[tuple[KeyPath, Finding]]:
    """Yield settings that need the accounting database while it is off."""
    if spec.accounting.enabled:
        if not spec.projects:
            yield _find(
                ("projects",), "no-projects", Level.NOTE, "none",
                "accounting is on but nobody is grouped: usage is shown by user only",
                "describe at least one project",
            )  # fmt: skip
        return
    needing: list[tuple[KeyPath, str]] = [(("projects",), "projects")] if spec.projects else []
    needing += [
        (("queues", n, "minimum_run"), "minimum_run") for n, queue in enumerate(spec.queues) if queue.minimum_run
    ]
    needing += [
        (("queues", n, "projects"), "a queue's projects") for n, queue in enumerate(spec.queues) if queue.projects
    ]
    for path, what in needing:
        yield _find(
            path,
            "needs-accounting",
            Level.ERROR,
            "",
            f"{what} live in Slurm's accounting database, which is off",
            "set accounting.enabled: true",
        )


def _times(spec: ClusterSpec) -> Iterator[tuple[KeyPath, Finding]]:
    """Yield queues whose times contradict each other."""
    for number, queue in enumerate(spec.queues):
        if queue.time_limit is not None and queue.default_time is not None and queue.default_time > queue.time_limit:
            yield _find(
                ("queues", number, "default_time"), "default-over-limit", Level.ERROR, format_duration(queue.default_time),
                f"is over the time_limit of {format_duration(queue.time_limit)}: jobs without a time never start",
                f"use at most {format_duration(queue.time_limit)}",
            )  # fmt: skip
        if queue.minimum_run and _preempted_by_nobody(queue):
            yield _find(
                ("queues", number, "minimum_run"), "minimum-run-without-preemption", Level.NOTE,
                format_duration(queue.minimum_run),
                "only queues that may be preempted use it",
                "remove it, or set preemption: requeue",
            )  # fmt: skip


def _projects_are_used(spec: ClusterSpec) -> Iterator[tuple[KeyPath, Finding]]:
    """Yield projects that may submit nowhere."""
    for number, project in enumerate(spec.projects):
        if not any(not queue.projects or project.name in queue.projects for queue in spec.queues):
            yield _find(
                ("projects", number, "name"), "project-without-queue", Level.WARNING, project.name,
                "no queue admits this project",
                "add it to a queue's projects",
            )  # fmt: skip


def _pools_are_used(spec: ClusterSpec) -> Iterator[tuple[KeyPath, Finding]]:
    """Yield pools whose nodes no queue can reach."""
    used = {name for queue in spec.queues for name in queue.pools}
    for number, pool in enumerate(spec.pools):
        if pool.name not in used:
            yield _find(
                ("pools", number, "name"), "pool-without-queue", Level.WARNING, pool.name,
                "no queue uses this pool: its nodes stay idle",
                "add it to a queue's pools",
            )  # fmt: skip


def _not_enforced_yet(spec: ClusterSpec) -> Iterator[tuple[KeyPath, Finding]]:
    """Yield settings that this version reads and does not act on."""
    for number, project in enumerate(spec.projects):
        if project.budget_gpu_hours is not None:
            yield _find(
                ("projects", number, "budget_gpu_hours"),
                "not-enforced-yet",
                Level.NOTE,
                project.budget_gpu_hours,
                "this version of Muster records the budget and does not enforce it",
                "use max_gpus for a limit that holds today",
            )


def _preempted_by_nobody(queue: Queue) -> bool:
    return queue.preemption == "off"


RULES: tuple[Rule, ...] = (
    _preemptible_tiers,
    _time_to_save,
    _requeue_hold,
    _priorities,
    _accounting,
    _times,
    _projects_are_used,
    _pools_are_used,
    _not_enforced_yet,
)
