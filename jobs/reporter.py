"""Everything a run says and writes about itself while it trains: metrics, sample records, progress, trackers."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING

import psutil
import torch

from cluster.errors import JobError
from jobs.batches import Batch
from jobs.metrics import StepMetrics, StepNumbers
from jobs.progress import Progress, Tick
from jobs.records import JsonLines
from jobs.trackers import Trackers

if TYPE_CHECKING:
    from jobs.training import Training

logger = logging.getLogger(__name__)


class Reporter:
    """Reports for one rank; the first one speaks for all. Use it as a context.

    Args:
        training: Set up and resumed.
        attempt: Number of this attempt, as the journal counts.
    """

    def __init__(self, training: Training, *, attempt: int) -> None:
        config, files = training.config, training.files
        self._training = training
        self._attempt = attempt
        self._first_step = training.step
        self._replaced: set[str] = set()
        self._open = ExitStack()
        first = training.is_first
        self._metrics = StepMetrics(
            files.metrics if first else None,
            world_size=training.info.world_size,
            batch_size=config.batch_size,
            attempt=attempt,
        )
        self._open.callback(self._metrics.close)
        self._samples = JsonLines(files.samples_of(training.info.rank)) if config.record_samples else None
        if self._samples is not None:
            self._open.callback(self._samples.close)
        self._progress = (
            Progress(
                config.last_step, first=training.step, batch_size=config.batch_size, every_s=config.progress.log_every_s
            )
            if first
            else None
        )
        self.trackers = Trackers(training.accelerator, config, first_step=training.step)
        self._open.callback(self.trackers.close)

    def __enter__(self) -> Reporter:
        if self._progress is not None:
            self._open.enter_context(self._progress)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def say(self, text: str) -> None:
        """Say a sentence, on the first rank."""
        if self._progress is not None:
            self._progress.say(text)

    def step_done(
        self, batches: Sequence[Batch], *, loss: torch.Tensor, grad_norm: torch.Tensor, learning_rate: float
    ) -> None:
        """Report a step of the optimizer; `training.step` does not count it yet.

        Raises:
            StateError: The loss is not a number any more.
            JobError: More damaged samples were met than `data.max_bad` allows.
        """
        step = self._training.step
        if self._samples is not None:
            self._samples.append(
                {
                    "attempt": self._attempt,
                    "step": step,
                    "positions": [position for batch in batches for position in batch.positions],
                    "keys": [key for batch in batches for key in batch.keys],
                }
            )
        self._count_replaced(batches)
        numbers = self._metrics.push(step, loss=loss, grad_norm=grad_norm, learning_rate=learning_rate)
        if step == self._first_step and self._progress is not None:
            since_start_s = time.time() - psutil.Process().create_time()
            self.say(f"attempt {self._attempt}: first step {since_start_s:.1f} s after the process started")
        self._show(numbers)

    def flush(self) -> None:
        """Put every step so far on record; before a checkpoint is committed, and at the end. A collective call.

        Raises:
            StateError: The loss is not a number any more.
        """
        self._show(self._metrics.flush())
        if self._samples is not None:
            self._samples.flush()

    def restart_clock(self) -> None:
        """Do not count the time since the last step as part of the next."""
        self._metrics.restart_clock()

    def _show(self, numbers: StepNumbers | None) -> None:
        if numbers is None or self._progress is None:
            return
        config = self._training.config
        done = numbers.step + 1
        every = config.checkpoint.every_steps
        self._progress.tick(
            Tick(
                step=done,
                loss=numbers.loss,
                learning_rate=numbers.learning_rate,
                step_s=numbers.seconds,
                to_checkpoint=min(-done % every, config.last_step - done),
            )
        )
        if numbers.step % config.progress.track_every_steps == 0:
            self.trackers.log(
                {
                    "loss": numbers.loss,
                    "gradient_norm": numbers.grad_norm,
                    "learning_rate": numbers.learning_rate,
                    "samples_per_s": config.batch_size / max(numbers.seconds, 1e-9),
                },
                step=done,
            )

    def _count_replaced(self, batches: Sequence[Batch]) -> None:
        """Count over all data workers of this rank, each of which knows only what it has met itself."""
        for name in (name for batch in batches for name in batch.replaced):
            self._replaced.add(name)
            most = self._training.config.data.max_bad
            if len(self._replaced) > most:
                raise JobError(
                    f"{len(self._replaced)} damaged samples, more than data.max_bad ({most}) allows, the last being {name}; "
                    "restore the shards or raise data.max_bad"
                )
