"""The exception tree and the documented exit codes say the same."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest

from cluster import errors

DOCUMENT = Path(__file__).parents[2] / "docs" / "exit-codes.md"


def _all_errors() -> list[type[errors.MusterError]]:
    found: list[type[errors.MusterError]] = []
    todo: list[type[errors.MusterError]] = [errors.MusterError]
    while todo:
        kind = todo.pop()
        found.append(kind)
        todo.extend(kind.__subclasses__())
    return [kind for kind in found if kind.__module__ == "cluster.errors"]


def test_every_exit_code_is_in_the_document() -> None:
    """Each exit code that an error of the tree ends with has a row in docs/exit-codes.md."""
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", DOCUMENT.read_text(), flags=re.MULTILINE)}
    assert {kind.exit_code for kind in _all_errors()} <= documented


@pytest.mark.parametrize("kind", _all_errors(), ids=lambda kind: kind.__name__)
def test_the_docstring_draws_every_error_with_its_code(kind: type[errors.MusterError]) -> None:
    """The tree in the module's docstring names each class and its exit code."""
    assert errors.__doc__ is not None
    assert re.search(rf"\b{kind.__name__}\s+{kind.exit_code}\b", errors.__doc__)


_NEEDED: dict[type[errors.MusterError], dict[str, object]] = {
    errors.CommandError: {"argv": ("scontrol", "show"), "returncode": 2, "stdout": "o", "stderr": "e"},
    errors.SlurmError: {"argv": ("squeue",), "returncode": 1, "stderr": "down"},
    errors.CommandTimeout: {"argv": ("sinfo",), "timeout_s": 2.5},
}


@pytest.mark.parametrize("kind", _all_errors(), ids=lambda kind: kind.__name__)
def test_every_error_can_be_sent_to_another_process(kind: type[errors.MusterError]) -> None:
    """Ranks, data workers and submitit hand errors on by pickle: class, message and every attribute arrive."""
    error = kind("the message", **_NEEDED.get(kind, {}))
    error.findings = ["one"]  # type: ignore[attr-defined] # whatever somebody hangs on it
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is kind
    assert str(arrived) == "the message"
    assert vars(arrived) == vars(error)
    assert arrived.exit_code == error.exit_code


def test_an_error_with_a_constructor_of_its_own_arrives_whole() -> None:
    """What a subclass elsewhere demands of its callers is not asked again of the pickled error."""
    arrived = pickle.loads(pickle.dumps(OneOfItsOwn("x", code=42)))
    assert (str(arrived), arrived.exit_code) == ("x", 42)


class OneOfItsOwn(errors.OutsideError):
    """Like jobs.entry.ProgramEnded."""

    def __init__(self, message: str, *, code: int) -> None:
        super().__init__(message)
        self.exit_code = code  # type: ignore[misc] # as there
