from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import settings as test_settings
from hypothesis import strategies as st

from cluster.errors import JobError
from jobs.batches import Batch, KeyedBatches, Share, make_loader, picture_size
from jobs.randomness import KeyedRandomness
from jobs.settings import TrainConfig


@dataclass
class Picture:
    key: str
    image: npt.NDArray[np.uint8]
    replaces: str = ""


class Pictures:
    """Thirty pictures, each of one value all over but for its left column."""

    fingerprint = "f"

    def __init__(self, size: int = 4, odd: int | None = None) -> None:
        self._size = size
        self._odd = odd

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> Picture:
        image = np.full((self._size + (index == self._odd), self._size, 3), index, dtype=np.uint8)
        image[:, 0] = 255
        return Picture(f"k{index}", image, replaces="bad" if index == 3 else "")


def config(**values: Any) -> TrainConfig:
    return TrainConfig.model_validate(
        {"run_directory": Path("r"), "data": {"directory": Path("d")}, "batch_size": 12, **values}
    )


def whole_step(step: int, *, world: int, accumulation: int, settings: TrainConfig) -> dict[int, tuple[Any, ...]]:
    """Everything that one step trains on, by place in the global batch."""
    found = {}
    for rank in range(world):
        batches = KeyedBatches(Pictures(), settings, Share(rank, world, accumulation, 12 // (world * accumulation)))
        for micro in range(accumulation):
            batch = batches[(step, micro)]
            for row, place in enumerate(batch.positions):
                found[place] = (
                    batch.keys[row],
                    batch.images[row].numpy().tobytes(),
                    batch.noise[row].numpy().tobytes(),
                    int(batch.timesteps[row]),
                )
    return found


@pytest.mark.parametrize("sampling", ["stratified", "uniform"])
@pytest.mark.parametrize("step", [0, 2, 1000])
def test_a_step_is_the_same_however_it_is_split(step: int, sampling: str) -> None:
    """Ranks and micro-steps share out the same pictures, flips, noise and timesteps in the same places."""
    settings = config(data={"directory": "d", "horizontal_flip": 0.5}, objective={"timestep_sampling": sampling})
    whole = whole_step(step, world=1, accumulation=1, settings=settings)
    assert sorted(whole) == list(range(12))
    for world, accumulation in ((2, 1), (1, 3), (2, 3), (4, 1), (12, 1)):
        assert whole_step(step, world=world, accumulation=accumulation, settings=settings) == whole


def test_samples_differ_in_their_chance() -> None:
    """No two places, steps or seeds share their noise."""
    seen = set()
    for settings in (config(), config(seed=1)):
        for step in (0, 1):
            seen |= {value[2] for value in whole_step(step, world=1, accumulation=1, settings=settings).values()}
    assert len(seen) == 48


def test_evaluation_draws_numbers_that_training_never_uses() -> None:
    """The same step has other noise in evaluation, and no flips."""
    settings = config(data={"directory": "d", "horizontal_flip": 1.0})
    share = Share(0, 1, 1, 12)
    training, evaluation = (
        KeyedBatches(Pictures(), settings, share)[(0, 0)],
        KeyedBatches(Pictures(), settings, share, evaluation=True)[(0, 0)],
    )
    assert training.keys == evaluation.keys
    assert not torch.equal(training.noise, evaluation.noise)
    assert (training.images[..., -1] == 255).all()
    assert (evaluation.images[..., 0] == 255).all()


def test_flips_come_as_often_as_asked() -> None:
    """With probability 0 none, with 0.25 about a quarter, and each picture as a whole."""
    for probability, low, high in ((0.0, 0, 0), (0.25, 200, 300)):
        randomness = KeyedRandomness(5, timesteps=10, timestep_sampling="uniform", flip_probability=probability)
        flips = randomness.draw(0, np.arange(1000), batch_size=1000, shape=(1,)).flips
        assert low <= np.count_nonzero(flips) <= high


def test_noise_is_standard_normal() -> None:
    """Mean, variance and kurtosis of many samples are those of the normal distribution, and places are uncorrelated."""
    noise = (
        KeyedRandomness(1, timesteps=10, timestep_sampling="uniform")
        .draw(0, np.arange(400), batch_size=400, shape=(3, 16, 16))
        .noise
    )
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    assert abs((noise**4).mean() - 3) < 0.1
    flat = noise.reshape(400, -1)
    assert abs(np.mean(flat[1:] * flat[:-1])) < 0.01


@test_settings(deadline=None)  # a machine under load is slow, not wrong
@given(step=st.integers(0, 2**40), batch=st.integers(1, 64), chain=st.integers(2, 1000))
def test_stratified_timesteps_have_one_in_each_stride(step: int, batch: int, chain: int) -> None:
    """A batch of b spreads over b equal parts of the chain, and all timesteps are valid."""
    randomness = KeyedRandomness(3, timesteps=chain, timestep_sampling="stratified")
    timesteps = randomness.draw(step, np.arange(batch), batch_size=batch, shape=(1,)).timesteps
    assert ((timesteps >= 0) & (timesteps < chain)).all()
    gaps = np.diff(np.sort(timesteps))
    assert (np.abs(gaps - chain / batch) <= 1 + 1e-6).all()


def test_each_timestep_is_equally_likely_either_way() -> None:
    """Over many steps, stratified and independent draws cover the chain evenly."""
    for sampling in ("stratified", "uniform"):
        randomness = KeyedRandomness(3, timesteps=10, timestep_sampling=sampling)  # type: ignore[arg-type]
        drawn = np.concatenate(
            [randomness.draw(step, np.arange(7), batch_size=7, shape=(1,)).timesteps for step in range(2000)]
        )
        assert (np.abs(np.bincount(drawn, minlength=10) - 1400) < 150).all()


def test_draws_do_not_depend_on_what_was_drawn_before() -> None:
    """One generator asked in any order gives what a new one gives."""
    old = KeyedRandomness(3, timesteps=10, timestep_sampling="stratified")
    for step in (5, 0, 3):
        old.draw(step, np.arange(4), batch_size=4, shape=(5,))
    new = KeyedRandomness(3, timesteps=10, timestep_sampling="stratified")
    assert np.array_equal(
        old.draw(7, np.array([2]), batch_size=4, shape=(5,)).noise,
        new.draw(7, np.arange(4), batch_size=4, shape=(5,)).noise[2:3],
    )


def test_the_numbers_do_not_change_between_versions() -> None:
    """Running jobs depend on these very numbers; a numpy that draws otherwise must not go unnoticed."""
    chance = KeyedRandomness(42, timesteps=1000, timestep_sampling="stratified").draw(
        10, np.array([1, 5]), batch_size=8, shape=(2,)
    )
    assert chance.timesteps.tolist() == GOLDEN_TIMESTEPS
    assert [value.hex() for value in chance.noise.ravel().tolist()] == GOLDEN_NOISE


def test_drawing_is_cheap() -> None:
    """64 samples of 3 x 32 x 32 cost a few milliseconds: single samples are entered, not searched for."""
    randomness = KeyedRandomness(0, timesteps=1000, timestep_sampling="stratified")
    started = time.process_time()
    for step in range(10):
        randomness.draw(step, np.arange(64), batch_size=64, shape=(3, 32, 32))
    assert (time.process_time() - started) / 10 < 0.05


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_gives_the_steps_in_order_from_anywhere(workers: int) -> None:
    """From step 3 on, micro-step by micro-step, the same with and without worker processes."""
    settings = config(gradient_accumulation=2, data={"directory": "d", "workers": workers})
    batches = KeyedBatches(Pictures(), settings, Share(0, 1, 2, 6))
    before = torch.get_rng_state()
    loaded = list(make_loader(batches, settings, first_step=3, last_step=5, pin_memory=False))
    assert torch.equal(before, torch.get_rng_state())  # or dropout would differ after a resume
    assert len(loaded) == 4
    for batch, where in zip(loaded, [(3, 0), (3, 1), (4, 0), (4, 1)], strict=True):
        expected = batches[where]
        assert (batch.keys, batch.positions, batch.replaced) == (expected.keys, expected.positions, expected.replaced)
        assert torch.equal(batch.images, expected.images)
        assert torch.equal(batch.noise, expected.noise)


def test_stand_ins_are_named() -> None:
    """A batch tells which damaged samples others stand in for."""
    batches = KeyedBatches(Pictures(), config(batch_size=30), Share(0, 1, 1, 30))
    assert batches[(0, 0)].replaced == ["bad"]


def test_pictures_of_different_sizes_are_explained() -> None:
    """The message says what to do instead of torch's words about stacking."""
    with pytest.raises(JobError, match=r"pictures differ in size.*data\.size_px"):
        KeyedBatches(Pictures(odd=7), config(batch_size=30), Share(0, 1, 1, 30))[(0, 0)]


def test_the_size_is_height_and_width() -> None:
    """Height comes first."""
    assert picture_size(Pictures(odd=0)) == (5, 4)


def test_a_batch_stays_where_it_is_on_the_cpu() -> None:
    """No copy is made where none is needed."""
    batch = Batch(torch.zeros(1), torch.zeros(1), torch.zeros(1), [0], ["a"], [])
    assert batch.to(torch.device("cpu")) is batch


GOLDEN_TIMESTEPS = [304, 804]
GOLDEN_NOISE = ["-0x1.2f8fa80000000p-1", "-0x1.177ae60000000p+0", "-0x1.c4a7280000000p+0", "-0x1.00390a0000000p-1"]
