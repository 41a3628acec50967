"""Every error that Muster raises on purpose, and the exit code each one ends a command with.

    MusterError                      1   base of the tree; never raised itself
    ├── InputError                   3   a value a person wrote is wrong: the message gives value, rule and next step
    │   ├── SpecError                3   the cluster description (carries findings with line numbers)
    │   └── JobError                 3   a job description or a training configuration
    ├── FindingsError                4   a check found errors; they have been printed
    ├── OutsideError                 5   something outside Muster failed
    │   ├── CommandError             5   a command ended with an error (carries argv, exit status, output)
    │   │   └── SlurmError           5   a Slurm command; the message is Slurm's own, with what to do
    │   └── CommandTimeout           6   a command did not end within its deadline
    ├── NotFoundError                7   the job, node or cluster asked for does not exist
    ├── MissingError                 8   a program, package or permission that this action needs is absent
    ├── StateError                   9   what was asked contradicts what is there (already running, not finished, in use)
    └── InterruptedRunError          75  a trainer saved and wants to be requeued (EX_TEMPFAIL)

Exit code 2 is a usage error (an unknown option), 130 an interrupt from the keyboard; both come from the shell's own
customs. `docs/exit-codes.md` is checked against this table by a test.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class MusterError(Exception):
    """Base of the tree. `str(error)` is one message for a person: the value, the rule, the next step."""

    exit_code: ClassVar[int] = 1

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the class, its message and its attributes; ranks tell each other of errors this way.

        As exceptions do it by themselves, the class would be called again with the message only, and those with keywords of
        their own would refuse that in the process that reads it.
        """
        return _restore, (type(self), self.args), vars(self)


class InputError(MusterError):
    """A value that a person wrote is wrong."""

    exit_code = 3


class SpecError(InputError):
    """The cluster description is wrong. The message lists every finding, one a line."""


class JobError(InputError):
    """A job description or a training configuration is wrong."""


class FindingsError(MusterError):
    """A check found errors. They are already on the screen; this only ends the command."""

    exit_code = 4


class OutsideError(MusterError):
    """Something outside Muster failed."""

    exit_code = 5


class CommandError(OutsideError):
    """A command ended with an error."""

    def __init__(
        self, message: str, *, argv: Sequence[str], returncode: int, stdout: str = "", stderr: str = ""
    ) -> None:
        super().__init__(message)
        self.argv = tuple(argv)
        self.returncode = returncode
        self.stdout = stdout
        self.stderr = stderr


class SlurmError(CommandError):
    """A Slurm command ended with an error."""


class CommandTimeout(OutsideError):
    """A command did not end within its deadline; it and its children have been killed."""

    exit_code = 6

    def __init__(self, message: str, *, argv: Sequence[str], timeout_s: float) -> None:
        super().__init__(message)
        self.argv = tuple(argv)
        self.timeout_s = timeout_s


class NotFoundError(MusterError):
    """The job, node or cluster asked for does not exist."""

    exit_code = 7


class MissingError(MusterError):
    """A program, package or permission that this action needs is absent."""

    exit_code = 8


class StateError(MusterError):
    """What was asked contradicts what is there."""

    exit_code = 9


class InterruptedRunError(MusterError):
    """A trainer has saved its state and wants to be requeued.

    75 is EX_TEMPFAIL of sysexits.h; slurm.conf carries the same number as RequeueExit (see `Scheduling`).
    """

    exit_code = 75


def _restore(kind: type[MusterError], arguments: tuple[object, ...]) -> MusterError:
    return kind.__new__(kind, *arguments)
