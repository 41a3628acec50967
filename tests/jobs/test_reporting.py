"""What a run says and writes while it trains: metrics, progress, trackers."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from cluster.errors import JobError, StateError
from jobs.metrics import StepMetrics
from jobs.progress import Progress, Tick, format_seconds
from jobs.records import read_json_lines
from jobs.settings import TrainConfig
from jobs.trackers import Trackers, check_trackers


def push(metrics: StepMetrics, step: int, loss: float) -> Any:
    return metrics.push(step, loss=torch.tensor(loss), grad_norm=torch.tensor(2.0), learning_rate=1e-3)


def test_numbers_come_one_step_later_and_none_is_lost(tmp_path: Path) -> None:
    """A push gives the step before; flush gives the last one, once."""
    metrics = StepMetrics(tmp_path / "m.jsonl", world_size=1, batch_size=4, attempt=2)
    assert push(metrics, 0, 0.5) is None
    assert push(metrics, 1, 0.1).step == 0
    assert [record["step"] for record in read_json_lines(tmp_path / "m.jsonl")] == [0]
    assert metrics.flush().step == 1  # type: ignore[union-attr]
    assert metrics.flush() is None
    metrics.close()
    last = list(read_json_lines(tmp_path / "m.jsonl"))[-1]
    assert (last["attempt"], last["step"], last["samples_seen"], last["lr"]) == (2, 1, 8, 1e-3)
    assert float.fromhex(last["loss_hex"]) == torch.tensor(0.1).item()


def test_a_loss_pushed_is_the_loss_written(tmp_path: Path) -> None:
    """The trainer may reuse its tensor for the next step before this one is written."""
    metrics = StepMetrics(tmp_path / "m.jsonl", world_size=1, batch_size=4, attempt=1)
    loss = torch.tensor(1.0)
    metrics.push(0, loss=loss, grad_norm=loss, learning_rate=1.0)
    loss.fill_(5.0)
    assert metrics.flush().loss == 1.0  # type: ignore[union-attr]
    metrics.close()


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_on_record_and_an_error(tmp_path: Path, loss: float) -> None:
    """The step is written first, so that the curve shows where it happened."""
    metrics = StepMetrics(tmp_path / "m.jsonl", world_size=1, batch_size=4, attempt=1)
    push(metrics, 7, loss)
    with pytest.raises(StateError, match="the loss of step 7 is"):
        metrics.flush()
    metrics.close()
    assert [record["step"] for record in read_json_lines(tmp_path / "m.jsonl")] == [7]


def test_ranks_other_than_the_first_write_nothing(tmp_path: Path) -> None:
    """They take part in the sum and know the loss."""
    metrics = StepMetrics(None, world_size=1, batch_size=4, attempt=1)
    push(metrics, 0, 0.5)
    assert metrics.flush().loss == 0.5  # type: ignore[union-attr]
    metrics.close()
    assert list(tmp_path.iterdir()) == []


def tick(step: int, **changes: Any) -> Tick:
    return Tick(**{"step": step, "loss": 0.25, "learning_rate": 1e-3, "step_s": 0.5, "to_checkpoint": 3, **changes})


def test_a_log_has_a_plain_line_now_and_then() -> None:
    """The first and last steps and one every ten seconds, with speed, time left and steps to the next checkpoint."""
    text, now = io.StringIO(), 0.0
    progress = Progress(
        100, first=0, batch_size=8, every_s=10, console=Console(file=text, width=200), clock=lambda: now
    )
    with progress:
        for step in range(1, 101):
            progress.tick(tick(step))
            now += 1.0
    lines = text.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == [
        f"{step}/100" for step in (1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100)
    ]
    assert lines[1] == "step 11/100  loss 0.2500  lr 1.00e-03  16.0 samples/s  ETA 44s  checkpoint in 3"


def test_a_terminal_has_a_bar() -> None:
    """Where somebody watches there is a bar with the same numbers, and sentences stand above it."""
    text = io.StringIO()
    console = Console(file=text, width=160, force_terminal=True)
    with Progress(100, first=40, batch_size=8, every_s=10, console=console) as progress:
        progress.tick(tick(41))
        progress.say("saved step-00000041 [not markup]")
    assert "41/100" in text.getvalue()
    assert "16.0 samples/s" in text.getvalue()
    assert "saved step-00000041 [not markup]" in text.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59, "59s"), (60, "1m00s"), (187, "3m07s"), (3600, "1h00m"), (90_061, "1d01h"), (59.7, "1m00s")],
)
def test_times_are_written_for_people(seconds: float, text: str) -> None:
    """Two units at most."""
    assert format_seconds(seconds) == text


class FakeTracker:
    def __init__(self, name: str, *, fails: bool = False) -> None:
        self.name = name
        self.fails = fails
        self.got: list[Any] = []

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.got.append(("config", values["optimizer.learning_rate"]))

    def log(self, values: dict[str, float], step: int) -> None:
        if self.fails:
            raise ConnectionError("no route to host")
        self.got.append((step, values))

    def log_images(self, values: dict[str, Any], step: int) -> None:
        self.got.append((step, [picture.shape for picture in values["grid"]]))

    def finish(self) -> None:
        self.got.append("finish")


class FakeAccelerator:
    def __init__(self, *trackers: FakeTracker, is_main_process: bool = True) -> None:
        self._made = trackers
        self.trackers: list[FakeTracker] = []
        self.is_main_process = is_main_process
        self.init_kwargs: Any = None

    def init_trackers(self, name: str, init_kwargs: Any) -> None:
        self.init_kwargs = init_kwargs
        self.trackers = list(self._made)


def config() -> TrainConfig:
    return TrainConfig.model_validate({"run_directory": "runs/a", "data": {"directory": "d"}})


def test_a_tracker_that_fails_is_dropped_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    """A service that does not answer is said once and asked no more."""
    good, bad = FakeTracker("wandb"), FakeTracker("mlflow", fails=True)
    trackers = Trackers(FakeAccelerator(bad, good), config(), first_step=7)
    for step in (8, 9):
        trackers.log({"loss": 1.0}, step)
    trackers.log_picture("grid", np.zeros((2, 2, 3), dtype=np.uint8), 9)
    trackers.close()
    assert caplog.text.count("tracker mlflow failed and is dropped: no route to host") == 1
    assert good.got == [("config", 3e-4), (8, {"loss": 1.0}), (9, {"loss": 1.0}), (9, [(2, 2, 3)]), "finish"]


def test_trackers_are_opened_with_the_first_value_and_hide_what_was_redone() -> None:
    """Nothing is imported before; TensorBoard is told from which step the curve is written anew."""
    accelerator = FakeAccelerator(FakeTracker("tensorboard"))
    trackers = Trackers(accelerator, config(), first_step=7)
    assert accelerator.init_kwargs is None
    trackers.log({"loss": 1.0}, 8)
    assert accelerator.init_kwargs == {"tensorboard": {"purge_step": 7}}


def test_only_the_first_rank_tracks() -> None:
    """Other ranks open nothing."""
    accelerator = FakeAccelerator(FakeTracker("wandb"), is_main_process=False)
    trackers = Trackers(accelerator, config(), first_step=0)
    trackers.log({"loss": 1.0}, 1)
    trackers.close()
    assert accelerator.trackers == []


def test_unknown_trackers_are_refused_before_training() -> None:
    """The message tells a missing package from a wrong name, and lists what can be used."""
    check_trackers(("tensorboard",))
    check_trackers(())
    with pytest.raises(
        JobError, match=r"trackers: tensorbord is no tracker that accelerate knows; you can use: .*tensorboard"
    ):
        check_trackers(("tensorbord",))


def test_damaged_samples_are_counted_over_workers(tmp_path: Path) -> None:
    """Each worker counts for itself; the reporter counts names over all of them and stops at the limit."""
    from jobs.reporter import Reporter

    reporter = Reporter.__new__(Reporter)
    reporter._replaced = set()
    reporter._training = SimpleNamespace(config=SimpleNamespace(data=SimpleNamespace(max_bad=2)))  # type: ignore[assignment]
    batches: Any = [SimpleNamespace(replaced=["a", "b"]), SimpleNamespace(replaced=["a"])]
    reporter._count_replaced(batches)
    with pytest.raises(JobError, match=r"3 damaged samples, more than data\.max_bad \(2\) allows, the last being c"):
        reporter._count_replaced([SimpleNamespace(replaced=["c"])])  # type: ignore[list-item]
