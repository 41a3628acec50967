"""The exception tree and the documented exit codes say the same."""

from __future__ import annotations

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
