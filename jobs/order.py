"""The order in which pictures are trained on: a seeded permutation of each epoch that can be entered anywhere.

Sample `k` of a run (counted from its first step over all ranks) is picture `order.locate(k)`. Nothing is stored and nothing is
run through to get there, so a run goes on after sample `k` however often it was stopped, with any number of workers or ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Counters = npt.NDArray[np.uint64]

_ROUNDS = 8  # 4 make a Feistel network pseudo-random in theory (Luby & Rackoff, 1988); small halves need more
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # increment of SplitMix64 (Steele, Lea & Flood, 2014)


@dataclass(frozen=True)
class SampleOrder:
    """Which picture is which sample of a run with `num_samples` pictures."""

    num_samples: int
    seed: int

    def __post_init__(self) -> None:
        if not 1 <= self.num_samples < 2**62:
            raise ValueError(
                f"num_samples is {self.num_samples}; an order needs at least one sample (and fewer than 2**62)"
            )

    def locate(self, counters: npt.ArrayLike) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the epoch and the index of each sample.

        Within an epoch every index in `range(num_samples)` comes exactly once; epochs have unrelated orders. Batches may reach
        across the end of an epoch: nothing is dropped and nothing padded.

        Args:
            counters: Numbers of samples since the start of the run, any shape, in any order.

        Returns:
            Arrays of the shape of `counters`.
        """
        counter = np.asarray(counters, dtype=np.uint64)
        epoch, position = np.divmod(counter.reshape(-1), np.uint64(self.num_samples))
        index = _permute(
            position, key=_mix(_mix(_uint64(self.seed) + _GOLDEN) ^ (epoch * _GOLDEN + _GOLDEN)), size=self.num_samples
        )
        return epoch.astype(np.int64).reshape(counter.shape), index.astype(np.int64).reshape(counter.shape)


def _permute(position: Counters, *, key: Counters, size: int) -> Counters:
    """Map positions to indices, one to one on `range(size)`, each by its own key.

    A Feistel network permutes the smallest power of two that holds `size`. Where it leads outside, it is applied again until it
    leads back inside ("cycle walking", Black & Rogaway, 2002), which is still a permutation and takes fewer than two turns on
    average, because less than half of that range is outside.
    """
    bits = (size - 1).bit_length()
    if bits == 0:
        return np.zeros_like(position)
    inside = _feistel(position, key, bits)
    walking = np.flatnonzero(inside >= np.uint64(size))
    while walking.size:
        inside[walking] = _feistel(inside[walking], key[walking], bits)
        walking = walking[inside[walking] >= np.uint64(size)]
    return inside


def _feistel(value: Counters, key: Counters, bits: int) -> Counters:
    """Permute `range(2**bits)`. The halves may differ by a bit, so they are not swapped but changed in turns."""
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    low, high = value & low_mask, value >> low_bits
    for turn in range(_ROUNDS):
        round_key = key + _uint64(turn + 1) * _GOLDEN
        if turn % 2:
            low = low ^ (_mix(round_key ^ high) & low_mask)
        else:
            high = high ^ (_mix(round_key ^ low) & high_mask)
    return (high << low_bits) | low


def _mix(value: Counters) -> Counters:
    """Scatter 64 bits: the finaliser of SplitMix64, itself one to one. Overflow is meant."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _uint64(value: int) -> Any:
    return np.full(1, value, dtype=np.uint64)  # an array: numpy warns of overflow in scalars
