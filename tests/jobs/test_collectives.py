"""What the ranks tell each other: an error of rank 0 reaches every rank, whatever it is made of."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from cluster.errors import SlurmError
from jobs.collectives import on_rank_0


class Wire:
    """Two ranks one after the other, with the same pickling between them as torch's object collectives."""

    world_size = 2

    def __init__(self) -> None:
        self.rank = 0
        self.sent = b""

    def gather(self, value: Any) -> list[Any]:
        raise AssertionError("not used here")

    def broadcast(self, value: Any) -> Any:
        if self.rank == 0:
            self.sent = pickle.dumps(value)
        return pickle.loads(self.sent)


class Stubborn(Exception):
    """An error as some libraries have them: its pickle cannot be read."""

    def __init__(self, message: str, *, detail: int) -> None:
        super().__init__(message)
        self.detail = detail


def on_both(error: Exception) -> list[str]:
    """Raise `error` on rank 0; returns what each rank sees."""

    def fail() -> None:
        raise error

    wire, seen = Wire(), []
    for wire.rank in (0, 1):
        with pytest.raises(Exception) as caught:  # noqa: PT011 - which one is what the tests look at
            on_rank_0(wire, fail)
        seen.append(f"{type(caught.value).__name__}: {caught.value}")
    return seen


def test_an_error_of_slurm_reaches_every_rank() -> None:
    """Its constructor wants more than a message, which must not become an error of its own."""
    assert on_both(SlurmError("down", argv=["squeue"], returncode=1)) == ["SlurmError: down"] * 2


def test_an_error_that_cannot_be_sent_is_told_in_words() -> None:
    """Class and message arrive at least, on all ranks alike."""
    assert on_both(Stubborn("no", detail=3)) == ["RuntimeError: Stubborn: no"] * 2


def test_a_value_reaches_every_rank() -> None:
    """The action runs on rank 0 only."""
    wire = Wire()
    assert on_rank_0(wire, lambda: 5) == 5
    wire.rank = 1
    assert on_rank_0(wire, lambda: 6) == 5
