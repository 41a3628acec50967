"""The learning rate as a function of the number of optimizer steps done."""

from __future__ import annotations

import math

from jobs.settings import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the rate for the optimizer step that follows `step` finished ones.

    A pure function of the step: there is no scheduler whose state could be stepped once a rank, once a micro-step, or be lost.
    """
    highest = config.optimizer.learning_rate
    warmup = config.schedule.warmup_steps
    if step < warmup:
        return highest * (step + 1) / warmup
    if config.schedule.kind == "constant":
        return highest
    progress = min(1.0, (step - warmup) / max(1, config.steps - 1 - warmup))
    lowest = highest * config.schedule.final_ratio
    return lowest + (highest - lowest) * 0.5 * (1.0 + math.cos(math.pi * progress))
