"""Why a job is where it is, in words: pure functions over what Slurm and the run's own journal say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from cluster.durations import format_duration
from cluster.slurm_records import UNLIMITED, AccountingRecord, Job, JobPriority, Node, Partition

REQUEUE_EXIT_CODE = 75


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One attempt as the run's own journal tells it."""

    number: int
    started: datetime | None = None
    ended: datetime | None = None
    outcome: str = ""
    """Why it ended, in words; empty while it runs, or where it was killed before it could say."""
    nodes: tuple[str, ...] = ()
    detail: str = ""
    """What it got done: `steps 100 to 250, 3 s lost`."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Everything that is known around one job. What could not be read is empty, and named in `unread`."""

    now: datetime
    job: Job | None = None
    records: tuple[AccountingRecord, ...] = ()
    """Whole attempts of this job in accounting, oldest first, without steps."""
    jobs: tuple[Job, ...] = ()
    """Every job that slurmctld remembers."""
    nodes: tuple[Node, ...] = ()
    partitions: tuple[Partition, ...] = ()
    priorities: tuple[JobPriority, ...] = ()
    expected_start: datetime | None = None
    attempts: tuple[Attempt, ...] = ()
    unread: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """The answer: one headline, what lies behind it, what one could do."""

    job_id: str
    state: str
    headline: str
    facts: tuple[str, ...] = ()
    attempts: tuple[str, ...] = ()
    next_steps: tuple[str, ...] = ()


def explain(job_id: str, scene: Scene) -> Explanation:
    """Say in words why the job waits, runs or has ended. The scene must hold the job, or a record of it."""
    job = scene.job
    attempts = tuple(_describe_attempts(scene))
    if job is not None and job.is_pending:
        headline, facts, steps = _explain_pending(job, scene)
    elif job is not None and job.is_running:
        headline, facts, steps = _explain_running(job, scene)
    else:
        headline, facts, steps = _explain_ended(job_id, scene)
    state = job.state if job is not None else scene.records[-1].state
    facts += [f"not known: {reason}" for reason in scene.unread]
    return Explanation(
        job_id=job_id, state=state, headline=headline, facts=tuple(facts), attempts=attempts, next_steps=tuple(steps)
    )


Answer = tuple[str, list[str], list[str]]


def _explain_pending(job: Job, scene: Scene) -> Answer:
    since = job.eligible_time or job.submit_time
    waited = f", for {span(scene.now - since)} so far" if since is not None and since < scene.now else ""
    headline = f"{_title(job)} waits in queue {job.partition}{waited}."
    facts, steps = _reason_in_words(job, scene)
    position = _position(job, scene)
    if position:
        facts.append(position)
    if scene.expected_start is not None and scene.expected_start > scene.now:
        facts.append(
            f"Slurm expects to start it {moment(scene.expected_start, scene.now)}, or earlier if running jobs end early."
        )
    elif job.reason in {"Resources", "Priority"}:
        facts.append("Slurm has not worked out an expected start yet.")
    if job.restarts:
        facts.append(f"It has been requeued {times(job.restarts)}; the next start is attempt {job.restarts + 1}.")
    return headline, facts, steps


def _reason_in_words(job: Job, scene: Scene) -> tuple[list[str], list[str]]:
    """Turn Slurm's reason into sentences and what to do; the reason itself always stands in the text."""
    reason = job.reason or ""
    word = re.split(r"[ ,(:]", reason, maxsplit=1)[0]
    shown = f" ({reason})" if reason else ""
    cancel = f"muster jobs cancel {job.display_id}"
    if word == "BeginTime":
        return _explain_begin_time(job, scene)
    if word in {"Resources", "Priority", "None", ""}:
        return _explain_resources(job, scene)
    if word == "DependencyNeverSatisfied":
        text = f"It waits for {job.dependency or 'another job'}, which can no longer come true{shown}."
        return [text], [f"{cancel}, and submit it again without that dependency"]
    if word == "Dependency":
        return [_explain_dependency(job, scene) + shown + "."], []
    if job.is_held:
        who = "you or its owner" if word == "JobHeldUser" else "an administrator" if word == "JobHeldAdmin" else "Slurm"
        return [f"It is held by {who} and will not start until it is released{shown}."], [
            f"scontrol release {job.display_id}"
        ]
    if word == "ReqNodeNotAvail":
        return _explain_unavailable(job, scene, reason)
    if "TimeLimit" in word or word == "PartitionTimeLimit":
        limit = next((p.max_time for p in scene.partitions if p.name == job.partition), None)
        most = f" (at most {_limit(limit)})" if limit is not None else ""
        text = f"It asks for {_limit(job.time_limit)}, which is more than its queue or account allows{most}{shown}."
        return [text], [
            f"scontrol update jobid={job.display_id} TimeLimit=..., or {cancel} and submit it again with less time"
        ]
    if word.startswith(("Assoc", "QOS")):
        return [_explain_limit(job, scene, word) + shown + "."], []
    sentence, step = _OTHER_REASONS.get(word, (f"Slurm gives the reason {reason}", ""))
    if job.reason_detail and job.reason_detail != reason:
        sentence += f": {job.reason_detail}"
    return [f"{sentence}{shown if word in _OTHER_REASONS else ''}."], [step.format(job=job.display_id)] if step else []


_OTHER_REASONS = {
    "JobArrayTaskLimit": (
        "As many elements of its array run as may at one time",
        "scontrol update jobid={job} ArrayTaskThrottle=N",
    ),
    "PartitionNodeLimit": (
        "It asks for more nodes than its queue gives one job",
        "muster jobs cancel {job}, and ask for fewer nodes",
    ),
    "PartitionDown": ("Its queue takes jobs but starts none at the moment", ""),
    "PartitionInactive": ("Its queue is closed", ""),
    "Licenses": ("It waits for a licence", ""),
    "Reservation": ("It waits for its reservation to begin", "scontrol show reservation"),
    "BadConstraints": (
        "No node of the queue is what it asks for",
        "muster jobs cancel {job}, and ask for what the nodes have",
    ),
    "InvalidAccount": (
        "Its account may not use this cluster or queue",
        "muster jobs cancel {job}, and submit it with project",
    ),
    "InvalidQOS": (
        "Its QOS is not one that its account may use",
        "muster jobs cancel {job}, and submit it without qos",
    ),
    "Cleaning": ("Its last attempt is still being cleaned up on its nodes", ""),
    "Prolog": ("Its nodes are being prepared", ""),
    "NodeDown": ("A node that it needs is down", ""),
    "FrontEndDown": ("A node that it needs is down", ""),
    "JobLaunchFailure": ("Its last launch failed", "muster jobs logs {job}"),
    "launch_failed_requeued_held": (
        "Its last launch failed, and Slurm holds it so that this does not go on for ever",
        "look at the node's slurmd log, then scontrol release {job}",
    ),
    "JobHoldMaxRequeue": (
        "It has been requeued as often as Slurm allows (MAX_BATCH_REQUEUE)",
        "scontrol release {job}",
    ),
    "SystemFailure": ("Slurm failed on its side", "scontrol release {job}"),
}


def _explain_begin_time(job: Job, scene: Scene) -> tuple[list[str], list[str]]:
    """A requeued job is held for a while, so that its nodes are clean first; others have asked for a start time."""
    when = job.eligible_time if job.eligible_time and job.eligible_time > scene.now else job.start_time
    until = (
        f" until {clock(when, scene.now)}"
        if when is not None and when > scene.now
        else " until the next look at the queue"
    )
    step = [f"scontrol update jobid={job.display_id} StartTime=now"]
    if not job.restarts:
        return [f"It was submitted to start later: Slurm holds it{until} (BeginTime)."], step
    last = _last_ending(scene)
    because = f" because {last}" if last else ""
    return [
        f"It was sent back to the queue{because}, and Slurm holds a requeued job for a moment:{until} (BeginTime)."
    ], step


def _explain_resources(job: Job, scene: Scene) -> tuple[list[str], list[str]]:
    partition = next((p for p in scene.partitions if p.name == job.partition), None)
    wanted = _wanted(job)
    reason = f" ({job.reason})" if job.reason else ""
    if job.reason == "Priority":
        facts = [f"Jobs with a higher priority are ahead of it{reason}; it needs {wanted}."]
    elif job.reason is None or job.reason == "None":
        facts = [f"It needs {wanted}; Slurm has not looked at it since it came back or was submitted."]
    else:
        facts = [f"It needs {wanted}, and not enough of that is free{reason}."]
    members = [node for node in scene.nodes if partition is None or node.name in partition.nodes]
    if not members:
        return facts, []
    per_node = _gpus_per_node(job)
    fitting = [node for node in members if node.gpu_count >= per_node and node.name not in job.excluded_nodes]
    usable = [node for node in fitting if node.is_usable]
    free = [node for node in usable if _has_room(node, per_node, job)]
    out = [node for node in fitting if not node.is_usable]
    parts = [f"{len(free)} free", f"{len(usable) - len(free)} busy", f"{len(out)} out of service"]
    if job.excluded_nodes:
        parts.append(f"{len(members) - len(fitting)} excluded by the job or too small")
    facts.append(f"Nodes of queue {job.partition}: {len(members)}, of them {', '.join(parts)}.")
    facts += [
        f"{node.name} is out of service: {node.state_text}{f', {node.reason}' if node.reason else ''}."
        for node in out[:5]
    ]
    facts += _holders(job, scene, {node.name for node in usable} - {node.name for node in free})
    if len(fitting) < (job.node_count or 1):
        short = f"Only {len(fitting)} nodes could ever run it, and it asks for {job.node_count}: as it is, it will not start."
        return [*facts, short], [f"muster jobs cancel {job.display_id}, and ask for fewer or smaller nodes"]
    return facts, []


def _holders(job: Job, scene: Scene, busy: set[str]) -> list[str]:
    """Say which jobs hold the nodes, and which of them this one may push out."""
    tiers = {partition.name: partition.tier or 0 for partition in scene.partitions}
    own = tiers.get(job.partition or "", 0)
    lines = []
    for other in scene.jobs:
        held = busy & set(other.nodes)
        if not other.is_running or not held:
            continue
        ends = (
            f", its limit ends it {moment(other.end_time, scene.now)}"
            if other.end_time and other.end_time > scene.now
            else ""
        )
        if other.preempt_time is not None:
            ends = ", it is being preempted"
        elif tiers.get(other.partition or "", 0) < own:
            ends += ", it can be preempted for this one"
        lines.append(
            f"{_count(len(held), 'node')} held by {_title(other)} of {other.user} in queue {other.partition}{ends}."
        )
    return [*lines[:5], *([f"... and by {len(lines) - 5} more jobs."] if len(lines) > 5 else [])]


def _explain_unavailable(job: Job, scene: Scene, reason: str) -> tuple[list[str], list[str]]:
    asked = set(job.required_nodes)
    out = [node for node in scene.nodes if not node.is_usable and (not asked or node.name in asked)]
    facts = [f"A node that it needs cannot be used ({reason})."]
    facts += [f"{node.name}: {node.state_text}{f', {node.reason}' if node.reason else ''}." for node in out[:5]]
    steps = ["scontrol show reservation"] if "maintenance" in reason.lower() or "reserv" in reason.lower() else []
    return facts, steps


def _explain_dependency(job: Job, scene: Scene) -> str:
    states = {other.id: other for other in scene.jobs}
    text = f"It waits for {job.dependency}" if job.dependency else "It waits for another job"
    known = [states[number] for number in re.findall(r"\d+", job.dependency or "") if number in states]
    return text + (f": {', '.join(f'{_title(other)} is {other.state}' for other in known)}" if known else "")


def _explain_limit(job: Job, scene: Scene, word: str) -> str:
    whose = f"account {job.account}" if word.startswith("Assoc") else f"QOS {job.qos}"
    what = next((text for key, text in _LIMITED.items() if key in word), "resources")
    running = [other for other in scene.jobs if other.is_running and other.account == job.account]
    gpus = sum(other.gpu_count or 0 for other in running)
    use = (
        f"; {_count(len(running), 'job')} of account {job.account} run now, with {_count(gpus, 'GPU')}"
        if running
        else ""
    )
    return f"{whose[0].upper()}{whose[1:]} is at its limit of {what}{use}"


_LIMITED = {
    "GRES": "GPUs",
    "Gres": "GPUs",
    "Cpu": "CPUs",
    "CPU": "CPUs",
    "Mem": "memory",
    "Node": "nodes",
    "Job": "jobs",
    "Wall": "time",
}


def _position(job: Job, scene: Scene) -> str:
    """Say how many jobs are ahead: higher tiers over the same nodes first, then by priority, then by who came first."""
    if job.is_held or job.reason in {"BeginTime", "Dependency", "DependencyNeverSatisfied"}:
        return ""
    partitions = {partition.name: partition for partition in scene.partitions}
    own = partitions.get(job.partition or "")
    waiting = [
        other
        for other in scene.jobs
        if other.is_pending
        and not other.is_held
        and other.reason not in {"BeginTime", "Dependency", "DependencyNeverSatisfied"}
    ]
    same = sorted((other for other in waiting if other.partition == job.partition), key=_order)
    place = next((number for number, other in enumerate(same, start=1) if other.id == job.id), None)
    if place is None:
        return ""
    text = f"It is number {place} of {len(same)} waiting in queue {job.partition}"
    text += f" (priority {job.priority})." if job.priority else "."
    above = [
        other
        for other in waiting
        if own is not None
        and (upper := partitions.get(other.partition or "")) is not None
        and (upper.tier or 0) > (own.tier or 0)
        and set(upper.nodes) & set(own.nodes)
    ]
    if above:
        queues = sorted({str(other.partition) for other in above})
        names = f"{'queue' if len(queues) == 1 else 'queues'} {', '.join(queues)}"
        text += f" {_count(len(above), 'job')} of {names} come first anyway."
    made_of = _priority_in_words(job, scene)
    return text + (f" {made_of}" if made_of else "")


def _order(job: Job) -> tuple[int, float, int]:
    submitted = job.submit_time.timestamp() if job.submit_time is not None else 0.0
    return (-(job.priority or 0), submitted, int(job.id) if job.id.isdecimal() else 0)


def _priority_in_words(job: Job, scene: Scene) -> str:
    own = next((priority for priority in scene.priorities if priority.job_id == job.id), None)
    parts = (
        [] if own is None else [f"{name.replace('_', ' ')} {value:g}" for name, value in own.factors.items() if value]
    )
    return f"Its priority is made of {', '.join(parts)}." if parts else ""


def _explain_running(job: Job, scene: Scene) -> Answer:
    since = f" since {clock(job.start_time, scene.now)}" if job.start_time is not None else ""
    verb = {"COMPLETING": "is ending", "CONFIGURING": "is being given its nodes", "SUSPENDED": "is suspended"}.get(
        job.state, "runs"
    )
    headline = f"{_title(job)} {verb} on {', '.join(job.nodes) or 'its nodes'}{since}."
    facts = []
    if job.preempt_time is not None:
        facts.append(
            f"Slurm has chosen it for preemption {moment(job.preempt_time, scene.now)}: it is saving, or about to be ended."
        )
    limited = job.time_limit is not None and job.time_limit != UNLIMITED
    if limited and job.state == "RUNNING" and job.end_time is not None and job.end_time > scene.now:
        facts.append(f"Its time limit of {_limit(job.time_limit)} ends it {moment(job.end_time, scene.now)}.")
    if job.restarts:
        last = _last_ending(scene)
        because = f"; the last time because {last}" if last else ""
        facts.append(f"This is attempt {job.restarts + 1}: it has been requeued {times(job.restarts)}{because}.")
    return headline, facts, [f"muster jobs logs -f {job.display_id}"]


def _explain_ended(job_id: str, scene: Scene) -> Answer:
    job, record = scene.job, scene.records[-1] if scene.records else None
    state = job.state if job is not None else record.state if record is not None else "UNKNOWN"
    title = _title(job) if job is not None else _record_title(job_id, record)
    code = job.exit_code if job is not None else record.exit_code if record is not None else None
    signal = job.exit_signal if job is not None else record.exit_signal if record is not None else None
    end = job.end_time if job is not None else record.end_time if record is not None else None
    logs = f"muster jobs logs {job_id}"
    text, steps = _ENDINGS.get(state, (f"ended in state {state}", [logs]))
    if state == "FAILED":
        text = f"failed with exit code {code}" if not signal else f"was ended by signal {signal}"
        if code == REQUEUE_EXIT_CODE:
            text += ", the one that asks to be requeued; this cluster did not requeue it (RequeueExit, or --no-requeue)"
            steps = ["submit it again: a trainer goes on where it saved", logs]
    if state == "CANCELLED" and record is not None and record.cancelled_by:
        text += f" by {record.cancelled_by}"
    limit = job.time_limit if job is not None else record.time_limit if record is not None else None
    if state == "TIMEOUT" and limit is not None:
        text += f" of {_limit(limit)}"
    when = f" {moment(end, scene.now)}" if end is not None else ""
    headline = f"{title} {text}{when}."
    facts = []
    reason = (job.reason if job is not None else record.reason if record is not None else None) or ""
    if reason not in _SAYS_NOTHING_OF_AN_ENDED_JOB:
        facts.append(f"Slurm's reason: {reason}.")
    nodes = job.nodes if job is not None and job.nodes else record.nodes if record is not None else ()
    if nodes:
        facts.append(f"It ran on {', '.join(nodes[:8])}{', ...' if len(nodes) > 8 else ''}.")
    return headline, facts, [step.format(job=job_id) for step in steps]


_SAYS_NOTHING_OF_AN_ENDED_JOB = {
    "",
    "None",
    "NonZeroExitCode",
    "TimeLimit",
    "BeginTime",
    "Resources",
    "Priority",
    "Dependency",
}
"""Reasons that repeat the state, or that are left over from when the job waited."""

_ENDINGS: Mapping[str, tuple[str, list[str]]] = {
    "COMPLETED": ("has finished", []),
    "FAILED": ("failed", ["muster jobs logs {job}"]),
    "CANCELLED": ("was cancelled", []),
    "TIMEOUT": (
        "was ended at its time limit",
        ["muster jobs logs {job}", "give it more time, or let it save at the warning (USR2)"],
    ),
    "NODE_FAIL": (
        "ended because a node failed, and was not requeued",
        ["submit it again with requeue: a trainer goes on where it saved"],
    ),
    "OUT_OF_MEMORY": (
        "was ended because it used more memory than it had asked for",
        ["raise memory_gb (sbatch: --mem)"],
    ),
    "PREEMPTED": (
        "was preempted and may not be requeued",
        ["submit it again without --no-requeue: a preempted job then comes back by itself"],
    ),
    "BOOT_FAIL": ("ended because its nodes could not be started", ["submit it again"]),
    "DEADLINE": ("was ended at its deadline", []),
    "REQUEUED": ("was sent back to the queue", []),
}


def _describe_attempts(scene: Scene) -> list[str]:
    """One line an attempt: from the journal where there is one, else from accounting."""
    if scene.attempts:
        *earlier, last = scene.attempts
        is_over = scene.job.is_ended if scene.job is not None else True
        if is_over and not last.outcome and last.ended is None:
            how = _ending_of_record(scene.records[-1]) if scene.records else "ended"
            last = replace(last, outcome=f"{how} before it could say why")
        return [_journal_line(attempt, scene.now) for attempt in (*earlier, last)]
    if len(scene.records) < 2:
        return []
    return [_record_line(number, record, scene.now) for number, record in enumerate(scene.records, start=1)]


def _journal_line(attempt: Attempt, now: datetime) -> str:
    started = f"started {moment(attempt.started, now)}" if attempt.started is not None else "never started"
    nodes = f" on {', '.join(attempt.nodes[:4])}{', ...' if len(attempt.nodes) > 4 else ''}" if attempt.nodes else ""
    length = f" for {span(attempt.ended - attempt.started)}" if attempt.started and attempt.ended else ""
    outcome = attempt.outcome or ("running" if attempt.ended is None else "ended without saying why")
    return f"attempt {attempt.number}: {started}{nodes}{length}: {outcome}{f'; {attempt.detail}' if attempt.detail else ''}"


def _record_line(number: int, record: AccountingRecord, now: datetime) -> str:
    started = f"started {moment(record.start_time, now)}" if record.start_time is not None else "never started"
    nodes = f" on {', '.join(record.nodes[:4])}{', ...' if len(record.nodes) > 4 else ''}" if record.nodes else ""
    length = f" for {span(record.elapsed)}" if record.elapsed else ""
    return f"attempt {number}: {started}{nodes}{length}: {_ending_of_record(record)}"


def _last_ending(scene: Scene) -> str:
    """Say why the attempt before the present one ended; empty where nobody knows."""
    ended = [attempt for attempt in scene.attempts if attempt.ended is not None or attempt.outcome]
    if ended and ended[-1].outcome:
        return f"its last attempt ended: {ended[-1].outcome}"
    before = [record for record in scene.records if record.end_time is not None]
    return f"its last attempt {_ending_of_record(before[-1])}" if before else ""


def _ending_of_record(record: AccountingRecord) -> str:
    if record.state == "REQUEUED":
        if record.exit_code == REQUEUE_EXIT_CODE:
            return "saved and asked to be requeued (exit code 75)"
        return "was preempted, or requeued by hand or after a node failed"
    if record.state == "RUNNING":
        return "runs"
    if record.state == "PENDING":
        return "waits"
    if record.state == "FAILED":
        if record.exit_code == REQUEUE_EXIT_CODE:
            return "saved and asked to be requeued (exit code 75)"
        return (
            f"was ended by signal {record.exit_signal}"
            if record.exit_signal
            else f"failed with exit code {record.exit_code}"
        )
    return _ENDINGS.get(record.state, (f"ended in state {record.state}", []))[0]


def _title(job: Job) -> str:
    return f"job {job.display_id} ({job.name})" if job.name else f"job {job.display_id}"


def _record_title(job_id: str, record: AccountingRecord | None) -> str:
    return f"job {job_id} ({record.name})" if record is not None and record.name else f"job {job_id}"


def _wanted(job: Job) -> str:
    nodes = _count(job.node_count or 1, "node")
    gpus = _gpus_per_node(job)
    if gpus:
        return f"{nodes} with {_count(gpus, 'GPU')} {'free ' if gpus else ''}each"
    return f"{nodes} with {_count(job.cpus, 'CPU')} in all" if job.cpus else nodes


def _gpus_per_node(job: Job) -> int:
    """Read GPUs for each node from `gres/gpu:a100:8`, or divide what the whole job asks for."""
    match = re.search(r"gpu(?::[^:,()]+)?:(\d+)", job.tres_per_node or "")
    if match:
        return int(match[1])
    total = job.gpu_count or 0
    return -(-total // max(1, job.node_count or 1))


def _has_room(node: Node, gpus: int, job: Job) -> bool:
    free_gpus = node.gpu_count - node.gpu_allocated_count
    if gpus:
        return free_gpus >= gpus
    cpus_each = -(-(job.cpus or 1) // max(1, job.node_count or 1))
    return node.cpus is None or node.cpus_allocated is None or node.cpus - node.cpus_allocated >= cpus_each


def moment(when: datetime, now: datetime) -> str:
    """Write a time both ways: `at 14:03:11 (2 min ago)`, with the date where it is not today's. Local time."""
    return f"at {clock(when, now)}"


def clock(when: datetime, now: datetime) -> str:
    """Write a time as `moment` does, to stand behind a word of its own: `since 14:03:11 (2 min ago)`."""
    local = when.astimezone()
    pattern = "%H:%M:%S" if local.date() == now.astimezone().date() else "%Y-%m-%d %H:%M:%S"
    difference = when - now
    relative = f"in {span(difference)}" if difference > timedelta(0) else f"{span(-difference)} ago"
    return f"{local.strftime(pattern)} ({relative})"


def span(length: timedelta) -> str:
    """Write a length of time to two figures that matter: `42 s`, `3 min 5 s`, `2 h 10 min`, `3 d 4 h`."""
    seconds = max(0, round(length.total_seconds()))
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    for position, (unit, size) in enumerate(units):
        if seconds >= size:
            rest = (seconds % size) // units[position + 1][1] if unit != "s" else 0
            return f"{seconds // size} {unit}" + (f" {rest} {units[position + 1][0]}" if rest else "")
    return "0 s"


def times(count: int) -> str:
    """Write how often: `once`, `twice`, `5 times`."""
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _limit(limit: timedelta | None) -> str:
    return "an unknown time" if limit is None else "unlimited time" if limit == UNLIMITED else format_duration(limit)


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
