"""The numbers of each step, averaged over the ranks without making any of them wait."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.errors import StateError
from jobs.records import JsonLines


@dataclass(frozen=True, kw_only=True)
class StepNumbers:
    """What is known of a finished step."""

    step: int
    """Steps done before it: the first is 0."""
    loss: float
    """Mean over the global batch."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    seconds: float


class StepMetrics:
    """Averages the loss over ranks and appends a line for each step to `metrics.jsonl`.

    A step's numbers are taken from the device, and the ranks' sum waited for, one step later, when both have long arrived. So
    `push` gives the numbers of the step before; `flush` gives those that are still held, and must come before a checkpoint is
    committed: its steps must all be on record.

    All ranks call the same methods in the same order.
    """

    def __init__(self, path: Path | None, *, world_size: int, batch_size: int, attempt: int) -> None:
        """Take the file to append to; None on all ranks but the first."""
        self._lines = None if path is None else JsonLines(path)
        self._world_size = world_size
        self._batch_size = batch_size
        self._attempt = attempt
        self._held: tuple[dict[str, Any], torch.Tensor, torch.Tensor, Any] | None = None
        self._last_s = time.monotonic()

    def restart_clock(self) -> None:
        """Do not count what happened since the last step (a save, a grid of pictures) as part of the next one."""
        self._last_s = time.monotonic()

    def push(
        self, step: int, *, loss: torch.Tensor, grad_norm: torch.Tensor, learning_rate: float
    ) -> StepNumbers | None:
        """Take the numbers of `step`; `loss` is this rank's mean. Returns those of the step before, if it was not flushed.

        Raises:
            StateError: The loss of the step before is not a number any more.
        """
        now = time.monotonic()
        seconds, self._last_s = now - self._last_s, now
        shared = loss.detach().clone()
        work = None
        if self._world_size > 1:
            import torch.distributed as dist

            shared /= self._world_size
            work = dist.all_reduce(shared, async_op=True)
        before = self.flush()
        facts = {"step": step, "learning_rate": learning_rate, "seconds": seconds, "time": time.time()}
        self._held = facts, shared, grad_norm.detach(), work
        return before

    def flush(self) -> StepNumbers | None:
        """Finish what is held; returns it, or None if nothing is.

        Raises:
            StateError: The loss is not a number any more.
        """
        if self._held is None:
            if self._lines is not None:
                self._lines.flush()
            return None
        facts, loss, grad_norm, work = self._held
        self._held = None
        if work is not None:
            work.wait()
        numbers = StepNumbers(
            step=facts["step"],
            loss=loss.item(),
            grad_norm=grad_norm.item(),
            learning_rate=facts["learning_rate"],
            seconds=facts["seconds"],
        )
        if self._lines is not None:
            self._lines.append(self._record(numbers, facts))
        if not math.isfinite(numbers.loss):
            raise StateError(
                f"the loss of step {numbers.step} is {numbers.loss} (gradient norm {numbers.grad_norm:g}); checkpoints "
                "before it are sound. Lower optimizer.learning_rate, or use precision: fp32, in a new run"
            )
        return numbers

    def close(self) -> None:
        """Close the file. What is held is dropped: the run has failed, or it was flushed."""
        if self._lines is not None:
            self._lines.close()

    def _record(self, numbers: StepNumbers, facts: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "attempt": self._attempt,
            "step": numbers.step,
            "loss": numbers.loss,
            "loss_hex": numbers.loss.hex(),
            "grad_norm": numbers.grad_norm,
            "lr": numbers.learning_rate,
            "samples_seen": (numbers.step + 1) * self._batch_size,
            "samples_per_s": round(self._batch_size / max(numbers.seconds, 1e-9), 3),
            "time": round(facts["time"], 3),
        }
