"""Slurm's own error messages, mapped onto our exceptions in this one place: what it said, what it means, what to do."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.errors import CommandTimeout, MissingError, MusterError, NotFoundError, SlurmError, StateError
from cluster.shell import CommandResult

_SAID_CHARS = 1_000
_COMMAND_CHARS = 300


@dataclass(frozen=True)
class _Rule:
    """One kind of refusal: the pattern in what Slurm printed, the exception it becomes, and what to do about it."""

    pattern: re.Pattern[str]
    error: type[MusterError]
    advice: str


def _rule(pattern: str, error: type[MusterError], advice: str) -> _Rule:
    return _Rule(re.compile(pattern, re.IGNORECASE), error, advice)


_TRANSIENT = re.compile(
    r"socket timed out|message receive failure|slurm controller temporarily|Zero Bytes were transmitted", re.I
)

# The first rule that matches decides, so causes stand before the failures that follow from them.
_RULES = (
    _rule(
        r"could not establish a configuration source|fetch_config|unable to process configuration file"
        r"|unable to read config|slurm\.conf.*no such file",
        MissingError,
        "this machine does not know which Slurm cluster to talk to; for a cluster on this machine run "
        '`eval "$(muster local env)"`, elsewhere set SLURM_CONF to the cluster\'s slurm.conf',
    ),
    _rule(
        r"munge (en|de)code failed|if munged is up|munged? .*(not running|no such file)|Invalid authentication credential"
        r"|Protocol authentication error",
        SlurmError,
        "munge does not vouch for this machine: see that munged runs, that its socket is the one in AuthInfo of slurm.conf, "
        "and that its key and the clock agree with the controller's",
    ),
    _rule(
        r"accounting storage is disabled|not running a supported accounting_storage",
        MissingError,
        "this cluster keeps no accounting; set AccountingStorageType=accounting_storage/slurmdbd in slurm.conf",
    ),
    _rule(
        r"slurmdbd|accounting_storage|problem (talking to|getting).*database|persistent connection",
        SlurmError,
        "slurmdbd does not answer: see that it runs and can reach its database, and read its LogFile (slurmdbd.conf)",
    ),
    _rule(
        r"unable to contact slurm controller|connection refused|no route to host",
        SlurmError,
        "slurmctld does not answer: try `scontrol ping`, see that slurmctld runs, and read its SlurmctldLogFile; "
        "for a cluster on this machine `muster local status` says more",
    ),
    _rule(
        r"access/permission denied|invalid user id|requires? (root|administrator|operator)|user not permitted",
        MissingError,
        "only the job's owner, or root and Slurm's administrators, may do this",
    ),
    _rule(
        r"invalid job id|no such job|unable to find job",
        NotFoundError,
        "slurmctld knows no such job (it forgets ended ones after MinJobAge); `sacct -j` may remember it",
    ),
    _rule(
        r"node (?:name )?\S+ not found|invalid node name|node not found",
        NotFoundError,
        "see `sinfo -N` for the names of the nodes",
    ),
    _rule(r"partition \S+ not found", NotFoundError, "see `sinfo -s` for the names of the partitions"),
    _rule(
        r"already completing or completed|already finished|job (is )?not (running|pending)|job is pending execution"
        r"|requested operation is presently disabled|job is no longer pending|job can not be (altered|requeued)"
        r"|only .*batch.* jobs",
        StateError,
        "the job's state does not allow this now; see `scontrol show job`",
    ),
    _rule(
        r"invalid node state",
        StateError,
        "the node's state does not allow this change; see `scontrol show node`",
    ),
    _rule(
        r"invalid partition",
        SlurmError,
        "see `sinfo -s` for the names of the partitions",
    ),
    _rule(
        r"invalid account",
        SlurmError,
        "see `sacctmgr show assoc user=$USER format=account,partition,qos` for what you may use; an admin adds "
        "the user to an account",
    ),
    _rule(r"invalid qos", SlurmError, "see `sacctmgr show assoc user=$USER format=account,qos` for what you may use"),
    _rule(
        r"requested node configuration is not available|more processors requested than permitted"
        r"|memory specification can not be satisfied|node count specification invalid",
        SlurmError,
        "no node of the partition has what the job asks for; compare nodes, GPUs (--gres), CPUs and memory with "
        '`sinfo -o "%P %D %c %m %G"`',
    ),
    _rule(
        r"job violates accounting/qos policy|requested time limit is invalid|exceeds.*limit",
        SlurmError,
        "it breaks a limit of the account, QOS or partition; see `sacctmgr show assoc,qos` and `scontrol show partition`",
    ),
    _rule(
        r"invalid generic resource|invalid gres",
        SlurmError,
        "see GresTypes in slurm.conf and `sinfo -o %G` for the GRES there are",
    ),
    _rule(r"invalid feature", SlurmError, "see `sinfo -o %f` for the features there are"),
    _rule(r"job dependency problem|dependency", SlurmError, "see the ids and types in --dependency"),
    _rule(
        r"unrecognized option|invalid option|update of this parameter is not supported|invalid input",
        SlurmError,
        "this Slurm does not know that option; see its manual page",
    ),
)


def is_transient(result: CommandResult) -> bool:
    """Tell whether the controller was only too busy to answer in time, so that asking once more may help."""
    return result.returncode != 0 and _TRANSIENT.search(result.stderr + result.stdout) is not None


def slurm_error(result: CommandResult, *, timeout_s: float) -> MusterError:
    """Make the error for a Slurm command that ended badly.

    Args:
        result: What the command left behind. Newer versions print errors as JSON on standard output.
        timeout_s: The deadline of the call, for a `CommandTimeout`.
    """
    printed = result.stderr.strip() or result.stdout.strip() or "it printed nothing"
    fatal = [line for line in printed.splitlines() if ": fatal: " in line]  # what stands before is how it came to that
    said = " ".join(" ".join(fatal or [printed]).split())[-_SAID_CHARS:]
    command = shorten_command(result.argv)
    if is_transient(result):
        return CommandTimeout(
            f"{command}: {said}; slurmctld is up but too busy to answer, try again; `sdiag` shows who asks so much",
            argv=result.argv,
            timeout_s=timeout_s,
        )
    rule = next((rule for rule in _RULES if rule.pattern.search(printed)), None)
    kind = rule.error if rule else SlurmError
    message = f"{command}: {said}" + (f"; {rule.advice}" if rule else f" (exit status {result.returncode})")
    if kind is SlurmError:
        return SlurmError(
            message, argv=result.argv, returncode=result.returncode, stdout=result.stdout, stderr=result.stderr
        )
    return kind(message)


def shorten_command(argv: Sequence[str]) -> str:
    """Return a command as a person would type it, cut to a length that fits a message."""
    text = shlex.join(argv)
    return text if len(text) <= _COMMAND_CHARS else f"{text[: _COMMAND_CHARS - 3]}..."
