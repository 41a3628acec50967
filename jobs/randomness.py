"""Chance that belongs to a sample: noise, timesteps and augmentation, each a function of (seed, sample) and of nothing else.

"Sample" is the number of a sample in the run, step * batch size + place in the batch. So what a sample meets does not depend on
the rank, worker, micro-step or device that works on it, nor on how often the run was stopped before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from numpy.random import Generator, Philox

_TRAINING, _EVALUATION, _BATCH = 0, 1, 2  # streams that share no numbers


@dataclass(frozen=True)
class Chance:
    """What was drawn for a batch of b samples."""

    noise: npt.NDArray[np.float32]
    """Standard normal, shape (b, *shape)."""
    timesteps: npt.NDArray[np.int64]
    """Shape (b,), each in `range(timesteps)`."""
    flips: npt.NDArray[np.bool_]
    """Shape (b,): whether the picture is mirrored."""


class KeyedRandomness:
    """Draws from Philox (Salmon et al., 2011), a generator whose every place can be entered at once.

    It is numpy's, so numbers are the same on every machine; a run should keep its numpy version, as another one may make
    normals otherwise (NEP 19).
    """

    def __init__(
        self,
        seed: int,
        *,
        timesteps: int,
        timestep_sampling: Literal["stratified", "uniform"],
        flip_probability: float = 0.0,
    ) -> None:
        self._seed = seed
        self._timesteps = timesteps
        self._stratified = timestep_sampling == "stratified"
        self._flip_probability = flip_probability
        self._philox = Philox(key=np.array([seed, 0], dtype=np.uint64))
        self._generator = Generator(self._philox)
        self._state = self._philox.state

    def draw(
        self,
        step: int,
        positions: npt.NDArray[np.int64],
        *,
        batch_size: int,
        shape: Sequence[int],
        evaluation: bool = False,
    ) -> Chance:
        """Draw for the samples at `positions` of the global batch of `step`.

        Args:
            step: Number of steps done before this one.
            positions: Places in the global batch, in any order and selection.
            batch_size: The global batch.
            shape: Of one picture's noise.
            evaluation: Draw from numbers that training never uses.
        """
        noise = np.empty((len(positions), *shape), dtype=np.float32)
        shares = np.empty(len(positions))
        flips = np.zeros(len(positions), dtype=np.bool_)
        stream = _EVALUATION if evaluation else _TRAINING
        for row, position in enumerate(positions.tolist()):
            self._enter(step * batch_size + position, stream)
            shares[row] = self._generator.random()
            flips[row] = self._generator.random() < self._flip_probability
            self._generator.standard_normal(dtype=np.float32, out=noise[row])
        if self._stratified:
            # One random start a batch, then even strides: of any `batch_size` samples exactly one lies in each stride.
            self._enter(step, _BATCH + stream)
            shares = (self._generator.random() + positions / batch_size) % 1.0
        return Chance(noise, np.minimum((shares * self._timesteps).astype(np.int64), self._timesteps - 1), flips)

    def _enter(self, number: int, stream: int) -> None:
        # Setting the state costs a third of making a generator. The low word stays free: it counts within the sample.
        self._state["state"]["counter"][:] = (0, 0, number, stream)
        self._state["buffer_pos"] = 4  # nothing buffered
        self._state["has_uint32"] = 0
        self._philox.state = self._state
