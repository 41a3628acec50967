"""What the ranks of a run say to each other outside the training step: small Python values, through torch's object collectives.

Every rank must call the same methods in the same order. A rank that has failed still takes part, with its error as its value:
that is what keeps the others from waiting for it for ever.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Ranks(Protocol):
    """The ranks of a run, seen from one of them."""

    @property
    def rank(self) -> int:
        """This one's number, from 0."""

    @property
    def world_size(self) -> int:
        """How many there are."""

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, in order of ranks, on every rank."""

    def broadcast(self, value: T | None) -> T:
        """Return rank 0's value on every rank; what others give is not looked at."""


class LoneRank:
    """A run of one process."""

    rank = 0
    world_size = 1

    def gather(self, value: T) -> list[T]:
        """Return the value, in a list."""
        return [value]

    def broadcast(self, value: T | None) -> T:
        """Return the value."""
        return value  # type: ignore[return-value] # rank 0 gives one


class TorchRanks:
    """The ranks of a torch process group. Values are pickled and go through the CPU: use a gloo group."""

    def __init__(self, group: Any = None) -> None:
        import torch.distributed as dist

        self._group = group
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)

    def gather(self, value: T) -> list[T]:
        """Return every rank's value; see `Ranks.gather`."""
        import torch.distributed as dist

        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def broadcast(self, value: T | None) -> T:
        """Return rank 0's value; see `Ranks.broadcast`."""
        import torch.distributed as dist

        values: list[Any] = [value if self.rank == 0 else None]
        dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]  # type: ignore[no-any-return]


def on_rank_0(ranks: Ranks, action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and give every rank what it returns, or raise what it raises; a collective call."""
    outcome: tuple[T | None, Exception | None] | None = None
    if ranks.rank == 0:
        try:
            outcome = action(), None
        except Exception as error:  # whatever it is, the others wait to hear of it
            outcome = None, _sendable(error)
    value, failure = ranks.broadcast(outcome)
    if failure is not None:
        raise failure
    return value  # type: ignore[return-value] # there is one where nothing failed


def _sendable(error: Exception) -> Exception:
    """Return an error that arrives: many a library's cannot be made anew from its pickle, and the others would fail on that."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - written by ourselves a moment ago
    except Exception:  # pickling runs foreign code, which may fail in any way
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
