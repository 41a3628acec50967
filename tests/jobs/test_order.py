from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import settings as test_settings
from hypothesis import strategies as st

from jobs.order import SampleOrder


@test_settings(deadline=None)  # a machine under load is slow, not wrong
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 2**30))
@example(size=1, seed=0, epoch=0)
@example(size=2, seed=0, epoch=0)
@example(size=3, seed=1, epoch=5)
@example(size=1024, seed=2**63 - 1, epoch=1)
@example(size=1025, seed=7, epoch=2)
def test_an_epoch_holds_every_index_once(size: int, seed: int, epoch: int) -> None:
    """Within each epoch the order is a permutation of all indices, whatever the size, seed and epoch."""
    epochs, indices = SampleOrder(size, seed).locate(epoch * size + np.arange(size))
    assert set(epochs.tolist()) == {epoch}
    assert sorted(indices.tolist()) == list(range(size))


@test_settings(deadline=None)  # a machine under load is slow, not wrong
@given(
    size=st.integers(1, 500),
    seed=st.integers(0, 2**32),
    counters=st.lists(st.integers(0, 5000), min_size=1, max_size=50),
)
def test_a_sample_is_the_same_however_it_is_reached(size: int, seed: int, counters: list[int]) -> None:
    """Asking for one counter, for many at once, or in another order gives the same epoch and index."""
    order = SampleOrder(size, seed)
    together = list(zip(*(array.tolist() for array in order.locate(counters)), strict=True))
    alone = [tuple(int(array) for array in order.locate(counter)) for counter in counters]
    assert together == alone


def test_counters_keep_their_shape() -> None:
    """Arrays of counters give arrays of their own shape, a single counter a single number."""
    epochs, indices = SampleOrder(10, 0).locate(np.arange(12).reshape(3, 4))
    assert epochs.shape == indices.shape == (3, 4)
    assert SampleOrder(10, 0).locate(25)[0] == 2


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    """Another seed, or another epoch, puts about one index in `size` at the same place, as chance would."""
    size = 4000
    counters = np.arange(size)
    first = SampleOrder(size, 1).locate(counters)[1]
    for other in (SampleOrder(size, 2).locate(counters)[1], SampleOrder(size, 1).locate(size + counters)[1]):
        assert np.count_nonzero(first == other) < 12


@pytest.mark.parametrize("size", [2, 3, 5, 16, 100])
def test_each_index_comes_first_equally_often(size: int) -> None:
    """Over many epochs every index opens the epoch about as often as every other: no place is favoured."""
    epochs = 20_000
    first = SampleOrder(size, 3).locate(np.arange(epochs) * size)[1]
    counts = np.bincount(first, minlength=size)
    expected = epochs / size
    assert ((counts - expected) ** 2 / expected).sum() < size + 6 * (2 * size) ** 0.5 + 10  # chi-square, far out


def test_neighbours_are_scattered() -> None:
    """Samples that follow each other are no closer in the data set than chance puts them."""
    size = 10_000
    indices = SampleOrder(size, 0).locate(np.arange(size))[1]
    assert abs(np.abs(np.diff(indices)).mean() - size / 3) < size / 50


def test_entering_far_in_costs_what_entering_at_the_start_costs() -> None:
    """The billionth epoch of a billion samples is reached at once and without memory."""
    order = SampleOrder(10**9 + 7, 0)
    started = time.process_time()
    epochs, indices = order.locate(np.arange(64) + 10**18)
    assert time.process_time() - started < 0.5
    assert len(set(indices.tolist())) == 64
    assert epochs[0] == 10**18 // (10**9 + 7)


def test_no_samples_is_refused() -> None:
    """An order of nothing is an error where it is made, not where it is used."""
    with pytest.raises(ValueError, match="num_samples is 0"):
        SampleOrder(0, 0)


def test_the_order_does_not_change_between_versions() -> None:
    """These very numbers are what running jobs depend on; another order would repeat and miss samples after an upgrade."""
    assert SampleOrder(10, 0).locate(np.arange(10))[1].tolist() == GOLDEN_10
    assert SampleOrder(109, 42).locate(np.arange(1090, 1096))[1].tolist() == GOLDEN_109


GOLDEN_10 = [0, 8, 4, 9, 7, 5, 3, 6, 1, 2]
GOLDEN_109 = [28, 31, 84, 48, 7, 78]
