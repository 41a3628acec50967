"""Batches: the pictures of one rank's micro-step with their noise and timesteps, decoded and drawn ahead in data workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from cluster.errors import JobError
from jobs.interruption import reset_signals_in_worker
from jobs.order import SampleOrder
from jobs.randomness import KeyedRandomness
from jobs.settings import TrainConfig


class Picture(Protocol):
    """One sample of a data set."""

    @property
    def key(self) -> str:
        """Its name, unlike any other's in the set."""

    @property
    def image(self) -> npt.NDArray[np.uint8]:
        """Height x width x RGB."""

    @property
    def replaces(self) -> str:
        """Name of the damaged sample that this one stands in for; empty as a rule."""


class Pictures(Protocol):
    """A data set of pictures of one size, entered anywhere (`jobs.data.ShardDataset`)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Picture: ...

    @property
    def fingerprint(self) -> str:
        """A hash of the content: the same for the same samples in the same order."""


@dataclass
class Batch:
    """One rank's part of one micro-step, b samples."""

    images: torch.Tensor
    """uint8, b x 3 x height x width."""
    noise: torch.Tensor
    """float32, of the same shape."""
    timesteps: torch.Tensor
    """int64, b."""
    positions: list[int]
    """Places in the global batch."""
    keys: list[str]
    """What was decoded for them."""
    replaced: list[str]
    """Names of damaged samples among them that others stand in for."""

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory; the DataLoader calls this where there is a GPU."""
        return self._moved(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`, copied without waiting where its memory is page-locked."""
        if device.type == "cpu":
            return self
        return self._moved(lambda tensor: tensor.to(device, non_blocking=True))

    def _moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return replace(self, images=move(self.images), noise=move(self.noise), timesteps=move(self.timesteps))


@dataclass(frozen=True)
class Share:
    """One rank's part of every global batch."""

    rank: int
    world_size: int
    accumulation: int
    micro_batch_size: int

    def positions(self, micro_step: int) -> npt.NDArray[np.int64]:
        """Return the places in the global batch that are this rank's in `micro_step`; all of them together cover it exactly."""
        first = (micro_step * self.world_size + self.rank) * self.micro_batch_size
        return np.arange(first, first + self.micro_batch_size, dtype=np.int64)


class KeyedBatches(Dataset[Batch]):
    """Makes the batch of any (step, micro-step), from nothing but these two numbers."""

    def __init__(self, pictures: Pictures, config: TrainConfig, share: Share, *, evaluation: bool = False) -> None:
        self._pictures = pictures
        self._config = config
        self._share = share
        self._evaluation = evaluation
        self._order = SampleOrder(len(pictures), config.seed)
        self._size: tuple[int, int] | None = None

    def __getitem__(self, where: tuple[int, int]) -> Batch:
        """Make the batch of `where` = (step, micro-step); raises JobError if pictures differ in size."""
        step, micro_step = where
        positions = self._share.positions(micro_step)
        _, indices = self._order.locate(step * self._config.batch_size + positions)
        pictures = [self._pictures[index] for index in indices.tolist()]
        sizes = {picture.image.shape[:2] for picture in pictures}
        if len(sizes) > 1:
            raise JobError(
                f"pictures differ in size, among them {sorted(sizes)[:4]}; set data.size_px, or run jobs.preprocess over them"
            )
        images = np.stack([picture.image for picture in pictures])
        chance = self._randomness().draw(
            step,
            positions,
            batch_size=self._config.batch_size,
            shape=(3, *images.shape[1:3]),
            evaluation=self._evaluation,
        )
        images[chance.flips] = images[chance.flips, :, ::-1]
        return Batch(
            # A view: the objective puts pixels into the order that the model works in, as it turns them into floats.
            torch.from_numpy(images).permute(0, 3, 1, 2),
            torch.from_numpy(chance.noise),
            torch.from_numpy(chance.timesteps),
            positions.tolist(),
            [picture.key for picture in pictures],
            [picture.replaces for picture in pictures if picture.replaces],
        )

    def _randomness(self) -> KeyedRandomness:
        # Made where it is used: the generator's state must not be shared between a process and its workers.
        if not hasattr(self, "_drawing"):
            objective = self._config.objective
            self._drawing = KeyedRandomness(
                self._config.seed,
                timesteps=objective.timesteps,
                timestep_sampling=objective.timestep_sampling,
                flip_probability=0.0 if self._evaluation else self._config.data.horizontal_flip,
            )
        return self._drawing


class _Schedule:
    """The (step, micro-step) pairs from `first` to before `last`: what the DataLoader asks its workers for, in this order."""

    def __init__(self, first: int, last: int, accumulation: int) -> None:
        self._range = range(first, last)
        self._accumulation = accumulation

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((step, micro) for step in self._range for micro in range(self._accumulation))

    def __len__(self) -> int:
        return len(self._range) * self._accumulation


def make_loader(
    batches: KeyedBatches,
    config: TrainConfig,
    *,
    first_step: int,
    last_step: int,
    pin_memory: bool,
    worker_init: Callable[[int], None] = reset_signals_in_worker,
) -> DataLoader[Batch]:
    """Make the loader of the batches of steps `first_step` to before `last_step`, `gradient_accumulation` of them a step."""
    workers = config.data.workers
    options: dict[str, Any] = (
        {"prefetch_factor": config.data.prefetch, "worker_init_fn": worker_init} if workers else {}
    )
    return DataLoader(
        batches,
        batch_size=None,
        sampler=_Schedule(first_step, last_step, config.gradient_accumulation),
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else each new loader draws from the run's own random state
        **options,
    )


def picture_size(pictures: Pictures) -> tuple[int, int]:
    """Return height and width of the set's pictures, by its first one."""
    height, width = pictures[0].image.shape[:2]
    return height, width
