"""Why a job's processes are signalled, told from what Slurm says about the job. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from cluster.slurm_records import UNLIMITED, Job
from jobs.attempts import EndReason
from jobs.process_group import RankInfo

_SIGNAL_SLACK_S = 60.0  # --signal comes up to this much early (sbatch's manual)
_LONGEST_WARNING_S = 900.0

ACCOUNTING_REASONS = {
    "PREEMPTED": EndReason.PREEMPTED,
    "TIMEOUT": EndReason.TIME_LIMIT,
    "NODE_FAIL": EndReason.NODE_FAILURE,
    "CANCELLED": EndReason.CANCELLED,
    "REQUEUED": EndReason.REQUEUED,
    "FAILED": EndReason.CRASHED,
    "OUT_OF_MEMORY": EndReason.CRASHED,
}
"""What the state of an ended attempt in accounting means."""


@dataclass(frozen=True)
class Cause:
    """Why an attempt has to leave, and what that means for the job."""

    reason: EndReason
    message: str
    comes_back: bool = True
    """Whether the job is to run again."""
    is_requeued: bool = False
    """Whether Slurm has put it back into the queue already."""


def judge(
    job: Job | None,
    info: RankInfo,
    *,
    signal_name: str | None,
    now: datetime,
    down_nodes: Sequence[str] = (),
    crashed: bool = False,
) -> Cause:
    """Tell from Slurm's record of the job why its processes are signalled; pure.

    Args:
        job: The record, taken after the signal; None where Slurm does not answer.
        info: Who asks; its restart count tells whether the job has been requeued since.
        signal_name: The signal; None if the attempt ends without one.
        now: The time.
        down_nodes: Nodes of the attempt that are down.
        crashed: Whether it fails without having been signalled. Then a limit that is merely near explains nothing: a short
            limit is near from the first second on.
    """
    came = f"{signal_name} came" if signal_name else "no signal came"
    if job is None:
        return Cause(EndReason.UNKNOWN, f"{came}, and Slurm does not answer")
    started = job.start_time
    is_preempted = job.preempt_time is not None and (started is None or job.preempt_time >= started)
    is_requeued = (job.restarts or 0) > info.restart_count
    is_ending = is_requeued or job.is_pending or job.is_ended or job.state == "COMPLETING"
    if is_requeued or job.is_pending:
        if down_nodes:
            message = f"{', '.join(down_nodes)} failed; Slurm has requeued the job"
            return Cause(EndReason.NODE_FAILURE, message, is_requeued=True)
        # The record of the old attempt is gone, PreemptTime with it. What requeues a running job without asking it is
        # preemption without grace, or a person; RunDirectory's journal can ask accounting for the difference later.
        return Cause(EndReason.REQUEUED, "sent back to the queue by Slurm (preempted) or by hand", is_requeued=True)
    if is_preempted:
        return Cause(
            EndReason.PREEMPTED, "a job of a higher tier needs the nodes", comes_back=job.may_requeue is not False
        )
    if down_nodes:
        return Cause(EndReason.NODE_FAILURE, f"{', '.join(down_nodes)} failed", comes_back=job.may_requeue is not False)
    if (is_ending or not crashed) and _is_time_up(job, now, is_ending=is_ending):
        return Cause(EndReason.TIME_LIMIT, f"the time limit of {job.time_limit} is near", job.may_requeue is not False)
    if is_ending:
        return Cause(EndReason.CANCELLED, "cancelled (scancel)", comes_back=False)
    return Cause(EndReason.SIGNALLED, f"{came}, though Slurm does not want the nodes: sent by hand")


def _is_time_up(job: Job, now: datetime, *, is_ending: bool) -> bool:
    if job.time_limit is None or job.time_limit == UNLIMITED or job.end_time is None or job.start_time is None:
        return False
    if is_ending:  # the end is past, and so as much later than the start as the limit says
        return job.reason == "TimeLimit" or job.end_time - job.start_time >= job.time_limit
    # The warning of --signal is not in the record: two minutes or a fifth of the limit are what people ask for.
    warning_s = min(max(120.0, 0.2 * job.time_limit.total_seconds()), _LONGEST_WARNING_S)
    return (job.end_time - now).total_seconds() <= warning_s + _SIGNAL_SLACK_S
